"""Where in the metrics each hub began to number, for those who keep a number of their own beside the record.

A hub goes on with the numbers where its journal ends. Where the journal lost its end with the power, or was deleted,
the same numbers come again and mean something else; the epoch tells one from the other.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EpochBegin:
    """The first number of an epoch, and what was recorded before it: the newest incarnation and its highest step."""

    epoch: int
    seq: int
    incarnation: int
    step: int


class EpochBegins:
    """The metrics' epochs, oldest first: one for each hub that recorded any."""

    def __init__(self) -> None:
        self._epoch = 0
        self._reached = (0, 0)
        self._begins: list[EpochBegin] = []

    def __iter__(self) -> Iterator[EpochBegin]:
        return iter(self._begins)

    @property
    def epoch(self) -> int:
        """The newest."""
        return self._epoch

    def note(self, epoch: int, seq: int, incarnation: int, step: int) -> None:
        """Rows came: their epoch, the number of the first, their incarnation and highest step."""
        if epoch > self._epoch:
            self._begins.append(self.next(epoch, seq))
            self._epoch = epoch
        self._reached = max(self._reached, (incarnation, step))

    def next(self, epoch: int, seq: int) -> EpochBegin:
        """What an epoch that begins now begins with."""
        incarnation, step = self._reached
        return EpochBegin(epoch=epoch, seq=seq, incarnation=incarnation, step=step)

    def saved(self) -> tuple[tuple[int, int, int, int], ...]:
        return tuple((begin.epoch, begin.seq, begin.incarnation, begin.step) for begin in self._begins)

    def restore(
        self, saved: Iterable[tuple[int, int, int, int]], epoch: int, reached: Iterable[tuple[int, int]]
    ) -> None:
        """Be, while empty, what was saved; `reached` are the incarnations that there are, with a step of each."""
        self._begins = [EpochBegin(epoch=at, seq=seq, incarnation=of, step=step) for at, seq, of, step in saved]
        self._epoch = epoch
        self._reached = max(reached, default=(0, 0))
