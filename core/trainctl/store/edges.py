"""What a query found at the ends of a span, remembered: rows keep their numbers and never change.

A rollback ends a branch at one step for good, so that each chart of the run asks for the same edge again. Each costs
a block from disk; a run with hundreds of rollbacks would pay that hundreds of times.
"""

from collections import OrderedDict
from typing import Final

import numpy as np

from trainctl.store.rollups import BUCKET, Columns

_KEPT: Final = 8
_DRAWN: Final = 2


class Edges:
    """The newest few of one track: at which row a step stands, and what the rows between two amount to."""

    def __init__(self, saved: Columns | None = None) -> None:
        self._rows: OrderedDict[tuple[int, bool], int] = OrderedDict()
        self._merged: OrderedDict[tuple[int, int], tuple[float, ...]] = OrderedDict()
        self._drawn: OrderedDict[tuple[int, int, int], list[Columns]] = OrderedDict()
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
        found = self._rows.get((step, right))
        if found is not None:
            self._rows.move_to_end((step, right))
        return found

    def found(self, step: int, row: int, *, right: bool) -> None:
        self._rows[step, right] = row
        if len(self._rows) > _KEPT:
            self._rows.popitem(last=False)

    def merged(self, first: int, end: int) -> Columns | None:
        """The bucket of rows `first` to `end`."""
        found = self._merged.get((first, end))
        if found is None:
            return None
        self._merged.move_to_end((first, end))
        return {name: np.array([value], dtype) for (name, dtype), value in zip(BUCKET.items(), found, strict=True)}

    def amounts(self, first: int, end: int, bucket: Columns) -> None:
        self._merged[first, end] = tuple(bucket[name][0].item() for name in BUCKET)
        if len(self._merged) > _KEPT:
            self._merged.popitem(last=False)

    def drawn(self, first: int, end: int, per_bucket: int) -> list[Columns] | None:
        """Rows `first` to `end` in buckets of so many, if they were drawn like that lately."""
        found = self._drawn.get((first, end, per_bucket))
        if found is not None:
            self._drawn.move_to_end((first, end, per_bucket))
        return found

    def draws(self, first: int, end: int, per_bucket: int, buckets: list[Columns]) -> None:
        """Remember a few buckets, in this process only."""
        self._drawn[first, end, per_bucket] = buckets
        if len(self._drawn) > _DRAWN:
            self._drawn.popitem(last=False)
