"""Carry out one command from the command line: ask first, send, wait for the outcome, say it, exit with its code."""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from types import FrameType

import click

from trainctl.cli.options import Asked
from trainctl.client.commanding import make_command
from trainctl.client.errors import BadRequest, ClientError
from trainctl.client.jsonable import dumps
from trainctl.client.lines import command_text
from trainctl.client.session import Session, open_session
from trainctl.wire.commands import FINAL_COMMAND_STATES, Action, spec_of
from trainctl.wire.messages import CommandUpdate

EXIT_CODES = {"applied": 0, "failed": 1, "rejected": 4, "conflict": 4, "superseded": 4, "expired": 5, "unknown": 6}

Plan = Callable[[Session], Awaitable[str]]


@contextlib.asynccontextmanager
async def opened(run: str | None, server_key: str | None) -> AsyncGenerator[Session, None]:
    """A session that has its first picture, and is closed afterwards. Raises `ClientError`."""
    session = await open_session(run, server_key=server_key)
    try:
        await session.picture()
        yield session
        for problem in session.problems:
            click.echo(f"trainctl: {problem}", err=True)
    finally:
        await session.close()


def act(action: Action, asked: Asked, plan: Plan | None = None) -> int:
    """Do it and return the exit code. `plan` says what will happen, for commands that ask first."""
    command = make_command(
        action,
        condition=asked.condition,
        expires_s=asked.expires_s,
        revert_after=asked.revert_after,
        unless=asked.unless,
        command_id=asked.command_id,
    )
    asks = ask_on_a_terminal(action, asked)
    try:
        return asyncio.run(_act(action, asked, command.id, plan, asks=asks))
    except KeyboardInterrupt:
        _detached(command.id)
        return EXIT_CODES["unknown"]


def ask_on_a_terminal(action: Action, asked: Asked) -> bool:
    """Whether to ask first. Raises `BadRequest` where that cannot be done."""
    asks = spec_of(action).asks_first and not asked.yes
    if asks and not sys.stdin.isatty():
        raise BadRequest(
            f"`{spec_of(action).name}` asks first, and there is no terminal to ask on; nothing was done",
            "add --yes to do it without being asked",
        )
    return asks


def _detached(command_id: str) -> None:
    click.echo(f"detached: command {command_id} goes on without us; `trainctl audit` shows its outcome", err=True)


@contextlib.contextmanager
def _detaching(command_id: str) -> Iterator[None]:
    """From here on Ctrl-C leaves at once: whatever the network does, nothing in here is worth an operator's wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(_number: int, _frame: FrameType | None) -> None:
        _detached(command_id)
        sys.stdout.flush()
        os._exit(EXIT_CODES["unknown"])

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


async def _act(action: Action, asked: Asked, command_id: str, plan: Plan | None, *, asks: bool) -> int:
    async with opened(asked.run, asked.server_key) as session:
        name = session.model.name
        if plan is not None:
            text = await plan(session)  # also where the command cannot be meant, so before asking
            if asks:
                click.echo(text, err=True)
        if asks:
            question = f"{spec_of(action).name} {name}: {spec_of(action).summary}?"
            if not await asyncio.to_thread(click.confirm, question, default=False, err=True):
                raise BadRequest("not confirmed; nothing was done")
        last: CommandUpdate | None = None
        updates = session.do(
            action,
            condition=asked.condition,
            expires_s=asked.expires_s,
            revert_after=asked.revert_after,
            unless=asked.unless,
            command_id=command_id,
            timeout_s=asked.timeout_s,
        )
        with _detaching(command_id):
            async with contextlib.aclosing(updates):
                async for last in updates:
                    if last.state not in FINAL_COMMAND_STATES and not asked.as_json:
                        click.echo(f"{name}: {command_text(last)} (id {last.id})", err=True)
        if last is None:
            raise ClientError(f"{name} did not say what became of command {command_id}", "look at `trainctl audit`")
        click.echo(dumps(command_json(last, name)) if asked.as_json else f"{name}: {command_text(last)}")
        return EXIT_CODES[last.state]


def command_json(update: CommandUpdate, run: str) -> dict[str, object]:
    """The answer of an acting command, as docs/cli.md promises it."""
    return {
        "id": update.id,
        "command": update.command,
        "run": run,
        "state": update.state,
        "step": update.step,
        "incarnation": update.incarnation,
        "before": update.before,
        "after": update.after,
        "ranks": update.ranks,
        "reason": update.reason,
        "actor": update.actor,
        "args": update.args,
    }
