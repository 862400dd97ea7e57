"""What `trainctl checkpoint ls` says: as JSON, and as text, one line each, what a rollback left behind shown dim."""

import os
import sys
from collections.abc import Mapping

import click

from trainctl.cli.table import table
from trainctl.client.figures import duration, file_size, number
from trainctl.client.jsonable import jsonable
from trainctl.client.model import RunModel
from trainctl.wire.messages import BestBy, CheckpointInfo, Checkpoints

_HEAD = ("ID", "STEP", "AGE", "SIZE", "METRICS", "BRANCH", "WHERE", "VERIFIED", "PINNED", "NOTE")
_SHOWN = 2


def listed(info: CheckpointInfo) -> dict[str, object]:
    """A checkpoint as `ls --json` gives it: `where` is "disk", "memory" or "both"."""
    fields = jsonable(info)
    assert isinstance(fields, dict)
    del fields["in_memory"]
    return fields | {"where": "both" if len(places_of(info)) > 1 else info.where}


def places_of(info: CheckpointInfo) -> list[str]:
    """Where it can be had from: on disk, in the ranks' memory, or both."""
    return [*(["disk"] if info.where == "disk" else []), *(["memory"] if info.in_memory else [])]


def loss_of(metrics: Mapping[str, float]) -> str:
    """The loss that tells most about a checkpoint, with its name: `val_loss 2.113`; empty without one."""
    name = next((name for name in ("val_loss", "loss") if name in metrics), None)
    return "" if name is None else f"{name} {number(metrics[name])}"


def metrics_of(metrics: Mapping[str, float], best_by: BestBy | None = None) -> str:
    """The metrics that tell most: the one by which the best is found, and the losses; `--json` has all."""
    first = [best_by.metric] if best_by is not None and best_by.metric is not None else []
    names = [name for name in dict.fromkeys([*first, "val_loss", "loss"]) if name in metrics]
    return ", ".join(f"{name} {number(metrics[name])}" for name in names[:_SHOWN])


def listing(found: Checkpoints, model: RunModel) -> str:
    """The table, with the lines of abandoned branches dim where the terminal has that."""
    head, *lines = table(_HEAD, [_row(info, found, model) for info in found.checkpoints]).splitlines()
    dim = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    shown = [
        click.style(line, dim=True) if dim and info.abandoned else line
        for info, line in zip(found.checkpoints, lines, strict=True)
    ]
    return "\n".join([head, *shown])


def _row(info: CheckpointInfo, found: Checkpoints, model: RunModel) -> tuple[str, ...]:
    marks = [word for word, identity in (("last", found.last), ("best", found.best)) if identity == info.id]
    return (
        info.id,
        str(info.step),
        duration(model.age_of(info.time)),
        file_size(info.bytes),
        metrics_of(info.metrics, model.info.best_by if model.info else None) or "n/a",
        f"{info.incarnation} left behind" if info.abandoned else str(info.incarnation),
        " + ".join(places_of(info)),
        {True: "yes", False: "DAMAGED", None: "not yet"}[info.verified] if info.where == "disk" else "no files",
        "pinned" if info.pinned else "",
        " ".join([*(f"[{mark}]" for mark in marks), info.note or ""]).strip(),
    )
