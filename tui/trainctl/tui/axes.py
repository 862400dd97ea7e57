"""Axes: where ticks lie, what they are called, and ranges that hold still while a run goes on."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
_ENDS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, kw_only=True)
class Span:
    """A closed range of values on one axis."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"no range to draw: {self.low} to {self.high}")


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(nice * power for nice in _NICE if nice * power >= rough * (1 - 1e-9))


def linear_ticks(span: Span, count: int) -> npt.NDArray[np.float64]:
    """At most about `count` round values within a range."""
    step = nice_step((span.high - span.low) / max(1, count))
    first, last = math.ceil(span.low / step - 1e-9), math.floor(span.high / step + 1e-9)
    if last <= first and count < 8:
        return linear_ticks(span, 2 * count)  # one tick alone does not tell the scale
    return np.arange(first, last + 1, dtype=np.float64) * step


def log_ticks(span: Span, count: int) -> npt.NDArray[np.float64]:
    """Powers of ten, or 1-2-5 steps where the range is short. `span` is in log10."""
    decades = np.arange(math.ceil(span.low - 1e-9), math.floor(span.high + 1e-9) + 1, dtype=np.float64)
    if len(decades) >= 3 or span.high - span.low > 2:
        stride = max(1, math.ceil(len(decades) / max(1, count)))
        return decades[::stride]
    fine = np.log10(np.outer(10.0 ** np.arange(math.floor(span.low), math.ceil(span.high) + 1), [1, 2, 5])).ravel()
    fine = fine[(fine >= span.low - 1e-9) & (fine <= span.high + 1e-9)]
    return fine if len(fine) >= 2 else np.log10(np.maximum(linear_ticks(_power(span), count), 1e-300))


def _power(span: Span) -> Span:
    return Span(low=10.0**span.low, high=10.0**span.high)


def tick_label(value: float, step: float, biggest: float = 0.0) -> str:
    """A tick's name, with as many digits as neighbours need to differ.

    `biggest` is the size of the largest tick: it decides the unit, so that one axis has one.
    """
    if value == 0 or abs(value) < step * 1e-6:
        return "0"
    size = max(abs(value), step, biggest)
    if size < 1e-2:
        return scientific(value, _places(value))
    for scale, unit in _SI:
        if size >= scale * (10 if scale == 1e3 and step < 100 and step % 1 else 1):
            return _decimals(value / scale, step / scale) + unit
    return _decimals(value, step)


def _places(value: float) -> int:
    """Digits behind the point that a value needs in scientific form, three at most."""
    return next((p for p in range(3) if math.isclose(float(f"{value:.{p}e}"), value, rel_tol=1e-6)), 3)


def _decimals(value: float, step: float) -> str:
    places = 0
    while places < 6 and abs(round(step * 10**places) - step * 10**places) > 1e-6 * max(1.0, step * 10**places):
        places += 1
    return f"{value:.{places}f}"


def scientific(value: float, places: int = 0) -> str:
    """`6e-4`, without the zeros that Python adds to the exponent."""
    mantissa, _, exponent = f"{value:.{places}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def settle(before: Span | None, low: float, high: float) -> Span:
    """The range to show for data between `low` and `high`: round, and unchanged as long as the data fit well.

    It grows at once and shrinks only when the data use less than half of it, so that a chart does not jump and
    unchanged columns need not be drawn again.
    """
    if before is not None and before.low <= low and high <= before.high:
        used, have = high - low, before.high - before.low
        if used > 0.45 * have or have <= _least(low, high):
            return before
    if high - low < _least(low, high):
        middle, least = (low + high) / 2, _least(low, high)
        low, high = middle - least / 2, middle + least / 2
    margin = (high - low) * 0.04
    step = nice_step((high - low) / 8)
    floor = math.floor((low - margin) / step) * step
    if low >= 0 > floor:
        floor = 0.0
    return Span(low=floor, high=math.ceil((high + margin) / step) * step)


def _least(low: float, high: float) -> float:
    """The narrowest range worth showing: a constant has no shape."""
    return max(abs(low), abs(high)) * 0.02 or 1.0


def step_end(last: float, total: float | None) -> float:
    """Where the axis of steps ends: at the next round number, so that columns keep their place while steps come in."""
    if last <= 0:
        return 10.0
    power = 10.0 ** math.floor(math.log10(last))
    end = next(nice * power for nice in _ENDS if nice * power >= last * (1 - 1e-12))
    end = max(10.0, end)
    return float(total) if total is not None and last <= total <= end * 1.25 else end
