"""From numbers to dots: columns of extremes, rows of dots, and characters made of dots. Plain numpy throughout.

A curve of any length becomes, for every column of dots, the smallest and the largest value in it: a spike of one step
among a hundred thousand is as tall as it was. Everything after that costs the same however long the run is.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Flags: TypeAlias = npt.NDArray[np.bool_]
Codes: TypeAlias = npt.NDArray[np.uint32]
Glyphs: TypeAlias = Literal["braille", "block", "ascii"]

# Dots of one cell: columns, rows.
CELL: dict[Glyphs, tuple[int, int]] = {"braille": (2, 4), "block": (1, 2), "ascii": (1, 2)}

_BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], np.uint32)
_BLOCKS = np.array([ord(char) for char in " ▀▄█"], np.uint32)
_ASCII = np.array([ord(char) for char in " '.:"], np.uint32)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A curve over columns of dots; NaN where a column has no finite value.

    `low`, `high`: extremes; `first`, `last`: the values at its ends; `mean`. `bad`: some value was NaN or infinite.
    """

    low: Floats
    high: Floats
    first: Floats
    last: Floats
    mean: Floats
    bad: Flags


def columns_of(x: Floats, low: Floats, high: Floats, mean: Floats, edges: Floats) -> Columns:
    """Gather samples (`x` ascending) into the columns between `edges`, the last edge included.

    `low`, `high` and `mean` may be one array when every sample is a single value.
    """
    width = len(edges) - 1
    bounds = np.searchsorted(x, edges)
    bounds[-1] = np.searchsorted(x, edges[-1], side="right")
    filled = np.flatnonzero(bounds[1:] > bounds[:-1])
    result = {name: np.full(width, np.nan) for name in ("low", "high", "first", "last", "mean")}
    bad = np.zeros(width, np.bool_)
    if not len(filled):
        return Columns(**result, bad=bad)
    begin, end = int(bounds[filled[0]]), int(bounds[filled[-1] + 1])
    starts = bounds[filled] - begin
    low, high, mean = low[begin:end], high[begin:end], mean[begin:end]
    # The sum is finite exactly when every value is, up to overflow, which only costs the slower way.
    with np.errstate(invalid="ignore", over="ignore"):
        finite = bool(np.isfinite(low.sum())) and (high is low or bool(np.isfinite(high.sum())))
    if not finite or (mean is not low and not np.isfinite(mean).all()):
        broken = ~(np.isfinite(low) & np.isfinite(high) & np.isfinite(mean))
        bad[filled] = np.logical_or.reduceat(broken, starts)
        same = high is low
        low = np.where(np.isfinite(low), low, np.nan)
        high = low if same else np.where(np.isfinite(high), high, np.nan)
        mean = np.where(np.isfinite(mean), mean, np.nan)
    result["low"][filled] = np.fmin.reduceat(low, starts) if bad.any() else np.minimum.reduceat(low, starts)
    result["high"][filled] = np.fmax.reduceat(high, starts) if bad.any() else np.maximum.reduceat(high, starts)
    ends = bounds[filled + 1] - begin - 1
    result["first"][filled], result["last"][filled] = mean[starts], mean[ends]
    result["mean"][filled] = _means(mean, starts, ends)
    for name in ("first", "last", "mean"):  # a bad sample at an end: fall back on what the column has
        gap = np.isnan(result[name]) & np.isfinite(result["low"])
        result[name][gap] = (result["low"][gap] + result["high"][gap]) / 2
    return Columns(**result, bad=bad)


def _means(values: Floats, starts: npt.NDArray[np.intp], ends: npt.NDArray[np.intp]) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.add.reduceat(values, starts) / (ends - starts + 1), np.float64)


def smoothed(columns: Columns, spread: float) -> Columns:
    """The curve averaged over its neighbours with Gaussian weights, `spread` columns wide.

    Centred, so that it does not lag behind a steep curve, and short, so that only the newest columns change when
    samples come in. Columns without samples take no part.
    """
    reach = max(1, math.ceil(3 * spread))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / spread) ** 2)
    have = np.isfinite(columns.mean)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        total = _spread(np.where(have, columns.mean, 0.0), weights)
        out = np.where(have, total / _spread(have.astype(np.float64), weights), np.nan)
    return Columns(low=out, high=out, first=out, last=out, mean=out, bad=columns.bad)


def _spread(values: Floats, weights: Floats) -> Floats:
    reach = len(weights) // 2
    return np.convolve(values, weights)[reach : reach + len(values)]


def dots_of(columns: Columns, low: float, high: float, rows: int, *, bridge: bool = True) -> Flags:
    """A curve as `dots[row, column]`, row 0 on top. Values outside the range lie on its border.

    Neighbouring columns are joined so that a steep curve has no holes, and columns without samples are bridged,
    except where a value was NaN or infinite.
    """
    width = len(columns.low)
    dots = np.zeros((rows, width), np.bool_)
    have = np.flatnonzero(np.isfinite(columns.low))
    if not len(have) or rows <= 0:
        return dots
    scale = (rows - 1) / (high - low)
    with np.errstate(invalid="ignore"):
        bottom = np.rint((columns.low - low) * scale)
        top = np.rint((columns.high - low) * scale)
    if bridge and have[-1] - have[0] + 1 > len(have):
        _bridge(columns, have, bottom, top, low, scale)
    bottom, top = np.clip(bottom, 0, rows - 1), np.clip(top, 0, rows - 1)
    if bridge:
        _join(bottom, top)
    level = np.arange(rows - 1, -1, -1, dtype=np.float64)[:, None]
    with np.errstate(invalid="ignore"):
        np.logical_and(level >= bottom, level <= top, out=dots)
    return dots


def _bridge(
    columns: Columns, have: npt.NDArray[np.intp], bottom: Floats, top: Floats, low: float, scale: float
) -> None:
    """Fill the empty columns between two filled ones with the straight line from one to the other."""
    empty = np.flatnonzero(~np.isfinite(columns.low[have[0] : have[-1]])) + have[0]
    after = np.searchsorted(have, empty)
    left, right = have[after - 1], have[after]
    share = (empty - left) / (right - left)
    with np.errstate(over="ignore"):
        height = np.rint((columns.last[left] * (1 - share) + columns.first[right] * share - low) * scale)
    breaks = np.cumsum(columns.bad)
    height[breaks[right] - breaks[left] > 0] = np.nan
    bottom[empty] = top[empty] = height


def _join(bottom: Floats, top: Floats) -> None:
    """Stretch neighbours towards each other where one lies wholly above the other."""
    with np.errstate(invalid="ignore"):
        rise = bottom[1:] - top[:-1]
        middle = np.floor((bottom[1:] + top[:-1]) / 2)
        up = rise > 1
        top[:-1][up] = middle[up]
        bottom[1:][up] = middle[up] + 1
        fall = bottom[:-1] - top[1:]
        middle = np.floor((bottom[:-1] + top[1:]) / 2)
        down = fall > 1
        bottom[:-1][down] = middle[down] + 1
        top[1:][down] = middle[down]


def characters(dots: Flags, glyphs: Glyphs) -> Codes:
    """Pack dots into code points, one for each cell; a space where there is no dot."""
    across, down = CELL[glyphs]
    height, width = dots.shape[0] // down, dots.shape[1] // across
    cells = dots[: height * down, : width * across].reshape(height, down, width, across)
    if glyphs == "braille":
        packed = np.einsum("hdwa,da->hw", cells, _BRAILLE, dtype=np.uint32, casting="unsafe")
        return np.where(packed > 0, packed + 0x2800, ord(" ")).astype(np.uint32)
    index = cells[:, 0, :, 0] + 2 * cells[:, 1, :, 0]
    return (_BLOCKS if glyphs == "block" else _ASCII)[index]
