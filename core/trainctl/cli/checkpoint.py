"""`trainctl checkpoint`: save, list, verify, pin, delete, export."""

import asyncio
from pathlib import Path

import click

from trainctl.cli import checkpoint_export as exporting
from trainctl.cli.acting import act, ask_on_a_terminal, opened
from trainctl.cli.checkpoint_list import listed, listing, loss_of
from trainctl.cli.options import Asked, acting_options, run_options
from trainctl.cli.progress import BytesProgress
from trainctl.client.errors import Rejected
from trainctl.client.figures import file_size
from trainctl.client.jsonable import dumps, jsonable
from trainctl.client.model import RunModel
from trainctl.client.session import Session
from trainctl.wire import manifest
from trainctl.wire.commands import CheckpointPin, CheckpointRemove, CheckpointSave, CheckpointUnpin
from trainctl.wire.messages import CheckpointInfo, Checkpoints, Verified


@click.group()
def checkpoint() -> None:
    """Save, list, verify, pin, delete and export checkpoints."""


@checkpoint.command("save")
@click.option("--note", metavar="TEXT", help="What it is kept for.")
@click.option("--pin", is_flag=True, help="Keep it whatever the retention says.")
@acting_options()
def save(asked: Asked, note: str | None, *, pin: bool) -> int:
    """Save a checkpoint at the next boundary."""
    return act(CheckpointSave(note=note, pin=pin), asked)


@checkpoint.command("ls")
@run_options
def ls(run: str | None, server_key: str | None, *, as_json: bool) -> None:
    """List checkpoints, oldest first."""
    found, model = asyncio.run(_checkpoints(run, server_key))
    if as_json:
        fields = {"run": model.name, "checkpoints": [listed(info) for info in found.checkpoints]}
        best_by = jsonable(model.info.best_by) if model.info else None
        click.echo(dumps(fields | {"last": found.last, "best": found.best, "best_by": best_by}))
        return
    if not found.checkpoints:
        click.echo(f"{model.name} has no checkpoint yet", err=True)
        return
    click.echo(listing(found, model))


@checkpoint.command("verify")
@click.argument("targets", nargs=-1, metavar="[ID…]")
@run_options
def verify(run: str | None, server_key: str | None, targets: tuple[str, ...], *, as_json: bool) -> int:
    """Hash the files of checkpoints against their manifests: all, or those named (an id, a step, last, best)."""
    name, outcomes = asyncio.run(_verify(run, server_key, targets, quiet=as_json))
    if as_json:
        rows = [
            {"id": outcome.id, "ok": outcome.ok, "readable": outcome.readable, "text": outcome.text}
            for outcome in outcomes
        ]
        click.echo(dumps({"run": name, "checkpoints": rows}))
    else:
        for outcome in outcomes:
            word = "good   " if outcome.ok else "DAMAGED" if outcome.readable else "UNREAD "
            click.echo(f"{word}  {outcome.id}  {outcome.text}")
        if not outcomes:
            click.echo(f"{name} has no checkpoint yet", err=True)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


@checkpoint.command("pin")
@click.argument("target", metavar="ID")
@acting_options()
def pin(asked: Asked, target: str) -> int:
    """Keep a checkpoint whatever the retention says."""
    return act(CheckpointPin(checkpoint=asyncio.run(_id_of(asked, target))), asked)


@checkpoint.command("unpin")
@click.argument("target", metavar="ID")
@acting_options()
def unpin(asked: Asked, target: str) -> int:
    """Leave a checkpoint to the retention again."""
    return act(CheckpointUnpin(checkpoint=asyncio.run(_id_of(asked, target))), asked)


@checkpoint.command("rm")
@click.argument("target", metavar="ID")
@acting_options()
def rm(asked: Asked, target: str) -> int:
    """Delete a checkpoint for good; never the last good one, nor one that is pinned."""
    ask_on_a_terminal(CheckpointRemove(checkpoint=target), asked)  # before the run is asked which one that is
    info = asyncio.run(_info_of(asked, target))

    async def shown(session: Session) -> str:
        words = f"{session.model.name}: {info.id} of step {info.step}, {file_size(info.bytes)}"
        return f"{words}, {loss_of(info.metrics)}" if loss_of(info.metrics) else words

    return act(CheckpointRemove(checkpoint=info.id), asked, shown)


@checkpoint.command("export")
@click.argument("target", metavar="ID")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--model", type=click.IntRange(0), metavar="I", help="Which model, where the run has several: 0, 1, …")
@click.option("--force", is_flag=True, help="Replace FILE.")
@run_options
def export(
    run: str | None, server_key: str | None, target: str, file: Path, model: int | None, *, force: bool, as_json: bool
) -> None:
    """Write a checkpoint's weights, verified, to FILE as plain safetensors. ID: an id, a step, last, best."""
    exporting.check_target(file, force=force)
    exporting.need_torch()
    name, checkpoint_id, directory = asyncio.run(_whereabouts(run, server_key, target))
    files = exporting.seen_from_here(directory, checkpoint_id, name)
    done = exporting.export(files, file, model=model, force=force)
    if as_json:
        click.echo(dumps(done | {"run": name}))
        return
    click.echo(f"{name}: {done['tensors']} tensors of {checkpoint_id} (step {done['step']}) in {file}")
    if skipped := done["skipped"]:
        assert isinstance(skipped, list)
        click.echo(f"left out, because they are no tensors: {', '.join(skipped)}", err=True)


def picked(found: list[CheckpointInfo], target: str, model: RunModel) -> CheckpointInfo:
    """The checkpoint an operator means. Raises `Rejected` that says which there are."""
    info = manifest.pick(found, target, model.info.best_by if model.info else None)
    if info is not None:
        return info
    listed = ", ".join(f"{info.id} (step {info.step})" for info in found[-5:])
    raise Rejected(
        f"{target!r} is no checkpoint of this run; nothing was done",
        f"there are: {listed}" if listed else "there is none yet: `trainctl checkpoint save` makes one",
    )


async def _checkpoints(run: str | None, server_key: str | None) -> tuple[Checkpoints, RunModel]:
    async with opened(run, server_key) as session:
        return await session.checkpoints(), session.model


async def _info_of(asked: Asked, target: str) -> CheckpointInfo:
    found, model = await _checkpoints(asked.run, asked.server_key)
    return picked(found.checkpoints, target, model)


async def _id_of(asked: Asked, target: str) -> str:
    return (await _info_of(asked, target)).id


async def _whereabouts(run: str | None, server_key: str | None, target: str) -> tuple[str, str, Path | None]:
    """The run's name, the checkpoint's id, and the run's directory as this machine knows it, not as the wire says."""
    from trainctl.client import discover

    found, model = await _checkpoints(run, server_key)
    info = picked(found.checkpoints, target, model)
    if info.where == "memory":
        raise Rejected(f"{info.id} is in the ranks' memory only: there are no files to export; nothing was written")
    return model.name, info.id, (await discover.resolve(run, server_key=server_key)).directory


async def _verify(
    run: str | None, server_key: str | None, targets: tuple[str, ...], *, quiet: bool
) -> tuple[str, list[Verified]]:
    async with opened(run, server_key) as session:
        found = (await session.checkpoints()).checkpoints
        on_disk = [info for info in found if info.where == "disk"]
        chosen = [picked(found, target, session.model) for target in targets] or on_disk
        outcomes = []
        for info in chosen:
            if quiet:
                outcomes.append(await session.verify(info.id))
                continue
            with BytesProgress(f"verifying {info.id}", info.bytes) as progress:
                outcomes.append(await session.verify(info.id, progress))
        return session.model.name, outcomes
