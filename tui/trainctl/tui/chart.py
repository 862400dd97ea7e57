"""A chart as a grid of cells: curves, axes, marks and a crosshair. Pure: the same numbers give the same picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from trainctl.tui import axes, raster
from trainctl.tui.axes import Span
from trainctl.tui.grid import Grid
from trainctl.tui.raster import Columns, Flags, Floats, Glyphs
from trainctl.tui.tones import Tone

_EMPTY = ord(" ")
_DASH = 3  # cells; the last one is the gap
_AXIS = {"braille": "┤│└─┬╎│✖", "block": "┤│└─┬╎│x", "ascii": "+|+-+:|x"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One line of a chart: arrays of one length, `x` ascending; `low` and `high` are `mean` where a sample is a value.

    `point` is a glyph for every sample, for curves of few samples. `smooth` draws the moving average bright over the
    dim curve. `dim` is for what is no longer true, such as an abandoned branch. `dashed` leaves gaps, so that two
    curves are told apart without colours.
    """

    label: str
    x: Floats
    mean: Floats
    low: Floats
    high: Floats
    tone: Tone = Tone.CURVE_1
    raw_tone: Tone = Tone.RAW_1
    dim: bool = False
    smooth: bool = False
    dashed: bool = False
    point: str = ""

    @classmethod
    def of(cls, label: str, x: Floats, y: Floats, **more: object) -> "Curve":
        """A curve whose samples are single values."""
        return cls(label=label, x=x, mean=y, low=y, high=y, **more)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened at a step: a glyph on the axis, and a line through the plot if `line`."""

    x: float
    glyph: str
    tone: Tone = Tone.MARK
    line: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Chart:
    """What to draw. `span_y` None fits the data; with `log_y` it is in log10. `crosshair` is a value of x."""

    curves: Sequence[Curve]
    span_x: Span
    span_y: Span | None = None
    log_y: bool = False
    marks: Sequence[Mark] = ()
    crosshair: float | None = None
    glyphs: Glyphs = "braille"


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A drawn chart. `plot` is where the plot lies in the grid: x, y, width, height in cells.

    `bad` counts the columns with NaN or infinities, `span_y` is the range that was shown.
    """

    grid: Grid
    plot: tuple[int, int, int, int]
    span_y: Span | None
    bad: int = 0
    empty: bool = False


@dataclass(kw_only=True, eq=False)
class _Plot:
    """The plot's cells while they are drawn."""

    width: int
    height: int
    glyphs: Glyphs
    codes: raster.Codes = field(init=False)
    tones: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]" = field(init=False)

    def __post_init__(self) -> None:
        self.codes = np.full((self.height, self.width), _EMPTY, np.uint32)
        self.tones = np.full((self.height, self.width), int(Tone.FAINT), np.uint8)

    def draw(self, dots: Flags, tone: Tone, *, over: bool) -> None:
        """Add a curve's dots. A cell shared by two curves has the dots of both, or with `over` only the new ones."""
        codes = raster.characters(dots, self.glyphs)
        hit = codes != _EMPTY
        if over or self.glyphs != "braille":
            np.copyto(self.codes, codes, where=hit)
        else:
            both = hit & (self.codes != _EMPTY)
            np.copyto(self.codes, np.where(both, self.codes | codes, codes), where=hit)
        self.tones[hit] = tone

    def set(self, row: int, column: int, glyph: str, tone: Tone) -> None:
        if 0 <= row < self.height and 0 <= column < self.width:
            self.codes[row, column], self.tones[row, column] = ord(glyph), tone


def edges_of(span: Span, width: int) -> Floats:
    """Borders of `width` equal columns over a range."""
    return np.linspace(span.low, span.high, width + 1)


def data_range(columns: Sequence[Columns], *, log: bool) -> tuple[float, float] | None:
    """The smallest and largest value there is to draw, in log10 with `log`; None without any."""
    lows = [column.low for column in columns if len(column.low)]
    highs = [column.high for column in columns if len(column.high)]
    if not lows:
        return None
    low, high = np.concatenate(lows), np.concatenate(highs)
    if log:
        low, high = low[low > 0], high[high > 0]
    if not np.isfinite(low).any() or not np.isfinite(high).any():
        return None
    bottom, top = float(np.nanmin(low)), float(np.nanmax(high))
    return (math.log10(bottom), math.log10(top)) if log else (bottom, top)


def _logged(columns: Columns) -> Columns:
    """Columns on a logarithmic axis. What is not above 0 has no place on it and counts as bad."""
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = {name: np.log10(getattr(columns, name)) for name in ("low", "high", "first", "last", "mean")}
    below = np.isfinite(columns.low) & ~(columns.low > 0)
    for name, values in parts.items():
        parts[name] = np.where(np.isfinite(values), values, parts["high"] if name != "high" else np.nan)
    return Columns(**{k: np.where(np.isfinite(v), v, np.nan) for k, v in parts.items()}, bad=columns.bad | below)


def render(chart: Chart, width: int, height: int) -> Picture:
    """Draw a chart into `width` x `height` cells: labels on the left, the axis of x in the last two rows.

    Axes are left out where there is no room for them and a plot. Every finite extreme of a curve within the ranges
    has a dot in its column; a column with NaN or infinities has a mark of its own on the bottom row.
    """
    grid = Grid(width, height)
    axis_rows = 2 if height >= 6 else 0
    rows = height - axis_rows
    across, down = raster.CELL[chart.glyphs]
    label_width = 7 if width >= 30 else 0
    columns = width - label_width - (1 if label_width else 0)
    if rows < 1 or columns < 2:
        return Picture(grid=grid, plot=(0, 0, 0, 0), span_y=None, empty=True)
    edges = edges_of(chart.span_x, columns * across)
    gathered = [raster.columns_of(curve.x, curve.low, curve.high, curve.mean, edges) for curve in chart.curves]
    bad = _any_bad(gathered, columns * across)
    found = data_range(gathered, log=chart.log_y)
    span_y = chart.span_y
    if span_y is None and found is not None:
        span_y = axes.settle(None, *found)
    plot = _Plot(width=columns, height=rows, glyphs=chart.glyphs)
    if span_y is not None:
        shown = [_logged(g) if chart.log_y else g for g in gathered]
        if chart.log_y and shown:
            bad = _any_bad(shown, columns * across)
        _draw_curves(plot, chart, shown, span_y, rows * down)
    _draw_marks(plot, chart)
    _draw_bad(plot, bad, chart.glyphs)
    _draw_crosshair(plot, chart)
    left = width - columns
    grid.codes[:rows, left:], grid.tones[:rows, left:] = plot.codes, plot.tones
    if label_width and span_y is not None:
        _draw_y_axis(grid, chart, span_y, left, rows)
    if axis_rows:
        _draw_x_axis(grid, chart, left, rows, columns)
    return Picture(grid=grid, plot=(left, 0, columns, rows), span_y=span_y, bad=int(bad.sum()), empty=found is None)


def _any_bad(gathered: Sequence[Columns], width: int) -> Flags:
    bad = np.zeros(width, np.bool_)
    for columns in gathered:
        bad |= columns.bad
    return bad


def _draw_curves(plot: _Plot, chart: Chart, gathered: Sequence[Columns], span: Span, rows: int) -> None:
    order = sorted(range(len(gathered)), key=lambda index: not chart.curves[index].dim)  # what is dim lies below
    for index in order:
        curve, columns = chart.curves[index], gathered[index]
        quiet = curve.dim or curve.smooth
        dots = raster.dots_of(columns, span.low, span.high, rows)
        if curve.dashed:
            dots[:, np.arange(dots.shape[1]) * plot.width // dots.shape[1] % _DASH == _DASH - 1] = False
        plot.draw(dots, curve.raw_tone if quiet else curve.tone, over=False)
    for index in order:
        curve, columns = chart.curves[index], gathered[index]
        if curve.smooth and not curve.dim:
            line = raster.smoothed(columns, max(1.5, len(columns.mean) / 70))
            plot.draw(raster.dots_of(line, span.low, span.high, rows), curve.tone, over=True)
        if curve.point:
            _draw_points(plot, curve, columns, span)


def _draw_points(plot: _Plot, curve: Curve, columns: Columns, span: Span) -> None:
    across = len(columns.mean) // plot.width
    where = np.flatnonzero(np.isfinite(columns.mean))
    if len(where) * 4 > plot.width:
        return  # too close together: the line tells it better
    for index in where.tolist():
        share = (columns.mean[index] - span.low) / (span.high - span.low)
        row = plot.height - 1 - int(min(max(share, 0.0), 1.0) * (plot.height - 1) + 0.5)
        plot.set(row, index // across, curve.point, curve.raw_tone if curve.dim else curve.tone)


def _column_of(x: float, span: Span, width: int) -> int | None:
    share = (x - span.low) / (span.high - span.low)
    return min(width - 1, int(share * width)) if 0 <= share <= 1 else None


def _draw_marks(plot: _Plot, chart: Chart) -> None:
    line = _AXIS[chart.glyphs][5]
    for mark in chart.marks:
        column = _column_of(mark.x, chart.span_x, plot.width)
        if column is None or not mark.line:
            continue
        free = plot.codes[:, column] == _EMPTY
        plot.codes[free, column], plot.tones[free, column] = ord(line), int(Tone.FAINT)
        plot.set(0, column, mark.glyph, mark.tone)


def _draw_bad(plot: _Plot, bad: Flags, glyphs: Glyphs) -> None:
    for column in sorted({index // (len(bad) // plot.width) for index in np.flatnonzero(bad).tolist()}):
        free = plot.codes[:, column] == _EMPTY
        plot.codes[free, column], plot.tones[free, column] = ord(_AXIS[glyphs][5]), int(Tone.ERROR)
        plot.set(plot.height - 1, column, _AXIS[glyphs][7], Tone.ERROR)


def _draw_crosshair(plot: _Plot, chart: Chart) -> None:
    if chart.crosshair is None:
        return
    column = _column_of(chart.crosshair, chart.span_x, plot.width)
    if column is None:
        return
    free = plot.codes[:, column] == _EMPTY
    plot.codes[free, column] = ord(_AXIS[chart.glyphs][6])
    plot.tones[free, column] = int(Tone.CROSSHAIR)


def _draw_y_axis(grid: Grid, chart: Chart, span: Span, left: int, rows: int) -> None:
    tick, bar = _AXIS[chart.glyphs][0], _AXIS[chart.glyphs][1]
    for y in range(rows):
        grid.put(left - 1, y, bar, Tone.FAINT)
    count = max(2, min(6, rows // 3))
    ticks = axes.log_ticks(span, count) if chart.log_y else axes.linear_ticks(span, count)
    step = float(ticks[1] - ticks[0]) if len(ticks) > 1 else span.high - span.low
    biggest = float(np.abs(ticks).max()) if len(ticks) else 0.0
    for value in ticks.tolist():
        row = rows - 1 - round((value - span.low) / (span.high - span.low) * (rows - 1))
        label = axes.tick_label(10.0**value, 10.0**value) if chart.log_y else axes.tick_label(value, step, biggest)
        grid.put_right(row, label[:6], Tone.DIM, right=left - 2)
        grid.put(left - 1, row, tick, Tone.FAINT)


def _draw_x_axis(grid: Grid, chart: Chart, left: int, rows: int, columns: int) -> None:
    look = _AXIS[chart.glyphs]
    if left:
        grid.put(left - 1, rows, look[2], Tone.FAINT)
    grid.put(left, rows, look[3] * columns, Tone.FAINT)
    ticks = axes.linear_ticks(chart.span_x, max(2, columns // 10))
    step = float(ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0
    behind = 0
    for value in ticks.tolist():
        column = _column_of(value, chart.span_x, columns)
        if column is None:
            continue
        grid.put(left + column, rows, look[4], Tone.FAINT)
        label = axes.tick_label(value, step)
        at = min(max(left + column - (len(label) - 1) // 2, 0), grid.width - len(label))
        if at > behind or behind == 0:
            grid.put(at, rows + 1, label, Tone.DIM)
            behind = at + len(label)
    for mark in chart.marks:
        column = _column_of(mark.x, chart.span_x, columns)
        if column is not None:
            grid.put(left + column, rows, mark.glyph, mark.tone)


def value_at(curve: Curve, x: float, span: Span, width: int) -> tuple[float, float, float] | None:
    """Smallest, mean and largest value of a curve in the cell that holds `x`, or at the newest sample before it."""
    if not len(curve.x) or x < curve.x[0]:
        return None
    cell = (span.high - span.low) / max(1, width)
    start = span.low + math.floor((x - span.low) / cell) * cell
    a, b = (int(i) for i in np.searchsorted(curve.x, [start, start + cell]))
    if a >= b:
        a, b = max(0, min(a, len(curve.x)) - 1), max(1, min(a, len(curve.x)))
    low, mean, high = curve.low[a:b], curve.mean[a:b], curve.high[a:b]
    if np.isfinite(low).any() and np.isfinite(mean).any():
        return float(np.nanmin(low)), float(np.nanmean(mean)), float(np.nanmax(high))
    return math.nan, math.nan, math.nan
