"""What a query found at the ends of a span, remembered: rows keep their numbers and never change.

A rollback ends a branch at one step for good, so that each chart of the run asks for the same edge again. Each costs
a block from disk; a run with hundreds of rollbacks would pay that hundreds of times.
"""

from typing import Final, TypeVar

import numpy as np

from trainctl.store.rollups import BUCKET, Columns

_KEPT: Final = 8
_DRAWN: Final = 2


_K = TypeVar("_K")
_V = TypeVar("_V")


def _used(kept: dict[_K, _V], key: _K) -> _V | None:
    """What is kept under that key, which then is the newest."""
    found = kept.pop(key, None)
    if found is not None:
        kept[key] = found
    return found


class Edges:
    """The newest few of one track: at which row a step stands, and what the rows between two amount to."""

    __slots__ = ("_drawn", "_merged", "_rows")

    def __init__(self, saved: Columns | None = None) -> None:
        # Each in the order of its last use: plain, for most tracks never have anything in them.
        self._rows: dict[tuple[int, bool], int] = {}
        self._merged: dict[tuple[int, int], tuple[float, ...]] = {}
        self._drawn: dict[tuple[int, int, int], list[Columns]] = {}
        if saved is not None:
            places = zip(saved["at"].tolist(), saved["right"].tolist(), saved["row"].tolist(), strict=True)
            self._rows.update({(step, bool(right)): row for step, right, row in places})
            spans = zip(saved["first"].tolist(), saved["end"].tolist(), strict=True)
            merged = zip(*(saved[name].tolist() for name in BUCKET), strict=True)
            self._merged.update(dict(zip(spans, merged, strict=True)))

    def saved(self) -> Columns:
        merged = list(self._merged.values())
        return {
            "at": np.array([step for step, _ in self._rows], "<i8"),
            "right": np.array([right for _, right in self._rows], "<i8"),
            "row": np.array(list(self._rows.values()), "<i8"),
            "first": np.array([first for first, _ in self._merged], "<i8"),
            "end": np.array([end for _, end in self._merged], "<i8"),
        } | {name: np.array([row[at] for row in merged], dtype) for at, (name, dtype) in enumerate(BUCKET.items())}

    def row(self, step: int, *, right: bool) -> int | None:
        """The row before or, for `right`, behind those of that step."""
        return _used(self._rows, (step, right))

    def found(self, step: int, row: int, *, right: bool) -> None:
        self._rows[step, right] = row
        if len(self._rows) > _KEPT:
            del self._rows[next(iter(self._rows))]

    def merged(self, first: int, end: int) -> Columns | None:
        """The bucket of rows `first` to `end`."""
        found = _used(self._merged, (first, end))
        if found is None:
            return None
        return {name: np.array([value], dtype) for (name, dtype), value in zip(BUCKET.items(), found, strict=True)}

    def amounts(self, first: int, end: int, bucket: Columns) -> None:
        self._merged[first, end] = tuple(bucket[name][0].item() for name in BUCKET)
        if len(self._merged) > _KEPT:
            del self._merged[next(iter(self._merged))]

    def drawn(self, first: int, end: int, per_bucket: int) -> list[Columns] | None:
        """Rows `first` to `end` in buckets of so many, if they were drawn like that lately."""
        return _used(self._drawn, (first, end, per_bucket))

    def draws(self, first: int, end: int, per_bucket: int, buckets: list[Columns]) -> None:
        """Remember a few buckets, in this process only."""
        self._drawn[first, end, per_bucket] = buckets
        if len(self._drawn) > _DRAWN:
            del self._drawn[next(iter(self._drawn))]
