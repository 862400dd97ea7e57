"""`trainctl audit`: who did what, and whether that record is whole."""

import asyncio
import json
import time

import click

from trainctl.cli.acting import opened
from trainctl.cli.options import run_options
from trainctl.client.figures import plain, scalar
from trainctl.client.jsonable import dumps


@click.command()
@click.option("--verify", "verifying", is_flag=True, help="Check the chain of hashes; 1 when it is broken.")
@run_options
def audit(run: str | None, server_key: str | None, *, verifying: bool, as_json: bool) -> int:
    """Who did what: every command with its outcome."""
    if verifying:
        return _verify(*asyncio.run(_verified(run, server_key)), as_json=as_json)
    name, lines = asyncio.run(_audit(run, server_key))
    entries = [_entry(line) for line in lines]
    if as_json:
        click.echo(dumps({"run": name, "audit": entries}))
    else:
        for entry in entries:
            click.echo(_text(entry))
        if not entries:
            click.echo(f"{name}: nobody acted on it yet", err=True)
    return 0


def _verify(name: str, lines: int, problem: str | None, *, as_json: bool) -> int:
    if as_json:
        click.echo(dumps({"run": name, "ok": problem is None, "lines": lines, "problem": problem}))
    elif problem is None:
        click.echo(f"{name}: the audit log is whole, {lines} lines")
    else:
        click.echo(f"{name}: the audit log is NOT whole: {problem}")
    return 0 if problem is None else 1


def _entry(line: str) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {"unreadable": line}
    return entry if isinstance(entry, dict) else {"unreadable": line}


def _text(entry: dict[str, object]) -> str:
    rest = " ".join(
        f"{key}={_clock(value) if key == 'since' else _value(value)}"
        for key, value in entry.items()
        if key not in {"time", "prev", "hash"} and value not in (None, "")
    )
    return f"{_clock(entry.get('time'))}  {rest}"


def _value(value: object) -> str:
    return scalar(value) if isinstance(value, bool | int | float | str) else plain(json.dumps(value))


def _clock(when: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if isinstance(when, int | float) else "?"


async def _audit(run: str | None, server_key: str | None) -> tuple[str, list[str]]:
    async with opened(run, server_key) as session:
        return session.model.name, await session.audit()


async def _verified(run: str | None, server_key: str | None) -> tuple[str, int, str | None]:
    async with opened(run, server_key) as session:
        return session.model.name, *await session.verify_audit()
