"""Buckets of consecutive values, and pyramids of them.

A bucket's `min`, `max` and `mean` are over its finite values, `count` is of all its values, `nonfinite` of those that
are NaN or infinite, and `step`, `time` and `last` are of its last value, whatever that is. A bucket without a finite
value has NaN as min, max and mean: it is drawn as NaN and never as a gap. Inside, `sum` stands in for `mean`.
"""

from collections.abc import Iterable
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Columns: TypeAlias = dict[str, NDArray[np.generic]]

# What a bucket is, in this order wherever order counts.
BUCKET: Final = {
    "step": "i8",
    "time": "f8",
    "min": "f8",
    "max": "f8",
    "sum": "f8",
    "last": "f8",
    "count": "i8",
    "nonfinite": "i8",
}


_LEAST: Final = 8  # values that there is room for


class Growing:
    """A numpy column that appends in amortised constant time and gives its front away again.

    It is small where there is little: a run with a thousand metrics and forty branches has 120,000 of them.
    """

    __slots__ = ("_data", "_end", "_start")

    def __init__(self, dtype: str, data: NDArray[np.generic] | None = None) -> None:
        self._data: NDArray[np.generic] = np.empty(0, dtype) if data is None else data
        self._start = 0
        self._end = len(self._data)

    @property
    def size(self) -> int:
        return self._end - self._start

    @property
    def view(self) -> NDArray[np.generic]:
        return self._data[self._start : self._end]

    def extend(self, values: NDArray[np.generic]) -> None:
        if not len(values):
            return
        needed = self._end + len(values)
        wider = values.dtype.itemsize > self._data.dtype.itemsize  # what turned float64 stays exact from here on
        if wider or needed > len(self._data):
            kept = self.view
            grown = np.empty(max(_LEAST, 2 * len(kept) + len(values)), values.dtype if wider else self._data.dtype)
            with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN, and no reason to complain
                grown[: len(kept)] = kept
            self._data, self._start, self._end = grown, 0, len(kept)
            needed = self._end + len(values)
        self._data[self._end : needed] = values
        self._end = needed

    def drop(self, count: int) -> None:
        """Give away the first `count` values."""
        self._start += count
        if 2 * self.size < len(self._data) - _LEAST:
            kept = self.view
            self._data = np.empty(max(_LEAST, len(kept) * 5 // 4), kept.dtype)
            self._data[: len(kept)] = kept
            self._start, self._end = 0, len(kept)


# As levels are kept, for they are what stays in memory: 44 bytes a bucket as long as values are float32, 56 otherwise.
_KEPT: Final = BUCKET | {"min": "f4", "max": "f4", "last": "f4", "count": "i4", "nonfinite": "i4"}


class Level:
    """Complete buckets of `width` values each."""

    __slots__ = ("columns", "width")

    def __init__(self, width: int, columns: Columns | None = None) -> None:
        self.width = width
        self.columns = {
            name: Growing(dtype, None if columns is None else columns[name]) for name, dtype in _KEPT.items()
        }

    @property
    def size(self) -> int:
        return self.columns["step"].size

    def extend(self, buckets: Columns) -> None:
        for name, column in self.columns.items():
            column.extend(_narrowed(buckets[name], _KEPT[name]))

    def slice(self, first: int, last: int) -> Columns:
        return {name: column.view[first:last] for name, column in self.columns.items()}


def _narrowed(column: NDArray[np.generic], dtype: str) -> NDArray[np.generic]:
    """The column in a narrower type where that loses nothing, else as it is."""
    if column.dtype == dtype:
        return column
    with np.errstate(over="ignore", invalid="ignore"):
        narrow: NDArray[np.generic] = column.astype(dtype)
    same = np.array_equal(narrow, column, equal_nan=narrow.dtype.kind == "f")
    return narrow if same else column


def ones(step: NDArray[np.generic], time: NDArray[np.generic], value: NDArray[np.generic]) -> Columns:
    """Values as buckets of one."""
    value = value.astype("f8")
    finite = np.isfinite(value)
    return {
        "step": step,
        "time": time,
        "min": np.where(finite, value, np.nan),
        "max": np.where(finite, value, np.nan),
        "sum": np.where(finite, value, 0.0),
        "last": value,
        "count": np.ones(len(value), "i8"),
        "nonfinite": (~finite).astype("i8"),
    }


def join(parts: Iterable[Columns]) -> Columns:
    listed = list(parts)
    return {name: np.concatenate([part[name] for part in listed]) for name in listed[0]}


def group(buckets: Columns, size: int) -> Columns:
    """Merge `size` neighbouring buckets into one; the last one may be of fewer."""
    count = len(buckets["step"])
    if size <= 1 or count == 0:
        return buckets
    return merge_at(buckets, np.arange(0, count, size))


def group_by_count(buckets: Columns, values: int) -> Columns:
    """Merge neighbouring buckets of any widths into such of about `values` values, one that has more stays alone."""
    if not len(buckets["step"]):
        return buckets
    number = (np.cumsum(buckets["count"].astype("i8")) - 1) // values
    return merge_at(buckets, np.concatenate([[0], np.flatnonzero(np.diff(number)) + 1]))


def merge_at(buckets: Columns, starts: NDArray[np.int64]) -> Columns:
    """Merge buckets into one from each of `starts` on up to the next."""
    ends = np.append(starts[1:], len(buckets["step"])) - 1
    with np.errstate(over="ignore", invalid="ignore"):  # values near the largest double: their mean is no number
        total = np.add.reduceat(buckets["sum"], starts)
    # fmin and fmax pass NaN over unless there is nothing else
    return {
        "step": buckets["step"][ends],
        "time": buckets["time"][ends],
        "min": np.fmin.reduceat(buckets["min"], starts),
        "max": np.fmax.reduceat(buckets["max"], starts),
        "sum": total,
        "last": buckets["last"][ends],
        "count": np.add.reduceat(buckets["count"], starts, dtype="i8"),
        "nonfinite": np.add.reduceat(buckets["nonfinite"], starts, dtype="i8"),
    }
