"""What a command meets when its turn comes: the run may be writing a checkpoint, rolling back, or paused. One table.

`docs/commands.md` prints it, `tests/trainer/test_meets.py` holds what ranks do against it, cell by cell.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from trainctl.wire.commands import (
    Abort,
    Act,
    AddNote,
    Cancel,
    CheckpointPin,
    CheckpointRemove,
    CheckpointSave,
    CheckpointUnpin,
    Evaluate,
    LrRelease,
    LrScale,
    LrSet,
    Pause,
    Restart,
    Resume,
    Rollback,
    SetTunable,
    Stop,
)

Met: TypeAlias = Literal[
    "at its boundary",
    "at its boundary, written after that one",
    "waits for the one under way",
    "behind the rollback",
    "at once, at the step that is held",
    "rejected: it is paused already",
    "rejected: it is not paused",
    "at once, through the agents",
    "at once, by the hub",
    "at once, by the hub, unless something may need it",
]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Commands that fare alike: while a checkpoint is written, while a rollback loads, while the run is paused."""

    name: str
    commands: tuple[type[Act], ...]
    saving: Met
    rolling_back: Met
    paused: Met


def _of_ranks(name: str, *commands: type[Act], saving: Met = "at its boundary", paused: Met | None = None) -> Row:
    held = paused or "at once, at the step that is held"
    return Row(name=name, commands=commands, saving=saving, rolling_back="behind the rollback", paused=held)


def _elsewhere(name: str, *commands: type[Act], met: Met) -> Row:
    return Row(name=name, commands=commands, saving=met, rolling_back=met, paused=met)


ROWS = (
    _of_ranks("pause", Pause, paused="rejected: it is paused already"),
    _of_ranks("resume", Resume, saving="rejected: it is not paused"),
    _of_ranks("lr …, set NAME", LrScale, LrSet, LrRelease, SetTunable),
    _of_ranks("checkpoint save", CheckpointSave, saving="at its boundary, written after that one"),
    _of_ranks("rollback", Rollback, saving="waits for the one under way"),
    _of_ranks("eval", Evaluate),
    _of_ranks("stop", Stop, saving="waits for the one under way"),
    _of_ranks("abort", Abort),
    _elsewhere("`abort --now`, restart", Restart, met="at once, through the agents"),
    _elsewhere("note, cancel", AddNote, Cancel, met="at once, by the hub"),
    _elsewhere("checkpoint pin, unpin", CheckpointPin, CheckpointUnpin, met="at once, by the hub"),
    _elsewhere("checkpoint rm", CheckpointRemove, met="at once, by the hub, unless something may need it"),
)


def table() -> list[str]:
    """The rows as the documentation prints them."""
    head = "| the command | while a checkpoint is written | while a rollback loads | while paused |"
    rows = [f"| {row.name} | {row.saving} | {row.rolling_back} | {row.paused} |" for row in ROWS]
    return [head, "|---|---|---|---|", *rows]
