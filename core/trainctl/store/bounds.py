"""The steps of each bucket of a track whose steps went back: which buckets a span takes whole, in part or not at all.

Without it every chart of such a track would have to read every row, for nothing says where a step may be.
"""

import numpy as np
from numpy.typing import NDArray

from trainctl.store.rollups import Columns, Growing


class Bounds:
    """The lowest and the highest step of each complete bucket; the lowest may be told too low, never too high."""

    def __init__(self, saved: Columns | None = None) -> None:
        self._low = Growing("i8", None if saved is None else saved["low"])
        self._high = Growing("i8", None if saved is None else saved["high"])

    @classmethod
    def of_sorted(cls, first_step: int, ends: NDArray[np.generic]) -> "Bounds":
        """Of buckets whose steps never went back: each begins where the one before ended."""
        made = cls()
        made.extend(np.concatenate([[first_step], ends[:-1]])[: len(ends)].astype("i8"), ends.astype("i8"))
        return made

    def extend(self, low: NDArray[np.int64], high: NDArray[np.int64]) -> None:
        self._low.extend(low)
        self._high.extend(high)

    @property
    def size(self) -> int:
        """Of how many buckets; 0 where the two columns differ in that."""
        return self._low.size if self._low.size == self._high.size else 0

    def saved(self) -> Columns:
        return {"low": self._low.view, "high": self._high.view}

    def between(self, from_step: int | None, to_step: int | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """For each bucket whether all of its steps are between the two, and whether some of them may be."""
        low, high = self._low.view.astype("i8", copy=False), self._high.view.astype("i8", copy=False)
        whole, some = np.ones(len(low), bool), np.ones(len(low), bool)
        if from_step is not None:
            whole &= low >= from_step
            some &= high >= from_step
        if to_step is not None:
            whole &= high <= to_step
            some &= low <= to_step
        return whole, some & ~whole


def stretches(chosen: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The (first, end) of neighbours that are all chosen."""
    edges = np.flatnonzero(np.diff(chosen.astype("i1"), prepend=0, append=0))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]
