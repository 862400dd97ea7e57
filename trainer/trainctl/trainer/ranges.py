"""Which micro-batches each step was made of, so that a bad one can be named and skipped."""

from collections import deque
from typing import TypeAlias

KEPT_STEPS = 10_000

# The absolute indices of the first and last micro-batch, on this rank.
Range: TypeAlias = tuple[int, int]


class DataRanges:
    """Of each recent step, the range of this rank's micro-batches; indices count as `Feed.index` does, from 0."""

    def __init__(self, keep: int = KEPT_STEPS) -> None:
        self._kept: deque[tuple[int, Range]] = deque(maxlen=keep)
        self._first: int | None = None
        self._last = 0
        self.began = 0  # the step behind which this branch's own steps come

    def took(self, index: int) -> None:
        """The loop was handed a micro-batch."""
        if self._first is None:
            self._first = index
        self._last = index

    @property
    def begun(self) -> bool:
        """Whether the loop was handed a micro-batch since the last completed step."""
        return self._first is not None

    def close(self, step: int) -> Range | None:
        """A step was completed: the range that belongs to it, or None when it was made of no batch of ours."""
        if self._first is None:
            return None
        made_of = (self._first, self._last)
        self._first = None
        self._kept.append((step, made_of))
        return made_of

    def of(self, step: int) -> Range | None:
        """The range of a step of this branch, while it is remembered."""
        return next((made_of for number, made_of in reversed(self._kept) if number == step), None)

    def since(self, step: int) -> list[tuple[int, Range]]:
        """Ranges of the steps from `step` on, oldest first; asked by another thread."""
        return [known for known in list(self._kept) if known[0] >= step]

    def newest(self) -> Range | None:
        """The range of the last completed step."""
        try:
            return self._kept[-1][1]
        except IndexError:  # nothing yet; asked by another thread, so not tested before
            return None

    def rewind(self, step: int) -> None:
        """The run went back to `step`: what came after it belongs to another branch."""
        self._first = None
        self.began = step
        while self._kept and self._kept[-1][0] > step:
            self._kept.pop()
