"""How far a sink got: `sinks/NAME.json` in the run's directory, so that the next hub goes on from there."""

from pathlib import Path

import msgspec
from msgspec import field

from trainctl.wire.messages import Message
from trainctl.wire.rundir import write_atomic


class Progress(Message, frozen=True, kw_only=True):
    """Everything up to `seq` of the metrics is written and flushed; it ended in `incarnation`, whose highest step was
    `step`. A sink may have got further before it died: what follows `seq` is written again, so every value arrives
    at least once."""

    seq: int = 0
    incarnation: int = 0
    step: int = 0
    notes: dict[str, str] = field(default_factory=dict)


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
