"""`trainctl audit`: who did what, and whether that record is whole."""

import asyncio
import json
import tempfile
import time
from pathlib import Path

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
    name, lines, directory = asyncio.run(_audit(run, server_key))
    if verifying:
        return _verify(name, lines, directory, as_json=as_json)
    entries = [_entry(line) for line in lines]
    if as_json:
        click.echo(dumps({"run": name, "audit": entries}))
    else:
        for entry in entries:
            click.echo(_text(entry))
        if not entries:
            click.echo(f"{name}: nobody acted on it yet", err=True)
    return 0


def _verify(name: str, lines: list[str], directory: Path | None, *, as_json: bool) -> int:
    from trainctl.store.audit import verify_audit
    from trainctl.wire.manifest import kept_audit_heads
    from trainctl.wire.rundir import RunDir

    if directory is not None and directory.is_dir():
        recorded = RunDir(directory)
        problem = verify_audit(recorded.audit_file, kept_audit_heads(recorded.checkpoints))
    else:
        with tempfile.TemporaryDirectory(prefix="trainctl-") as scratch:
            copy = Path(scratch) / "audit.jsonl"
            copy.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            problem = verify_audit(copy)
    text = None if problem is None else str(problem)
    if as_json:
        click.echo(dumps({"run": name, "ok": problem is None, "lines": len(lines), "problem": text}))
    elif problem is None:
        click.echo(f"{name}: the audit log is whole, {len(lines)} lines")
    else:
        click.echo(f"{name}: the audit log is NOT whole: {text}")
    return 0 if problem is None else 1


def _entry(line: str) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {"unreadable": line}
    return entry if isinstance(entry, dict) else {"unreadable": line}


def _text(entry: dict[str, object]) -> str:
    when = entry.get("time")
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if isinstance(when, int | float) else "?"
    rest = " ".join(
        f"{key}={scalar(value) if isinstance(value, bool | int | float | str) else plain(json.dumps(value))}"
        for key, value in entry.items()
        if key not in {"time", "prev", "hash"} and value is not None
    )
    return f"{clock}  {rest}"


async def _audit(run: str | None, server_key: str | None) -> tuple[str, list[str], Path | None]:
    async with opened(run, server_key) as session:
        info = session.model.info
        return session.model.name, await session.audit(), Path(info.dir) if info and info.dir else None
