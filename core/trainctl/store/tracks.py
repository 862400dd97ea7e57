"""One metric in one incarnation: a sealed part that is on disk, a hot part in memory, and a pyramid over both.

Only buckets of 256 values and more are kept, a quarter of a byte for each value (finer ones where few values of the
metric are in a block, density.py). What is finer is made from the values themselves when somebody asks: for the hot
part at hand, for the sealed part from the packed segments.

Steps grow, as a rule, and then a span of them is a span of rows. Where a script counted backwards, each bucket's lowest
and highest step tells what to read (bounds.py). Such a chart is in the order of steps: exact where there are so few
values that each is looked at, else in such buckets put in the order of their last steps.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainctl.store.bounds import Bounds, stretches
from trainctl.store.chunks import BlockReader, Chunks
from trainctl.store.density import BASE
from trainctl.store.edges import Edges
from trainctl.store.rollups import Columns, Growing, Level, group, group_by_count, join, ones

FAN: Final = 4
_FEW: Final = 16  # buckets: what is drawn of one of many branches, small enough to be remembered
# A level that is a little too coarse is taken rather than values read: a fifth fewer buckets than were asked for.
_COARSER: Final = 1.25


@dataclass(frozen=True, kw_only=True)
class Span:
    """What of a track is between two steps: `size` values, rows `first` to `end`, or of a track whose steps went back
    the `whole` buckets and `singles` beside them, with their row numbers."""

    size: int
    first: int
    end: int
    certain: bool = True  # whether every row that had to be looked at could be read
    whole: NDArray[np.bool_] | None = None
    singles: Columns | None = None


class Track:
    """Values in the order in which they came; row numbers count from 0 over the sealed and the hot part, which may
    overlap a little."""

    __slots__ = (
        "_reader",
        "base",
        "bounds",
        "chunks",
        "edges",
        "first_step",
        "hot",
        "hot_start",
        "last_step",
        "levels",
        "name",
    )

    def __init__(self, name: str, reader: BlockReader) -> None:
        self.name = name
        self.bounds: Bounds | None = None  # once a step went back
        self.edges = Edges()
        self.chunks = Chunks()
        self.levels: list[Level] = []
        self.base = BASE  # values in a bucket of the first level
        self.hot = {"step": Growing("i8"), "time": Growing("f8"), "value": Growing("f4")}
        self.hot_start = 0  # row number of the first hot value
        self._reader = reader
        self.first_step = 0
        self.last_step = 0

    @property
    def size(self) -> int:
        return self.hot_start + self.hot["step"].size

    @property
    def in_memory(self) -> int:
        return self.hot["step"].size + self.chunks.in_memory

    def restore(
        self,
        *,
        bounds: Bounds | None,
        edges: Edges,
        first_step: int,
        last_step: int,
        chunks: Chunks,
        base: int,
        levels: list[Level],
        hot_start: int,
        hot: Columns,
    ) -> None:
        """Be again what was saved."""
        self.bounds, self.edges, self.chunks, self.base, self.levels = bounds, edges, chunks, base, levels
        self.first_step, self.last_step, self.hot_start = first_step, last_step, hot_start
        self.hot = {name: Growing(column.dtype.str, column) for name, column in hot.items()}

    @property
    def sorted(self) -> bool:
        """Whether no step went back so far."""
        return self.bounds is None

    def add(self, steps: NDArray[np.int64], times: NDArray[np.float64], values: NDArray[np.generic]) -> None:
        if not len(steps):
            return
        if not self.size:
            self.first_step = self.last_step = int(steps[0])
        if self.bounds is None and not (steps[0] >= self.last_step and np.all(steps[1:] >= steps[:-1])):
            ends = self.levels[0].columns["step"].view if self.levels else steps[:0]
            self.bounds, self.edges = Bounds.of_sorted(self.first_step, ends), Edges()
        self.last_step = int(steps[-1])
        for name, column in zip(("step", "time", "value"), (steps, times, values), strict=True):
            self.hot[name].extend(column)
        self._build()

    def seal(self, count: int, segment: int, offset: int) -> None:
        """The next `count` values after those that were sealed are in that block from now on."""
        self.chunks.append(count, segment, offset)
        self._cool()

    def refine(self, base: int) -> None:
        """Roll up from buckets of `base` on, if nothing was given away yet: afterwards it would have to be read."""
        if base != self.base and not self.hot_start and self.bounds is None:
            self.base, self.levels = base, []
            self._build()

    def keep(self, count: int) -> None:
        """The next `count` values stay in memory for good: no block holds just them, or hardly more of the metric."""
        self.chunks.keep(self.rows(self.chunks.size, self.chunks.size + count))
        self._cool()

    def _cool(self) -> None:
        # The rows of an incomplete bucket stay at hand until it is complete.
        built = self.levels[0].size * self.base if self.levels else 0
        kept_from = min(self.chunks.size, built)
        for column in self.hot.values():
            column.drop(kept_from - self.hot_start)
        self.hot_start = kept_from

    def _build(self) -> None:
        """Complete what can be completed, each level from the one below."""
        at = 0
        while True:
            width = self.base * FAN**at
            if at == len(self.levels):
                if self.size < width:
                    return
                self.levels.append(Level(width))
            target = self.levels[at]
            have, complete = target.size, self.size // width
            if complete == have:
                return  # a level above cannot have grown either
            if at == 0:
                singles = self.ones(have * width, complete * width)
                target.extend(group(singles, self.base))
                if self.bounds is not None:
                    steps = singles["step"].astype("i8").reshape(-1, self.base)
                    self.bounds.extend(steps.min(axis=1), steps.max(axis=1))
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
            if segment == 0:
                found: Columns | None = self.chunks.kept_at(offset)
            else:
                found = self._reader.metric(segment, offset, self.name)
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

    def span(self, from_step: int | None, to_step: int | None) -> Span:
        """What is between two steps, both included."""
        if self.bounds is not None:
            return self._scattered(self.bounds, from_step, to_step)
        first, low_certain = self._search(from_step, right=False)
        end, high_certain = self._search(to_step, right=True)
        end = max(first, end)
        certain = low_certain and high_certain
        size = end - first if certain else len(self._between(from_step, to_step, self.rows(first, end))["step"])
        return Span(size=size, first=first, end=end, certain=certain)

    def _search(self, step: int | None, *, right: bool) -> tuple[int, bool]:
        """Where `step` would be put among the steps, and whether that is certain: the bucket first, then the rows
        within it, unless some of them decayed; then too many rows rather than too few."""
        if step is None:
            return (self.size if right else 0), True
        if not self.size or (step < self.first_step if right else step <= self.first_step):
            return 0, True
        if step >= self.last_step if right else step > self.last_step:
            return self.size, True
        if (known := self.edges.row(step, right=right)) is not None:
            return known, True
        low, high = 0, self.size
        if self.levels:
            ends = self.levels[0].columns["step"].view
            bucket = int(np.searchsorted(ends, step, "right" if right else "left"))
            low, high = bucket * self.base, min((bucket + 1) * self.base, self.size)
            if bucket == len(ends):
                high = self.size
        steps = self.rows(low, high)["step"]
        if len(steps) < high - low:
            return (high if right else low), False
        row = low + int(np.searchsorted(steps, step, "right" if right else "left"))
        self.edges.found(step, row, right=right)
        return row, True

    def _scattered(self, bounds: Bounds, from_step: int | None, to_step: int | None) -> Span:
        whole, some = bounds.between(from_step, to_step)
        singles = self._singles(some, from_step, to_step)
        size = int(np.count_nonzero(whole)) * self.base + len(singles["step"])
        return Span(size=size, first=0, end=self.size, whole=whole, singles=singles)

    def _singles(self, chosen: NDArray[np.bool_], from_step: int | None, to_step: int | None) -> Columns:
        """The rows between two steps in the chosen buckets and behind the last bucket, in the order they came in."""
        built = len(chosen) * self.base
        spans = [(first * self.base, end * self.base) for first, end in stretches(chosen)] + [(built, self.size)]
        parts: list[Columns] = []
        for first, end in spans:
            found = self.rows(first, end)
            # Rows that decayed leave a gap, and the numbers of those behind it a little too low.
            parts.append(found | {"row": np.arange(first, first + len(found["step"]))})
        return self._between(from_step, to_step, join(parts))

    def values(self, from_step: int | None, to_step: int | None) -> Columns:
        """`step`, `time` and `value` between two steps, in the order in which they came."""
        if self.bounds is not None:
            whole, some = self.bounds.between(from_step, to_step)
            rows = self._singles(whole | some, from_step, to_step)
            del rows["row"]
        else:
            span = self.span(from_step, to_step)
            rows = self.rows(span.first, span.end)
            if not span.certain or len(rows["step"]) < span.size:
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

    def buckets(self, span: Span, from_step: int | None, to_step: int | None, points: int) -> list[Columns]:
        """About `points` buckets (never more than `points` + 2) of what `span` found between these two steps, in
        parts: who asks many tracks joins them once."""
        per_bucket = max(1, math.ceil(span.size / points))
        if span.whole is not None and span.singles is not None:
            return [self._in_order(span.whole, span.singles, from_step, to_step, per_bucket)]
        if not span.certain:
            found = self._between(from_step, to_step, self.rows(span.first, span.end))
            return [group(ones(found["step"], found["time"], found["value"]), per_bucket)]
        if points > _FEW:
            return self._of_rows(span.first, span.end, per_bucket)
        known = self.edges.drawn(span.first, span.end, per_bucket)
        if known is None:
            known = self._of_rows(span.first, span.end, per_bucket)
            if sum(int(part["count"].sum()) for part in known) == span.size:  # no row of it decayed
                known = [join(known)]
                self.edges.draws(span.first, span.end, per_bucket, known)
        return known

    def _in_order(
        self, whole: NDArray[np.bool_], singles: Columns, from_step: int | None, to_step: int | None, per_bucket: int
    ) -> Columns:
        """Buckets in the order of their steps, of a track whose steps did not come in that order."""
        if per_bucket * _COARSER < self.base and np.any(whole):
            _, some = self.bounds.between(from_step, to_step) if self.bounds is not None else (whole, ~whole)
            singles = self._singles(whole | some, from_step, to_step)
            whole = np.zeros(len(whole), bool)
        rows, made = singles["row"], ones(singles["step"], singles["time"], singles["value"])
        if np.any(whole):
            complete = {name: column.view[: len(whole)][whole] for name, column in self.levels[0].columns.items()}
            made = join([complete, made])
            rows = np.concatenate([(np.flatnonzero(whole) + 1) * self.base - 1, rows])
        order = np.lexsort((rows, made["step"]))
        return group_by_count({name: column[order] for name, column in made.items()}, per_bucket)

    def _of_rows(self, first: int, last: int, per_bucket: int) -> list[Columns]:
        fitting = sum(level.width <= per_bucket * _COARSER for level in self.levels)
        if not fitting:
            return [group(self.ones(first, last), per_bucket)]
        level = self.levels[fitting - 1]
        low, high = -(-first // level.width), min(last // level.width, level.size)
        if low >= high:
            return self._merged(first, last, fitting - 1)  # less than two buckets of the level
        return [
            *self._merged(first, low * level.width, fitting - 1),
            group(level.slice(low, high), -(-per_bucket // level.width)),
            *self._merged(high * level.width, last, fitting - 1),
        ]

    def _merged(self, first: int, last: int, at: int) -> list[Columns]:
        """Rows between two, from the levels below `at`, as one bucket; none where there are none."""
        parts = [part for part in self._pieces(first, last, at - 1) if len(part["step"])]
        if not parts:
            return []
        joined = join(parts) if len(parts) > 1 else parts[0]
        return [group(joined, len(joined["step"]))]

    def _pieces(self, first: int, last: int, at: int) -> list[Columns]:
        """Buckets of any width that cover these rows: the widest that fit, one of the rows at each edge."""
        if first >= last:
            return []
        if at < 0:
            return [self._edge(first, last)]
        level = self.levels[at]
        low, high = -(-first // level.width), min(last // level.width, level.size)
        if low >= high:
            return self._pieces(first, last, at - 1)
        edges = self._pieces(first, low * level.width, at - 1), self._pieces(high * level.width, last, at - 1)
        return [*edges[0], level.slice(low, high), *edges[1]]

    def _edge(self, first: int, last: int) -> Columns:
        """A few rows as one bucket, remembered; none where they cannot be read."""
        known = self.edges.merged(first, last)
        if known is not None:
            return known
        rows = self.ones(first, last)
        bucket = group(rows, max(2, last - first)) if len(rows["step"]) > 1 else rows
        if len(rows["step"]) == last - first:
            self.edges.amounts(first, last, bucket)
        return bucket

    def remember(self, to_step: int) -> None:
        """Look up, now and for the index, what a chart needs of a branch that ends with this step."""
        if self.bounds is None:
            end = self.span(None, to_step).end
            self._pieces(end - end % self.base, end, -1)
