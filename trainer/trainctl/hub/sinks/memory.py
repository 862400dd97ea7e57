"""How far a sink got: `sinks/NAME.json` in the run's directory, so that the next hub goes on from there."""

from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import field

from trainctl.store.epochs import EpochBegin
from trainctl.wire.messages import Message
from trainctl.wire.rundir import write_atomic


class Progress(Message, frozen=True, kw_only=True):
    """Everything up to `seq` of the metrics is written and flushed; it ended in `incarnation`, whose highest step was
    `step`. A sink may have got further before it died: what follows `seq` is written again, so every value arrives
    at least once.

    `epoch`: the number counts in the history as it was known when this was the newest epoch of the metrics.
    """

    epoch: int = 0
    seq: int = 0
    incarnation: int = 0
    step: int = 0
    notes: dict[str, str] = field(default_factory=dict)


def confirmed(progress: Progress, begins: Iterable[EpochBegin], epoch: int) -> Progress:
    """As far as the history still is what it was then, which is known until `epoch`.

    Where a later epoch begins at or before `seq`, the journal had lost what was written from there on. Where nothing is
    left, the steps that the sink has are still its own.
    """
    then = progress.epoch or epoch  # a version before this one wrote none
    again = [begin for begin in begins if begin.epoch > then and begin.seq <= progress.seq]
    if not again:
        return msgspec.structs.replace(progress, epoch=epoch)
    first = min(again, key=lambda begin: begin.seq)
    if not first.incarnation:
        return msgspec.structs.replace(progress, epoch=epoch, seq=0)
    return msgspec.structs.replace(
        progress, epoch=epoch, seq=first.seq - 1, incarnation=first.incarnation, step=first.step
    )


def read_progress(file: Path) -> Progress:
    """The newest progress; that of a sink which has not begun where there is none that can be read."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Progress)
    except (OSError, msgspec.MsgspecError):
        return Progress()


def write_progress(file: Path, progress: Progress) -> None:
    """Raises OSError."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(file, msgspec.json.encode(progress))
