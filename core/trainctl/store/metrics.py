"""The history of a run's metrics: values and rollups of all incarnations, and which of them is the live branch.

For each metric and incarnation there is a track (tracks.py): what was packed is on disk, the newest values in memory,
and a pyramid of buckets over both (rollups.py), so that a chart of any span costs by the points it asks for and not by
the values that exist, and so does memory.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from trainctl.store.blocks import Block
from trainctl.store.chunks import BlockReader
from trainctl.store.density import base_of, stays
from trainctl.store.packed import Sealed, well_formed
from trainctl.store.rollups import Columns, join
from trainctl.store.saved import SavedBranch, SavedMetrics, load_track, save_track
from trainctl.store.tracks import Track
from trainctl.store.unsealed import Unsealed
from trainctl.wire.messages import LastValue, Rows

VALUE_COLUMNS: Final = ("step", "time", "value", "incarnation")
ROLLUP_COLUMNS: Final = ("step", "time", "min", "max", "mean", "last", "count", "nonfinite", "incarnation")
_INTEGERS: Final = {"step", "incarnation", "count", "nonfinite"}
_LOOKED_UP: Final = 2000  # ends of branches at once, so that looking them up holds nobody up
_TOGETHER: Final = 64 * 1024  # values, so that many metrics do not make one settling long


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One incarnation: what it holds of its parent ends with `after_step`, its own values follow."""

    incarnation: int
    after_step: int
    parent: int | None


@dataclass
class _Arriving:
    """Values of one metric and incarnation that are not in their track yet."""

    steps: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    dtypes: list[Literal["f4", "f8"]] = field(default_factory=list)

    def values(self) -> NDArray[np.generic]:
        if len(set(self.dtypes)) == 1:
            return np.frombuffer(b"".join(self.chunks), f"<{self.dtypes[0]}")
        parts = [np.frombuffer(chunk, f"<{dtype}") for chunk, dtype in zip(self.chunks, self.dtypes, strict=True)]
        return np.concatenate([part.astype("f8") for part in parts])


@dataclass
class _Metric:
    tracks: dict[int, Track] = field(default_factory=dict)
    last: LastValue | None = None


class MetricStore:
    """Values and rollups of all metrics of one run, in all its incarnations.

    Rows come a few at a time and numpy wants many, so they wait and go into their columns together: when they are
    enough, or when somebody asks.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """`directory` is the journal in which sealed values are; without one everything stays in memory."""
        self._metrics: dict[str, _Metric] = {}
        self._branches: dict[int, Branch] = {}
        self._waiting: list[Rows] = []
        self._waiting_cells = 0
        self._reader = BlockReader(directory)
        self.unsealed = Unsealed()
        self.refused = 0  # columns that do not fit their rows

    @property
    def names(self) -> list[str]:
        """Names of all metrics, in the order in which they first came."""
        self._settle()
        return list(self._metrics)

    @property
    def branches(self) -> list[Branch]:
        """All incarnations, oldest first."""
        return [self._branches[number] for number in sorted(self._branches)]

    def begin(self, incarnation: int, *, after_step: int, parent: int | None = None) -> None:
        """A new incarnation goes on from `after_step` of `parent` (by default the newest before it).

        A known incarnation is left as it is, so that being told twice does no harm.
        """
        if incarnation in self._branches:
            return
        if parent is None:
            parent = max((number for number in self._branches if number < incarnation), default=None)
        self._branches[incarnation] = Branch(incarnation=incarnation, after_step=after_step, parent=parent)
        if parent is not None and len(self._metrics) <= _LOOKED_UP:
            self._settle()
            self._remember(parent, after_step)

    def _remember(self, incarnation: int, cut: int | None) -> None:
        """Look up where a branch ends while its last values are still at hand."""
        if cut is not None:
            for metric in self._metrics.values():
                if incarnation in metric.tracks:
                    metric.tracks[incarnation].remember(cut)

    def add(self, rows: Rows, seq: int = 0, epoch: int = 0) -> None:
        """Take the metrics of consecutive steps. With the number of their envelope they can be sealed later."""
        columns = well_formed(rows)
        self.refused += len(rows.columns) - len(columns)
        if not columns:
            return
        self.begin(rows.incarnation, after_step=rows.steps[0] - 1)
        self.unsealed.append(epoch, seq, len(rows.steps), rows.incarnation, tuple(column.name for column in columns))
        self._waiting.append(rows)
        self._waiting_cells += len(rows.steps) * len(columns)
        if self._waiting_cells >= _TOGETHER:
            self._settle()

    def add_block(self, block: Block, known: int, linked: int) -> None:
        """Take packed rows. Those of envelopes up to number `known`, or that rank 0 numbered up to `linked`, were taken
        before."""
        skip, epoch, incarnation = 0, block.packed.epoch, block.packed.incarnation
        # All of it is unpacked before any of it is taken: a block that turns out to be nonsense is taken not at all.
        unpacked = [(name, block.rows(name), *block.metric(name)) for name in block.names]
        envelopes = zip(block.seqs.tolist(), block.links.tolist(), block.widths.tolist(), block.kinds(), strict=True)
        for seq, link, width, names in envelopes:
            if seq <= known or 0 < link <= linked:
                skip += width
            else:
                self.unsealed.append(epoch, seq, width, incarnation, names)
        if skip >= block.packed.count:
            return
        self._settle()
        self.begin(incarnation, after_step=int(block.steps[skip]) - 1)
        for name, rows, steps, times, values in unpacked:
            behind = skip if rows is None else int(np.searchsorted(rows, skip))
            if behind < len(steps):
                self._extend(name, incarnation, steps[behind:], times[behind:], values[behind:])

    def seal(self, sealed: Sealed) -> None:
        """The values of these envelopes are on disk now and need not be kept in memory."""
        first, keys = self.unsealed.first, [(sealed.epoch, seq) for seq in sealed.seqs]
        if first is None or first > keys[-1]:
            return  # all of it is kept already, or came to another hub than this one
        self._settle()
        if not self.unsealed.begins_with(keys):
            self._keep(keys[-1])
            return
        self.unsealed.drop(len(keys))
        for name, count in sealed.counts.items():
            track = self._metrics[name].tracks[sealed.incarnation]
            track.refine(base_of(count, sealed.rows, len(sealed.counts)))
            if stays(count, sealed.rows):
                track.keep(count)
            else:
                track.seal(count, sealed.segment, sealed.offset)

    def _keep(self, last: tuple[int, int]) -> None:
        """Memory and journal hold different envelopes here (some were never written): the values of those up to `last`
        stay in memory for good, and sealing goes on with what comes next."""
        for (name, incarnation), count in self.unsealed.take_up_to(last).items():
            self._metrics[name].tracks[incarnation].keep(count)

    def save(self) -> SavedMetrics:
        """Everything, to be restored later."""
        self._settle()
        chain = self.live_branch()
        if len(chain) * len(self._metrics) <= _LOOKED_UP:
            for incarnation, cut in chain:
                self._remember(incarnation, cut)
        unsealed, kinds = self.unsealed.saved(self._metrics)
        return SavedMetrics(
            names=list(self._metrics),
            last={name: metric.last for name, metric in self._metrics.items() if metric.last is not None},
            branches=[
                SavedBranch(incarnation=branch.incarnation, after_step=branch.after_step, parent=branch.parent)
                for branch in self.branches
            ],
            tracks=[
                save_track(track, incarnation)
                for metric in self._metrics.values()
                for incarnation, track in metric.tracks.items()
            ],
            kinds=kinds,
            unsealed=unsealed,
        )

    def restore(self, saved: SavedMetrics) -> None:
        """Be, in a store that is empty, what was saved. Raises ValueError, KeyError or IndexError for nonsense."""
        self._metrics = {name: _Metric(last=saved.last.get(name)) for name in saved.names}
        for branch in saved.branches:
            self.begin(branch.incarnation, after_step=branch.after_step, parent=branch.parent)
        for track in saved.tracks:
            self._metrics[track.name].tracks[track.incarnation] = load_track(track, self._reader)
        self.unsealed.restore(saved.unsealed, saved.kinds, saved.names)
        for name, incarnation in self.unsealed.tracks():
            self._metrics[name].tracks[incarnation]  # raises KeyError

    @property
    def in_memory(self) -> int:
        """Values that are held in memory, those that no block holds included."""
        self._settle()
        return sum(track.in_memory for metric in self._metrics.values() for track in metric.tracks.values())

    @property
    def unreadable(self) -> int:
        """Blocks of the journal that were asked for and could not be read."""
        return len(self._reader.unreadable)

    def _settle(self) -> None:
        """Put the waiting rows into their columns."""
        arriving: dict[tuple[str, int], _Arriving] = {}
        for rows in self._waiting:
            for column in well_formed(rows):
                into = arriving.setdefault((column.name, rows.incarnation), _Arriving())
                into.steps.extend(rows.steps)
                into.times.extend(rows.times)
                into.chunks.append(column.data)
                into.dtypes.append(column.dtype)
        self._waiting, self._waiting_cells = [], 0
        for (name, incarnation), found in arriving.items():
            self._extend(name, incarnation, np.array(found.steps, "i8"), np.array(found.times, "f8"), found.values())

    def _extend(
        self,
        name: str,
        incarnation: int,
        steps: NDArray[np.int64],
        times: NDArray[np.float64],
        values: NDArray[np.generic],
    ) -> None:
        metric = self._metrics.setdefault(name, _Metric())
        if incarnation not in metric.tracks:
            metric.tracks[incarnation] = Track(name, self._reader)
        metric.tracks[incarnation].add(steps, times, values)
        metric.last = LastValue(
            step=int(steps[-1]), time=float(times[-1]), value=float(values[-1]), incarnation=incarnation
        )

    def latest(self, name: str) -> LastValue | None:
        """The value that came last, whatever its incarnation."""
        self._settle()
        metric = self._metrics.get(name)
        return metric.last if metric else None

    def live_branch(self) -> list[tuple[int, int | None]]:
        """The incarnations that the newest one stands on, oldest first, each with the last step that counts of it."""
        chain: list[tuple[int, int | None]] = []
        at: int | None = max(self._branches, default=None)
        cut: int | None = None
        while at is not None:
            chain.append((at, cut))
            branch = self._branches[at]
            cut = branch.after_step if cut is None else min(cut, branch.after_step)
            at = branch.parent if branch.parent in self._branches and branch.parent < at else None
        return chain[::-1]

    def query(
        self,
        name: str,
        *,
        from_step: int | None = None,
        to_step: int | None = None,
        points: int | None = None,
        incarnation: int | None = None,
    ) -> Columns:
        """Columns of a metric between two steps, both included.

        Without `points`: `VALUE_COLUMNS`, one row a value. With: `ROLLUP_COLUMNS`, about `points` buckets in all. With
        an `incarnation` all of its own values, also those that a rollback left behind; without, the live branch.
        A metric that does not exist has empty columns.
        """
        self._settle()
        tracks = self._metrics[name].tracks if name in self._metrics else {}
        chain = self.live_branch() if incarnation is None else [(incarnation, None)]
        spans = [
            (number, tracks[number], to_step if cut is None else cut if to_step is None else min(cut, to_step))
            for number, cut in chain
            if number in tracks
        ]
        parts: list[Columns] = []
        if points is None:
            for number, track, end in spans:
                columns = track.values(from_step, end)
                parts.append(columns | {"incarnation": np.full(len(columns["step"]), number, "i8")})
            return join(parts) if parts else _empty(VALUE_COLUMNS)
        found = [(number, track, end, track.span(from_step, end)) for number, track, end in spans]
        total = sum(span.size for *_, span in found)
        incarnations: list[int] = []
        for number, track, end, span in found:
            if span.size:
                share = max(1, round(points * span.size / total))
                drawn = track.buckets(span, from_step, end, share)
                parts += drawn
                incarnations += [number] * sum(len(part["step"]) for part in drawn)
        return _as_rollup(join(parts), incarnations) if parts else _empty(ROLLUP_COLUMNS)


def _as_rollup(buckets: Columns, incarnations: list[int]) -> Columns:
    finite = buckets["count"].astype("i8") - buckets["nonfinite"].astype("i8")
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(finite > 0, buckets["sum"].astype("f8") / finite, np.nan)
    made = dict(buckets)
    del made["sum"]
    made["mean"] = mean
    made["incarnation"] = np.array(incarnations, "i8")
    return {name: made[name].astype("i8" if name in _INTEGERS else "f8", copy=False) for name in ROLLUP_COLUMNS}


def _empty(names: tuple[str, ...]) -> Columns:
    return {name: np.empty(0, "i8" if name in _INTEGERS else "f8") for name in names}
