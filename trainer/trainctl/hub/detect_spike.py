"""Notices that a loss leaps above its own noise, and that it is back. Pure.

A value's robust z is `(value - median) / (1.4826 * MAD)` over the last finite values, MAD being the median absolute
deviation from the median (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993): half of the values may be
outliers before it moves. docs/alerts.md gives the thresholds, and the false alarms that were measured with them.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

WINDOW: Final = 256
WARM_UP: Final = 64
# One value in a hundred of a small batch's loss is far out; three of four in a row are not chance.
LASTING_Z: Final = 6.0
LASTING_VALUES: Final = 3
LASTING_OF: Final = 4
# A single value counts only where the curve throws none like it by itself.
SINGLE_Z: Final = 15.0
SINGLE_TIMES_WIDEST: Final = 4.0
TAME_Z: Final = 8.0
# The noise is taken to be at least this share of the level, so that a flat curve has some too.
LEAST_NOISE: Final = 0.03
CALM_Z: Final = LASTING_Z / 2
CALM_VALUES: Final = 10
# A curve that stays up this long has a new level.
LONGEST: Final = WINDOW // 2
REFIT_EVERY: Final = 16
_SIGMAS_IN_A_MAD: Final = 1.4826


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What is usual for a curve: its level, its noise, and how far above the level it has been by itself."""

    median: float
    noise: float
    widest: float

    def z(self, value: float) -> float:
        return (value - self.median) / self.noise

    @property
    def lasting(self) -> float:
        """Values above this are suspicious."""
        return self.median + LASTING_Z * self.noise

    def single(self, value: float) -> bool:
        """Whether one value alone proves a leap."""
        above = value - self.median
        tame = self.widest <= TAME_Z * self.noise
        return tame and above >= SINGLE_Z * self.noise and above >= SINGLE_TIMES_WIDEST * self.widest


@dataclass(frozen=True, kw_only=True)
class Turn:
    """An episode began or ended with the value at `at` of those that were given."""

    at: int
    value: float
    begins: bool
    usual: float  # the median before the episode
    z: float
    stays: bool = False  # ended because the curve stays up


class SpikeWatch:
    """One curve. What it says depends on the sequence of its values and not on how they are cut into batches."""

    def __init__(self) -> None:
        self._window = _Window()
        self._since_fit = 0
        self._baseline: Baseline | None = None
        self._recent: deque[bool] = deque(maxlen=LASTING_OF)
        self._spiking = False
        self._calm = 0
        self._episode: list[float] = []

    @property
    def spiking(self) -> bool:
        return self._spiking

    def assume(self, *, spiking: bool) -> None:
        """After a replay of earlier values: what operators were told of them counts."""
        self._spiking = spiking and self._baseline is not None
        self._calm, self._episode = 0, []
        self._recent.clear()

    def observe(self, values: NDArray[np.floating]) -> list[Turn]:
        """Take further values of the curve, oldest first; return where episodes begin and end. NaN and Inf are
        passed over."""
        turns: list[Turn] = []
        at = 0
        finite = np.flatnonzero(np.isfinite(values))
        usable = values[finite].astype("f8")
        while at < len(usable):
            taken = self._take_quiet(usable[at : at + REFIT_EVERY])
            if taken:
                at += taken
                continue
            turn = self._take(float(usable[at]), int(finite[at]))
            if turn is not None:
                turns.append(turn)
            at += 1
        return turns

    def _take_quiet(self, values: NDArray[np.float64]) -> int:
        """Take values among which nothing can begin or end all at once; return how many, 0 if they need a look."""
        if self._spiking or any(self._recent):
            return 0
        values = values[: REFIT_EVERY - self._since_fit]
        if self._baseline is not None and float(values.max()) > self._baseline.lasting:
            return 0
        self._keep(values)
        return len(values)

    def _take(self, value: float, at: int) -> Turn | None:
        baseline = self._baseline
        if baseline is None:
            self._keep(np.array([value]))
            return None
        if self._spiking:
            return self._in_episode(baseline, value, at)
        self._recent.append(value > baseline.lasting)
        if sum(self._recent) < LASTING_VALUES and not baseline.single(value):
            self._keep(np.array([value]))
            return None
        self._spiking, self._calm, self._episode = True, 0, [value]
        self._recent.clear()
        return Turn(at=at, value=value, begins=True, usual=baseline.median, z=baseline.z(value))

    def _in_episode(self, baseline: Baseline, value: float, at: int) -> Turn | None:
        z = baseline.z(value)
        self._calm = self._calm + 1 if z <= CALM_Z else 0
        self._episode.append(value)
        over = self._calm >= CALM_VALUES
        if not over and len(self._episode) < LONGEST:
            return None
        if over:
            self._window.extend(np.array(self._episode[-CALM_VALUES:]))  # the leap must not become what is usual
        else:
            self._window = _Window()
            self._window.extend(np.array(self._episode))
        self._spiking, self._episode = False, []
        self._fit()
        return Turn(at=at, value=value, begins=False, usual=baseline.median, z=z, stays=not over)

    def _keep(self, values: NDArray[np.float64]) -> None:
        self._window.extend(values)
        self._since_fit += len(values)
        if self._since_fit >= REFIT_EVERY:
            self._fit()

    def _fit(self) -> None:
        self._since_fit = 0
        if self._window.size < WARM_UP:
            return
        ordered = np.sort(self._window.values)
        median = _middle(ordered)
        with np.errstate(over="ignore"):
            deviation = _SIGMAS_IN_A_MAD * _middle(np.sort(np.abs(ordered - median)))
            widest = float(ordered[-1] - median)
        noise = max(deviation, LEAST_NOISE * abs(median))
        # All zero, or too large to subtract: there is no scale to measure a leap by.
        usable = 0 < noise < np.inf
        self._baseline = Baseline(median=median, noise=noise, widest=widest) if usable else None


class _Window:
    """The last `WINDOW` values, in no order: a ring."""

    def __init__(self) -> None:
        self._ring = np.empty(WINDOW)
        self._next = 0
        self.size = 0

    @property
    def values(self) -> NDArray[np.float64]:
        return self._ring[: self.size]

    def extend(self, values: NDArray[np.float64]) -> None:
        """Take at most `WINDOW` values in place of the oldest."""
        first = values[: WINDOW - self._next]
        self._ring[self._next : self._next + len(first)] = first
        self._ring[: len(values) - len(first)] = values[len(first) :]
        self._next = (self._next + len(values)) % WINDOW
        self.size = min(WINDOW, self.size + len(values))


def _middle(ordered: NDArray[np.float64]) -> float:
    """The median of sorted values; `numpy.median` takes five times as long for so few."""
    half = len(ordered) // 2
    return float(ordered[half] if len(ordered) % 2 else ordered[half - 1] / 2 + ordered[half] / 2)
