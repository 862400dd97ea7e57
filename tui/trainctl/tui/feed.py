"""The curves that the cockpit holds: rollups of the past as the hub gave them, and every value since, as it came.

The past is asked for once. What follows arrives with the run's own messages and is appended, so a chart that is drawn
each second asks nothing of the hub. A rollback cuts the live curve and keeps what it left as an abandoned branch.

Metrics and events are streams of their own, so that rows may come before the rollback that they follow, or after the
one that left them behind. Every row carries its incarnation: older ones are passed over, newer ones cut the curve, and
either way the past is asked for again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trainctl.client.points import Points
from trainctl.tui.raster import Floats
from trainctl.wire.messages import RolledBack, Rows

_BRANCHES_KEPT = 8
_TREND_WINDOW_S = 60.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """A metric over steps: parallel arrays, `step` ascending. A NaN in `mean` is a value that was not finite."""

    step: Floats
    time: Floats
    mean: Floats
    low: Floats
    high: Floats

    def __len__(self) -> int:
        return len(self.step)

    def between(self, low: float, high: float) -> "Samples":
        """Those with low < step <= high."""
        a, b = np.searchsorted(self.step, [low, high], side="right")
        return Samples(
            step=self.step[a:b], time=self.time[a:b], mean=self.mean[a:b], low=self.low[a:b], high=self.high[a:b]
        )


_NONE = np.empty(0)
EMPTY = Samples(step=_NONE, time=_NONE, mean=_NONE, low=_NONE, high=_NONE)


def samples_of(points: Points) -> Samples:
    """History as samples. A bucket that holds finite and other values gives a sample for each kind."""
    columns = {name: np.asarray(values, np.float64) for name, values in points.columns.items()}
    if "value" in columns:
        value = np.where(np.isfinite(columns["value"]), columns["value"], np.nan)
        return _in_order(Samples(step=columns["step"], time=columns["time"], mean=value, low=value, high=value))
    found = Samples(
        step=columns["step"], time=columns["time"], mean=columns["mean"], low=columns["min"], high=columns["max"]
    )
    mixed: npt.NDArray[np.intp] = np.empty(0, np.intp)
    if "nonfinite" in columns:
        mixed = np.flatnonzero((columns["nonfinite"] > 0) & np.isfinite(found.mean))
    if len(mixed):
        found = Samples(
            step=np.insert(found.step, mixed, found.step[mixed]),
            time=np.insert(found.time, mixed, found.time[mixed]),
            mean=np.insert(found.mean, mixed, np.nan),
            low=np.insert(found.low, mixed, np.nan),
            high=np.insert(found.high, mixed, np.nan),
        )
    return _in_order(found)


def _in_order(samples: Samples) -> Samples:
    if len(samples) < 2 or bool((np.diff(samples.step) >= 0).all()):
        return samples
    order = np.argsort(samples.step, kind="stable")
    return Samples(
        step=samples.step[order],
        time=samples.time[order],
        mean=samples.mean[order],
        low=samples.low[order],
        high=samples.high[order],
    )


class _Track:
    """One metric of the live branch: arrays with room at the end."""

    def __init__(self, start: Samples) -> None:
        self.size = 0
        self._data = np.empty((5, max(256, 2 * len(start))))
        self.extend(start)

    def extend(self, more: Samples) -> None:
        needed = self.size + len(more)
        if needed > self._data.shape[1]:
            grown = np.empty((5, 2 * needed))
            grown[:, : self.size] = self._data[:, : self.size]
            self._data = grown
        for row, values in enumerate((more.step, more.time, more.mean, more.low, more.high)):
            self._data[row, self.size : needed] = values
        self.size = needed

    @property
    def last_step(self) -> float:
        return float(self._data[0, self.size - 1]) if self.size else -math.inf

    def cut(self, step: float) -> Samples:
        """Drop what lies behind `step` and return it."""
        keep = int(np.searchsorted(self._data[0, : self.size], step, side="right"))
        left = self._data[:, keep : self.size].copy()
        self.size = keep
        return Samples(step=left[0], time=left[1], mean=left[2], low=left[3], high=left[4])

    @property
    def samples(self) -> Samples:
        step, time, mean, low, high = self._data[:, : self.size]
        return Samples(step=step, time=time, mean=mean, low=low, high=high)


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """What a rollback left behind: `incarnation` from `after_step` on."""

    incarnation: int
    after_step: int
    from_step: int
    curves: Mapping[str, Samples]


@dataclass(kw_only=True, eq=False)
class Feed:
    """Curves by metric. `version` grows with every change that a chart could show; `unsure` is set where the past has
    to be asked for again."""

    tracks: dict[str, _Track] = field(default_factory=dict)
    branches: list[Branch] = field(default_factory=list)
    version: int = 0
    incarnation: int = 0
    unsure: bool = False
    _since: list[Rows | RolledBack] | None = None

    def begin_load(self) -> None:
        """From here on remember what comes in: the past is being asked for, and its answer ends somewhere before."""
        self._since = []
        self.unsure = False

    def load(self, history: Mapping[str, Points]) -> None:
        """Take the past in place of all that is held, then what came in since `begin_load`."""
        since, self._since = self._since or [], None
        past = {name: samples_of(points) for name, points in history.items() if len(points)}
        self.tracks = {name: _Track(samples) for name, samples in past.items()}
        self.incarnation = max((_newest_incarnation(points) for points in history.values()), default=0)
        for item in since:
            if isinstance(item, Rows):
                self.append(item)
            else:
                self.roll_back(item)
        self.version += 1

    @property
    def loading(self) -> bool:
        """Whether the past is being asked for."""
        return self._since is not None

    def give_up(self) -> None:
        """The past did not come; what is held stays."""
        self._since = None

    @property
    def size(self) -> int:
        """Samples of the longest curve."""
        return max((track.size for track in self.tracks.values()), default=0)

    def append(self, rows: Rows) -> None:
        """Take the values of new steps; steps that are held already are passed over."""
        if not rows.steps:
            return
        if self._since is not None:
            self._since.append(rows)
        if rows.incarnation < self.incarnation:
            return  # of a branch that was left
        if rows.incarnation > self.incarnation:
            self._cut(rows.steps[0] - 1, rows.incarnation)
        steps, times = np.asarray(rows.steps, np.float64), np.asarray(rows.times, np.float64)
        for column in rows.columns:
            values = np.frombuffer(column.data, "<f4" if column.dtype == "f4" else "<f8").astype(np.float64)
            if len(values) != len(steps):
                continue  # a column that does not fit its rows says nothing certain
            track = self.tracks.get(column.name)
            if track is None:
                track = self.tracks[column.name] = _Track(EMPTY)
            values = np.where(np.isfinite(values), values, np.nan)
            fresh = Samples(step=steps, time=times, mean=values, low=values, high=values)
            track.extend(fresh if steps[0] > track.last_step else _in_order(fresh).between(track.last_step, math.inf))
        self.version += 1

    def roll_back(self, event: RolledBack) -> None:
        """Cut the live branch where the run went back to, and keep what it left."""
        if self._since is not None:
            self._since.append(event)
        if event.incarnation > self.incarnation:
            self.keep_branch(event, self._cut(event.step, event.incarnation))

    def _cut(self, step: int, incarnation: int) -> dict[str, Samples]:
        """Begin a new incarnation behind `step`; return what is behind it of the one before."""
        self.unsure = self.unsure or self.incarnation > 0
        self.incarnation = incarnation
        curves = {name: track.cut(step) for name, track in self.tracks.items()}
        return {name: curve for name, curve in curves.items() if len(curve)}

    def keep_branch(self, event: RolledBack, curves: Mapping[str, Samples]) -> None:
        """Hold an abandoned branch, the newest few of them."""
        others = [branch for branch in self.branches if branch.incarnation != event.from_incarnation]
        branch = Branch(
            incarnation=event.from_incarnation, after_step=event.step, from_step=event.from_step, curves=curves
        )
        self.branches = [*others, branch][-_BRANCHES_KEPT:]
        self.version += 1

    def curve(self, name: str) -> Samples:
        """The live branch of a metric."""
        track = self.tracks.get(name)
        return track.samples if track is not None else EMPTY

    def trend(self, name: str, now: float) -> int:
        """Which way a metric went over the last minute: 1 up, -1 down, 0 where the noise hides it or little is known.

        The half minute before is compared with the newest one; it counts when the difference is above 0.2 % and
        above two standard errors.
        """
        samples = self.curve(name)
        recent = samples.mean[int(np.searchsorted(samples.time, now - _TREND_WINDOW_S)) :]
        recent = recent[np.isfinite(recent)]
        if len(recent) < 8:
            return 0
        half = len(recent) // 2
        old, new = recent[:half], recent[half:]
        difference = float(new.mean() - old.mean())
        error = math.sqrt(float(old.var()) / len(old) + float(new.var()) / len(new))
        if abs(difference) <= max(2 * error, 0.002 * abs(float(old.mean()))):
            return 0
        return 1 if difference > 0 else -1


def _newest_incarnation(points: Points) -> int:
    incarnations = points.columns.get("incarnation", _NONE)
    return int(incarnations.max()) if len(incarnations) else 0


def pace(samples: Samples) -> Samples:
    """Steps per second between samples: what to show where the run reports no throughput of its own.

    Gaps longer than ten times the median, such as pauses, are left out: they say nothing about the pace.
    """
    if len(samples) < 3:
        return EMPTY
    steps, seconds = np.diff(samples.step), np.diff(samples.time)
    good = (steps > 0) & (seconds > 0)
    if not good.any():
        return EMPTY
    each = np.where(good, seconds / np.maximum(steps, 1), np.nan)
    good &= each <= 10 * np.nanmedian(each)
    rate = 1.0 / each[good]
    return Samples(step=samples.step[1:][good], time=samples.time[1:][good], mean=rate, low=rate, high=rate)
