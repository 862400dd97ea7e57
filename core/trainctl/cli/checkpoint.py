"""`trainctl checkpoint`: save, list, verify, pin."""

import asyncio
from collections.abc import Mapping

import click

from trainctl.cli.acting import act, opened
from trainctl.cli.options import Asked, acting_options, run_options
from trainctl.cli.table import table
from trainctl.client.errors import Rejected
from trainctl.client.figures import duration, file_size, number
from trainctl.client.jsonable import dumps, jsonable
from trainctl.client.model import RunModel
from trainctl.wire import manifest
from trainctl.wire.commands import CheckpointPin, CheckpointSave, CheckpointUnpin
from trainctl.wire.messages import CheckpointInfo, Checkpoints, Verified


@click.group()
def checkpoint() -> None:
    """Save, list, verify and pin checkpoints."""


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
        click.echo(dumps(fields | {"last": found.last, "best": found.best}))
        return
    if not found.checkpoints:
        click.echo(f"{model.name} has no checkpoint yet", err=True)
        return
    head = ("ID", "STEP", "AGE", "SIZE", "LOSS", "WHERE", "VERIFIED", "PINNED", "NOTE")
    click.echo(table(head, [_row(info, found, model) for info in found.checkpoints]))


def listed(info: CheckpointInfo) -> dict[str, object]:
    """A checkpoint as `ls --json` gives it: `where` is "disk", "memory" or "both"."""
    fields = jsonable(info)
    assert isinstance(fields, dict)
    del fields["in_memory"]
    return fields | {"where": "both" if len(places_of(info)) > 1 else info.where}


def loss_of(metrics: Mapping[str, float]) -> str:
    """The loss that tells most about a checkpoint, with its name: `val_loss 2.113`; empty without one."""
    name = next((name for name in ("val_loss", "loss") if name in metrics), None)
    return "" if name is None else f"{name} {number(metrics[name])}"


def places_of(info: CheckpointInfo) -> list[str]:
    """Where it can be had from: on disk, in the ranks' memory, or both."""
    return [*(["disk"] if info.where == "disk" else []), *(["memory"] if info.in_memory else [])]


def _row(info: CheckpointInfo, found: Checkpoints, model: RunModel) -> tuple[str, ...]:
    marks = [word for word, identity in (("last", found.last), ("best", found.best)) if identity == info.id]
    return (
        info.id,
        str(info.step),
        duration(model.age_of(info.time)),
        file_size(info.bytes),
        loss_of(info.metrics) or "n/a",
        " + ".join(places_of(info)),
        {True: "yes", False: "DAMAGED", None: "not yet"}[info.verified] if info.where == "disk" else "no files",
        "pinned" if info.pinned else "",
        " ".join([*(f"[{mark}]" for mark in marks), info.note or ""]).strip(),
    )


@checkpoint.command("verify")
@click.argument("targets", nargs=-1, metavar="[ID…]")
@run_options
def verify(run: str | None, server_key: str | None, targets: tuple[str, ...], *, as_json: bool) -> int:
    """Hash the files of checkpoints against their manifests: all, or those named (an id, a step, last, best)."""
    name, outcomes = asyncio.run(_verify(run, server_key, targets))
    if as_json:
        rows = [{"id": outcome.id, "ok": outcome.ok, "text": outcome.text} for outcome in outcomes]
        click.echo(dumps({"run": name, "checkpoints": rows}))
    else:
        for outcome in outcomes:
            click.echo(f"{'good   ' if outcome.ok else 'DAMAGED'}  {outcome.id}  {outcome.text}")
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


def picked(found: list[CheckpointInfo], target: str) -> CheckpointInfo:
    """The checkpoint an operator means. Raises `Rejected` that says which there are."""
    info = manifest.pick(found, target)
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


async def _id_of(asked: Asked, target: str) -> str:
    return picked((await _checkpoints(asked.run, asked.server_key))[0].checkpoints, target).id


async def _verify(run: str | None, server_key: str | None, targets: tuple[str, ...]) -> tuple[str, list[Verified]]:
    async with opened(run, server_key) as session:
        found = (await session.checkpoints()).checkpoints
        chosen = [picked(found, target) for target in targets] or found
        outcomes = [await session.verify(info.id) for info in chosen if info.where == "disk"]
        return session.model.name, outcomes
