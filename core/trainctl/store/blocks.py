"""Packed rows, read: metric by metric, as they are asked for."""

import numpy as np
from numpy.typing import NDArray

from trainctl.store.numbers import inflate, unpack_integers, unpack_times, unshuffle
from trainctl.store.packed import PackedRows


class Block:
    """One block; a metric is unpacked when it is asked for, steps and times once."""

    def __init__(self, packed: PackedRows) -> None:
        self.packed = packed
        self._originals = [column for column in packed.columns if column.like is None]
        self._columns = {column.name: column for column in packed.columns}
        self._steps: NDArray[np.int64] | None = None
        self._times: NDArray[np.float64] | None = None

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    @property
    def seqs(self) -> NDArray[np.int64]:
        """The numbers of the joined envelopes."""
        return unpack_integers(self.packed.seqs, self.packed.count)

    @property
    def links(self) -> NDArray[np.int64]:
        """What rank 0 numbered them with, 0 where it did not."""
        return unpack_integers(self.packed.links, self.packed.count)

    @property
    def widths(self) -> NDArray[np.int64]:
        """How many rows each of the joined envelopes had."""
        return unpack_integers(self.packed.envelopes, self.packed.count)

    @property
    def steps(self) -> NDArray[np.int64]:
        if self._steps is None:
            self._steps = unpack_integers(self.packed.steps, self.packed.count)
        return self._steps

    @property
    def times(self) -> NDArray[np.float64]:
        if self._times is None:
            self._times = unpack_times(self.packed.times, self.packed.count)
        return self._times

    def kinds(self) -> list[tuple[str, ...]]:
        """Which metrics each of the joined envelopes had."""
        widths = self.widths
        partial = {name: rows for name in self._columns if (rows := self.rows(name)) is not None}
        everywhere = tuple(name for name in self._columns if name not in partial)
        found: list[tuple[str, ...]] = [everywhere] * len(widths)
        owner = np.repeat(np.arange(len(widths)), widths)
        for name, rows in partial.items():
            for at in np.unique(owner[rows]).tolist():
                found[at] = (*found[at], name)
        return found

    def rows(self, name: str) -> NDArray[np.int64] | None:
        """Which rows of the block have a value of that metric, or None: all have."""
        column = self._columns[name]
        if column.like is not None:
            column = self._originals[column.like]
        return unpack_integers(column.rows, self.packed.count) if column.rows else None

    def metric(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.generic]]:
        """(steps, times, values) of one metric. Raises one of `UNUSABLE` for bytes that nobody packed like this."""
        steps, times = self.steps, self.times
        column = self._columns[name]
        if column.like is not None:
            column = self._originals[column.like]
        dtype = np.dtype(f"<{column.dtype}")
        values = (
            unshuffle(inflate(column.data, self.packed.count * dtype.itemsize), dtype)
            if column.deflated
            else np.frombuffer(column.data, dtype)
        )
        if column.rows:
            rows = unpack_integers(column.rows, self.packed.count)
            steps, times = steps[rows], times[rows]
        if not len(steps) == len(times) == len(values):
            raise ValueError(f"{len(values)} values of {column.name} at {len(steps)} steps and {len(times)} times")
        return steps, times, values
