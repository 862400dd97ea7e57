"""One metric in one incarnation: a sealed part that is on disk, a hot part in memory, and a pyramid over both.

Only buckets of 256 values and more are kept, a quarter of a byte for each value. What is finer is made from the values
themselves when somebody asks: for the hot part at hand, for the sealed part from the packed segments.
"""

import math
import zlib
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from trainctl.store.blocks import Block
from trainctl.store.frames import read_packed
from trainctl.store.packing import PackedRows, decode_packed
from trainctl.store.rollups import Columns, Growing, Level, group, join, ones

BASE: Final = 256
FAN: Final = 4
_CACHED_BYTES = 48 * 1024 * 1024
# A level that is a little too coarse is taken rather than values read: a fifth fewer buckets than were asked for.
_COARSER: Final = 1.25


class BlockReader:
    """Reads packed rows at their places in a journal, and keeps those that were read last."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._blocks: OrderedDict[tuple[int, int], Block | None] = OrderedDict()
        self._columns: OrderedDict[tuple[int, int, str], Columns] = OrderedDict()
        self._bytes = 0
        self.unreadable: set[tuple[int, int]] = set()

    def metric(self, segment: int, offset: int, name: str) -> Columns | None:
        """`step`, `time` and `value` of one metric in one block, or None where it decayed."""
        key = (segment, offset, name)
        found = self._columns.get(key)
        if found is not None:
            self._columns.move_to_end(key)
            return found
        block = self._block(segment, offset)
        if block is None:
            return None
        try:
            steps, times, values = block.metric(name)
        except (KeyError, ValueError, zlib.error):
            self.unreadable.add((segment, offset))
            return None
        found = {"step": steps, "time": times, "value": values}
        self._columns[key] = found
        self._bytes += sum(column.nbytes for column in found.values())
        while self._bytes > _CACHED_BYTES:
            _, oldest = self._columns.popitem(last=False)
            self._bytes -= sum(column.nbytes for column in oldest.values())
        return found

    def _block(self, segment: int, offset: int) -> Block | None:
        place = (segment, offset)
        if place in self._blocks:
            self._blocks.move_to_end(place)
            return self._blocks[place]
        payload = read_packed(self._directory, segment, offset) if self._directory is not None else None
        block = None
        if payload is not None:
            try:
                packed = decode_packed(payload)
                block = Block(packed) if isinstance(packed, PackedRows) else None
            except msgspec.MsgspecError:
                block = None
        if block is None:
            self.unreadable.add(place)
        self._blocks[place] = block
        if len(self._blocks) > 64:
            self._blocks.popitem(last=False)
        return block


class Chunks:
    """Where the values of a track are that are not hot: parallel columns, one entry a block.

    A place is (segment, offset), or (0, n) for the n-th of those `kept` in memory because no block holds just them.
    """

    def __init__(self, saved: Columns | None = None, kept: list[Columns] | None = None) -> None:
        self.starts: list[int] = saved["start"].tolist() if saved is not None else []
        self.places: list[tuple[int, int]] = (
            list(zip(saved["segment"].tolist(), saved["offset"].tolist(), strict=True)) if saved is not None else []
        )
        self.size = int(saved["size"][0]) if saved is not None else 0
        self.kept: list[Columns] = kept or []

    def append(self, count: int, segment: int, offset: int) -> None:
        self.starts.append(self.size)
        self.places.append((segment, offset))
        self.size += count

    def keep(self, columns: Columns) -> None:
        self.kept.append({name: column.copy() for name, column in columns.items()})
        self.append(len(columns["step"]), 0, len(self.kept) - 1)

    def saved(self) -> Columns:
        return {
            "start": np.array(self.starts, "<i8"),
            "segment": np.array([segment for segment, _ in self.places], "<i8"),
            "offset": np.array([offset for _, offset in self.places], "<i8"),
            "size": np.array([self.size], "<i8"),
        }


class Track:
    """Values in the order in which they came; row numbers count from 0 over the sealed and the hot part, which may
    overlap a little."""

    def __init__(self, name: str, reader: BlockReader) -> None:
        self.name = name
        self.sorted = True
        self.chunks = Chunks()
        self.levels: list[Level] = []
        self.hot = {"step": Growing("i8"), "time": Growing("f8"), "value": Growing("f4")}
        self.hot_start = 0  # row number of the first hot value
        self._reader = reader
        self._last_step: int | None = None

    @property
    def size(self) -> int:
        return self.hot_start + self.hot["step"].size

    @property
    def in_memory(self) -> int:
        return self.hot["step"].size + sum(len(kept["step"]) for kept in self.chunks.kept)

    def restore(
        self,
        *,
        is_sorted: bool,
        last_step: int,
        chunks: Chunks,
        levels: list[Level],
        hot_start: int,
        hot: Columns,
    ) -> None:
        """Be again what was saved."""
        self.sorted, self.chunks, self.levels, self._last_step = is_sorted, chunks, levels, last_step
        self.hot_start = hot_start
        self.hot = {name: Growing(column.dtype.str, column) for name, column in hot.items()}

    @property
    def last_step(self) -> int:
        return self._last_step if self._last_step is not None else 0

    def add(self, steps: NDArray[np.int64], times: NDArray[np.float64], values: NDArray[np.generic]) -> None:
        if not len(steps):
            return
        if self.sorted:
            before = int(steps[0]) if self._last_step is None else self._last_step
            self.sorted = bool(steps[0] >= before and np.all(steps[1:] >= steps[:-1]))
        self._last_step = int(steps[-1])
        for name, column in zip(("step", "time", "value"), (steps, times, values), strict=True):
            self.hot[name].extend(column)
        self._build()

    def seal(self, count: int, segment: int, offset: int) -> None:
        """The next `count` values after those that were sealed are in that block from now on."""
        self.chunks.append(count, segment, offset)
        self._cool()

    def keep(self, count: int) -> None:
        """The next `count` values stay in memory for good: no block holds just them."""
        self.chunks.keep(self.rows(self.chunks.size, self.chunks.size + count))
        self._cool()

    def _cool(self) -> None:
        # The rows of an incomplete bucket stay at hand until it is complete.
        built = self.levels[0].size * BASE if self.levels else 0
        kept_from = min(self.chunks.size, built)
        for column in self.hot.values():
            column.drop(kept_from - self.hot_start)
        self.hot_start = kept_from

    def _build(self) -> None:
        """Complete what can be completed, each level from the one below."""
        at = 0
        while True:
            width = BASE * FAN**at
            if at == len(self.levels):
                if self.size < width:
                    return
                self.levels.append(Level(width))
            target = self.levels[at]
            have, complete = target.size, self.size // width
            if complete == have:
                return  # a level above cannot have grown either
            if at == 0:
                target.extend(group(self.ones(have * width, complete * width), BASE))
            else:
                target.extend(group(self.levels[at - 1].slice(have * FAN, complete * FAN), FAN))
            at += 1

    # --- reading

    def rows(self, first: int, last: int) -> Columns:
        """`step`, `time`, `value` of rows `first` to `last`, exclusive. Rows that decayed on disk are left out."""
        parts: list[Columns] = []
        sealed = self.hot_start
        at = bisect_right(self.chunks.starts, first) - 1 if first < sealed else len(self.chunks.starts)
        while at < len(self.chunks.starts) and self.chunks.starts[at] < (end := min(last, sealed)):
            start = self.chunks.starts[at]
            segment, offset = self.chunks.places[at]
            kept = self.chunks.kept[offset] if segment == 0 else None
            found = kept or self._reader.metric(segment, offset, self.name)
            if found is not None:
                parts.append({name: column[max(0, first - start) : end - start] for name, column in found.items()})
            at += 1
        if last > sealed:
            low, high = max(0, first - sealed), last - sealed
            parts.append({name: column.view[low:high] for name, column in self.hot.items()})
        if len(parts) == 1:
            return parts[0]
        return join(parts) if parts else {name: column.view[:0] for name, column in self.hot.items()}

    def ones(self, first: int, last: int) -> Columns:
        """Rows as buckets of one."""
        found = self.rows(first, last)
        return ones(found["step"], found["time"], found["value"])

    def span(self, from_step: int | None, to_step: int | None) -> tuple[int, int]:
        """Rows of a sorted track between two steps, both included."""
        first = 0 if from_step is None else self._search(from_step, "left")
        last = self.size if to_step is None else self._search(to_step, "right")
        return first, max(first, last)

    def _search(self, step: int, side: str) -> int:
        """Where `step` would be put among the steps: the bucket first, then the rows within it."""
        low, high = 0, self.size
        if self.levels:
            ends = self.levels[0].columns["step"].view
            bucket = int(np.searchsorted(ends, step, side))  # type: ignore[call-overload]
            low, high = bucket * BASE, min((bucket + 1) * BASE, self.size)
            if bucket == len(ends):
                high = self.size
        steps = self.rows(low, high)["step"]
        if len(steps) < high - low:
            return low if side == "left" else high  # some decayed: too many rows rather than too few
        return low + int(np.searchsorted(steps, step, side))  # type: ignore[call-overload]

    def values(self, from_step: int | None, to_step: int | None) -> Columns:
        first, last = self.span(from_step, to_step) if self.sorted else (0, self.size)
        rows = self.rows(first, last)
        if not self.sorted or len(rows["step"]) < last - first:
            rows = self._between(from_step, to_step, rows)
        return rows | {"value": rows["value"].astype("f8")}

    def _between(self, from_step: int | None, to_step: int | None, found: Columns) -> Columns:
        """The rows between two steps where steps went back or rows decayed: every row is looked at."""
        steps = found["step"].astype("i8")
        mask = np.ones(len(steps), bool)
        if from_step is not None:
            mask &= steps >= from_step
        if to_step is not None:
            mask &= steps <= to_step
        return {name: column[mask] for name, column in found.items()}

    def count_between(self, from_step: int | None, to_step: int | None) -> int:
        if self.sorted:
            first, last = self.span(from_step, to_step)
            return last - first
        return len(self._between(from_step, to_step, self.rows(0, self.size))["step"])

    def buckets(self, from_step: int | None, to_step: int | None, points: int) -> Columns:
        """About `points` buckets (never more than `points` + 2) of the values between two steps."""
        first, last = self.span(from_step, to_step) if self.sorted else (0, self.size)
        if not self.sorted or self._decayed_at_edges(first, last):
            found = self._between(from_step, to_step, self.rows(first, last))
            order = np.argsort(found["step"], kind="stable")
            singles = ones(found["step"][order], found["time"][order], found["value"][order])
            return group(singles, max(1, math.ceil(len(order) / points)))
        per_bucket = math.ceil((last - first) / points) if last > first else 1
        fitting = sum(level.width <= per_bucket * _COARSER for level in self.levels)
        if not fitting:
            return group(self.ones(first, last), per_bucket)
        level = self.levels[fitting - 1]
        low, high = -(-first // level.width), min(last // level.width, level.size)
        if low >= high:
            return self._merged(first, last, fitting - 1, None)  # less than two buckets of the level
        parts = [
            self._merged(first, low * level.width, fitting - 1, None),
            group(level.slice(low, high), -(-per_bucket // level.width)),
            self._merged(high * level.width, last, fitting - 1, None),
        ]
        return join(part for part in parts if len(part["step"]))

    def _decayed_at_edges(self, first: int, last: int) -> bool:
        """Whether the rows of the first or the last bucket cannot all be read: then their steps decide, not numbers."""
        for low in {first - first % BASE, max(0, last - 1) - max(0, last - 1) % BASE}:
            high = min(low + BASE, self.size)
            if len(self.rows(low, high)["step"]) < high - low:
                return True
        return False

    def _merged(self, first: int, last: int, at: int, size: int | None) -> Columns:
        """Rows between two, from the levels below `at`, in groups of `size` pieces; without, in one."""
        parts = self._pieces(first, last, at - 1)
        if not parts:
            return self.ones(first, first)
        joined = join(parts)
        return group(joined, size or len(joined["step"]))

    def _pieces(self, first: int, last: int, at: int) -> list[Columns]:
        """Buckets of any width that cover these rows: the widest that fit, rows at the edges."""
        if first >= last:
            return []
        if at < 0:
            return [self.ones(first, last)]
        level = self.levels[at]
        low, high = -(-first // level.width), min(last // level.width, level.size)
        if low >= high:
            return self._pieces(first, last, at - 1)
        edges = self._pieces(first, low * level.width, at - 1), self._pieces(high * level.width, last, at - 1)
        return [*edges[0], level.slice(low, high), *edges[1]]
