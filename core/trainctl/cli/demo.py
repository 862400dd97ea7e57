"""`trainctl demo`: train a small GPT on this machine and watch it."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import click

from trainctl.cli.launch import Job, Launch, prepare
from trainctl.cli.log import LogPrinter, Wanted, follow_log
from trainctl.cli.options import json_option
from trainctl.client.discover import hub_cards
from trainctl.client.errors import ClientError
from trainctl.client.session import open_session
from trainctl.wire.commands import FINAL_COMMAND_STATES, Stop

_POLL_S = 0.1
_LAST_WORDS_S = 5.0


@click.command()
@click.option("--nproc-per-node", type=click.IntRange(1, 64), default=2, show_default=True, metavar="N")
@click.option("--steps", type=click.IntRange(1), default=2000, show_default=True, metavar="N")
@click.option("--headless", is_flag=True, help="Print the log instead of opening the cockpit.")
@click.option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path), help="Where the run is kept.")
@click.option("--name", default="gpt-stdlib", show_default=True, metavar="NAME")
@click.option(
    "--log-every", type=click.IntRange(1), default=10, show_default=True, metavar="N", help="A line each N steps."
)
@click.option("--amp", type=click.Choice(["bf16", "fp16", "off"]), help="Mixed precision.")
@json_option
def demo(
    nproc_per_node: int,
    steps: int,
    directory: Path | None,
    name: str,
    log_every: int,
    amp: str | None,
    *,
    headless: bool,
    as_json: bool,
) -> int:
    """Train a byte-level GPT on the Python standard library's own sources, with agent and cockpit."""
    words = [f"--nproc-per-node={nproc_per_node}", "-m", "trainctl.trainer.demo", "--name", name, "--steps", str(steps)]
    words += ["--amp", amp] if amp else []
    launch = prepare(name, words, directory=directory, threads=True)
    job = Job(launch, output=launch.directory / "output.log")
    if headless or as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _headless(job, log_every, as_json=as_json)
    return _cockpit(job)


def _headless(job: Job, log_every: int, *, as_json: bool) -> int:
    click.echo(f"run {job.launch.run_id} in {job.launch.directory}", err=True)
    with job.forwarding():
        asyncio.run(_print_log(job, log_every, as_json=as_json))
        code = job.wait()
    return _result(job, code)


async def _print_log(job: Job, log_every: int, *, as_json: bool) -> None:
    """Print the run's log until the job is gone and the log has said how it ended."""
    ended = asyncio.create_task(_job_ends(job))
    printing = asyncio.create_task(_print_from_the_start(job.launch, log_every, as_json=as_json))
    try:
        await asyncio.wait({ended, printing}, return_when=asyncio.FIRST_COMPLETED)
        if not printing.done():
            await asyncio.wait({printing}, timeout=_LAST_WORDS_S)
        if printing.done() and (error := printing.exception()) is not None:
            if not isinstance(error, ClientError):
                raise error
            click.echo(f"trainctl: {error.message}; training goes on", err=True)
        await ended
    finally:
        for task in (ended, printing):
            task.cancel()
        await asyncio.gather(ended, printing, return_exceptions=True)


async def _print_from_the_start(launch: Launch, log_every: int, *, as_json: bool) -> None:
    async for _ in _ticks():
        if launch.run_id in hub_cards():
            break
    session = await open_session(launch.run_id, timeout_s=10.0)
    try:
        wanted = Wanted(follow=True, every=log_every, from_step=0)
        await follow_log(session, LogPrinter(session.model, wanted, as_json=as_json))
    finally:
        await session.close()


async def _job_ends(job: Job) -> None:
    async for _ in _ticks():
        if job.code is not None:
            return


async def _ticks() -> AsyncGenerator[None, None]:
    """Other processes' doings make no event of ours, so they are looked for."""
    while True:
        yield
        await asyncio.sleep(_POLL_S)


def _cockpit(job: Job) -> int:
    launch = job.launch
    click.echo(f"starting {launch.name} … (loading torch takes a few seconds)", err=True)
    if not asyncio.run(_hub_shows_up(job)):
        return _result(job, job.wait())
    from trainctl.tui.app import run_cockpit

    left = run_cockpit(launch.run_id, owned=True, read_only=False)
    if left == "stop" and job.code is None:
        click.echo(f"stopping {launch.name}: it saves a checkpoint first …", err=True)
        asyncio.run(_stop(launch.run_id))
        return _result(job, job.wait())
    if left != "go-on":
        job.wait_s(_LAST_WORDS_S)  # a run that ended needs a moment to take its processes down
    if job.code is None:
        click.echo(f"{launch.name} goes on without the cockpit; back to it: trainctl tui {launch.run_id}")
        return 0
    return _result(job, job.wait())


async def _hub_shows_up(job: Job) -> bool:
    async for _ in _ticks():
        if job.code is not None:
            return False
        if job.launch.run_id in hub_cards():
            return True
    raise AssertionError("unreachable: ticks never end")


async def _stop(run_id: str) -> None:
    """Ask the run to stop; when that is refused or lost, say so and wait for its own end."""
    try:
        session = await open_session(run_id)
    except ClientError as error:
        click.echo(f"trainctl: {error.message}", err=True)
        return
    try:
        async with contextlib.aclosing(session.do(Stop())) as updates:
            async for update in updates:
                if update.state in FINAL_COMMAND_STATES and update.state != "applied":
                    click.echo(f"trainctl: stop {update.state}: {update.reason or 'no reason given'}", err=True)
    except ClientError as error:
        click.echo(f"trainctl: {error.message}", err=True)
    finally:
        await session.close()


def _result(job: Job, code: int) -> int:
    if code == 0:
        return 0
    if job.interrupted:
        look = f"; `trainctl log {job.launch.run_id}` shows what it did" if job.launch.is_a_run() else ""
        click.echo(f"trainctl: training was interrupted{look}", err=True)
        return 1
    click.echo(f"trainctl: training ended with {code}; the end of {job.output}:", err=True)
    click.echo(job.tail(), err=True)
    return 1
