"""What a sink is, and what it is told."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from trainctl.wire.messages import Body, Rows, RunState, Snapshot, Stream

log = logging.getLogger(__name__)


class Unusable(Exception):
    """Trying again would not help: the message tells the user what to change."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is true when a sink opens. `notes` is what it wrote down the last time, in this run's directory.

    `tell` makes an event of what an operator should know, in words that go on after "sink NAME".
    """

    picture: Snapshot
    directory: Path
    notes: dict[str, str] = field(default_factory=dict)
    tell: Callable[[str], None] = log.warning


@dataclass(frozen=True, kw_only=True)
class Branching:
    """The history goes on from here: what was written for `from_step` and after it is void.

    `restored` is what belongs there in its place, where an operator went back to a branch that had been left behind.
    """

    from_step: int
    time: float
    restored: Iterable[Rows] = ()


class Sink(Protocol):
    """One copy of the history. All methods are called by one thread and may block and raise as they like.

    An error ends this object: after a while another one is made, and goes on after what was last flushed.
    """

    streams: ClassVar[frozenset[Stream]]
    history: ClassVar[bool]  # whether it wants every value, or only the newest

    def open(self, start: Start) -> dict[str, str]:
        """Begin; return notes for the next opening. Raises `Unusable` where that is for good.

        They are kept at once, and what is added to them later is kept with the next thing that is flushed.
        """

    def branch(self, branching: Branching) -> None:
        """A rollback or restart began a new incarnation, or what was not flushed is written anew."""

    def write(self, body: Body) -> None:
        """Take what was recorded next."""

    def flush(self) -> None:
        """Everything written is safe when this returns."""

    def close(self, state: RunState) -> None:
        """The hub leaves; `state` is the run's last."""
