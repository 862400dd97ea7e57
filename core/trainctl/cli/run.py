"""`trainctl run`: start a user's script under torchrun."""

import asyncio
from pathlib import Path

import click
import msgspec

from trainctl.cli.attempts import Attempts
from trainctl.cli.launch import Launch, prepare, refuse_another_runs, require_torch
from trainctl.cli.options import DURATION
from trainctl.cli.preempting import Preemption, Rules, directory_to_go_on_in, rules
from trainctl.cli.torchrun import check_options, restarts_wanted, several_nodes
from trainctl.client.discover import read_info, resolve
from trainctl.client.errors import ClientError, Rejected, RunNotFound
from trainctl.client.jsonable import dumps
from trainctl.wire.preemption import REQUEUE_EXIT_CODE

# torchrun's options that take no value; every other one takes one.
_FLAGS = frozenset({"--standalone", "--no-python", "--no_python", "--run-path", "--run_path", "--virtual-local-rank"})
_OURS = ("--name", "--dir", "--resume", "--preempt-signal", "--preempt-grace")


class Words(msgspec.Struct, frozen=True, kw_only=True):
    """The command line taken apart: our options, torchrun's, the script and its own words."""

    name: str | None = None
    directory: Path | None = None
    resume: str | None = None
    preempt_signal: str | None = None
    preempt_grace: str | None = None
    as_json: bool = False
    torchrun: tuple[str, ...] = ()
    module: bool = False
    script: str
    arguments: tuple[str, ...] = ()


def take_apart(words: tuple[str, ...]) -> Words:
    """Everything before the script that is not ours is torchrun's. Raises click.UsageError."""
    ours: dict[str, str] = {}
    torchrun: list[str] = []
    module = as_json = False
    rest = list(words)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        name, has_value, value = word.partition("=")
        if word == "--":
            break
        if word == "--json":
            as_json = True
        elif word in {"-m", "--module"}:
            module = True
            break  # the next word is the module, whatever it looks like
        elif name in _OURS:
            ours[name] = value if has_value else _value_of(word, rest)
        elif word in _FLAGS or has_value:
            torchrun.append(word)
        else:
            torchrun += [word, _value_of(word, rest)]
    if not rest:
        raise click.UsageError("no script is named, for example: trainctl run --nproc-per-node 2 train.py")
    return Words(
        name=ours.get("--name"),
        directory=Path(ours["--dir"]) if "--dir" in ours else None,
        resume=ours.get("--resume"),
        preempt_signal=ours.get("--preempt-signal"),
        preempt_grace=ours.get("--preempt-grace"),
        as_json=as_json,
        torchrun=tuple(torchrun),
        module=module,
        script=rest[0],
        arguments=tuple(rest[1:]),
    )


def _value_of(option: str, rest: list[str]) -> str:
    if not rest:
        raise click.UsageError(f"{option} needs a value")
    return rest.pop(0)


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[--name NAME] [--dir DIR] [--resume RUN] [--preempt-signal SIG] [--preempt-grace S] "
    "[torchrun's options]",
    epilog="Everything else before SCRIPT goes to torchrun: --nproc-per-node 8, --nnodes 2, --rdzv-endpoint …",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT ARGS… | -m MODULE ARGS…")
def run(words: tuple[str, ...]) -> int:
    """Start a training script under torchrun with an agent on this node.

    --name NAME: what the run is called. --dir DIR: where it is kept. --resume RUN: go on from the last checkpoint of
    a run that ended. --preempt-signal USR1: the scheduler's warning; the ranks save one checkpoint and stop, and this
    ends with 75. --preempt-grace 20s: how long they have after SIGTERM.
    """
    asked = take_apart(words)
    preempting = _preempting(asked)
    launch = _launch(asked)
    click.echo(f"run {launch.run_id} in {launch.directory}", err=True)
    if (why := launch.unwritable()) is not None:
        click.echo(
            f"trainctl: {launch.directory} cannot be written ({why}): nothing is recorded and no checkpoint is saved; "
            "training goes on; give another directory with --dir",
            err=True,
        )
    preemption = Preemption(launch, preempting)
    attempts = Attempts(launch, preemption)
    code = attempts.run()
    preempted = preemption.verdict(code)
    if asked.as_json:
        fields = {"run": launch.name, "id": launch.run_id, "dir": str(launch.directory), "exit_code": code}
        click.echo(dumps(fields | {"preempted": preempted is not None}))
    if preempted is not None:
        click.echo(f"trainctl: {preempted}", err=True)
        click.echo(f"trainctl: go on with it: trainctl run --resume {launch.run_id} …", err=True)
        return REQUEUE_EXIT_CODE
    if code:
        aborted = attempts.request is not None and attempts.request.what == "abort"
        how = f"was aborted by {attempts.request.actor}" if attempts.request and aborted else f"ended with {code}"
        click.echo(f"trainctl: training {how}; {_where_to_look(launch)}", err=True)
        launch.forget_if_empty()
    return 0 if code == 0 else 1


def _where_to_look(launch: Launch) -> str:
    if launch.is_a_run():
        return f"`trainctl log {launch.run_id}` shows what led to it"
    return "it never became a run, so what it printed above is all there is"


def _launch(asked: Words) -> Launch:
    words = [*asked.torchrun, *(["-m"] if asked.module else []), asked.script, *asked.arguments]
    name = asked.name or (asked.script.rpartition(".")[2] if asked.module else Path(asked.script).stem)
    if not asked.module and not Path(asked.script).is_file():
        raise click.UsageError(f"there is no script {asked.script}")
    require_torch()
    check_options(asked.torchrun)
    restarts = restarts_wanted(asked.torchrun)
    if asked.resume is None and (asked.directory is None or read_info(asked.directory) is None):
        return prepare(name, words, directory=asked.directory, named=asked.name is not None, restarts=restarts)
    if asked.resume is not None:
        directory = asyncio.run(_ended_run(asked.resume))
    else:
        assert asked.directory is not None
        directory = _same_again(asked.directory, asked.name, several_nodes=several_nodes(asked.torchrun))
    info = read_info(directory)
    assert info is not None
    return prepare(asked.name or info.run, words, directory=directory, run_id=info.id, resume=True, restarts=restarts)


def _preempting(asked: Words) -> Rules:
    try:
        grace_s = DURATION.convert(asked.preempt_grace, None, None) if asked.preempt_grace is not None else None
        return rules(asked.preempt_signal, grace_s)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _same_again(directory: Path, name: str | None, *, several_nodes: bool) -> Path:
    """The directory of a run that the same command was given for before: one directory is one run.

    With several nodes another one's `trainctl run` may have begun it a moment ago. Raises `ClientError` when it lives
    and there is one node only.
    """
    directory = directory.absolute()
    before = read_info(directory)
    if name is not None and before is not None and before.run != name:
        refuse_another_runs(directory)
    if not several_nodes:
        asyncio.run(_ended_run(str(directory)))
    info = read_info(directory)
    assert info is not None
    why = directory_to_go_on_in(directory) or "the directory is there already"
    click.echo(f"trainctl: {why}: going on with run {info.id}", err=True)
    return directory


async def _ended_run(ref: str) -> Path:
    """The directory of a run that is over. Raises `ClientError`."""
    from trainctl.client.discover import hub_alive, own_keys, probe
    from trainctl.wire.messages import FINAL_STATES

    target = await resolve(ref)
    if target.directory is None:
        raise RunNotFound(f"the directory of {target.label} is not to be seen from here", "give the directory itself")
    if target.card is not None:
        try:
            snapshot = await probe(target.card, own_keys())
        except ClientError as error:
            if hub_alive(target.card):
                raise Rejected(
                    f"{target.label} may well be running: its hub (pid {target.card.pid}) is alive and does not answer",
                    f"`kill -CONT {target.card.pid}` wakes a stopped one; after `kill -9` rank 0 starts another",
                ) from error
            return target.directory
        if snapshot.state.state not in FINAL_STATES:
            raise Rejected(
                f"{target.label} is {snapshot.state.state}: it cannot be resumed while it runs",
                f"stop it first: trainctl stop -r {snapshot.info.id}",
            )
    return target.directory
