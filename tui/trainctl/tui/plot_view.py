"""One plot as it stands on the screen: title, legend, read-out and chart, drawn from the feed. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from trainctl.client.model import RunModel
from trainctl.tui import axes, figures
from trainctl.tui.axes import Span
from trainctl.tui.chart import Chart, Curve, Mark, data_range, edges_of, render, value_at
from trainctl.tui.feed import Feed, Samples, pace
from trainctl.tui.grid import Grid, Piece, fit, width_of
from trainctl.tui.plots import Line, Plot
from trainctl.tui.raster import columns_of
from trainctl.tui.theme import Look, Symbols
from trainctl.tui.tones import Tone
from trainctl.wire.messages import CommandUpdate, Event, RolledBack

_ZOOM_EIGHTHS = 8


@dataclass(frozen=True, kw_only=True)
class PlotView:
    """How somebody looks at a plot. `zoom`: only so many of the newest steps; `crosshair`: a step; `span_y`: the range
    shown last, kept as long as it fits."""

    zoom: float | None = None
    crosshair: float | None = None
    log_y: bool = False
    smooth: bool = True
    span_y: Span | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnPlot:
    """`plot` is where the chart's cells lie: x, y, width, height. `bad`: columns with NaN or infinities."""

    grid: Grid
    plot: tuple[int, int, int, int]
    span_x: Span
    span_y: Span | None
    bad: int = 0


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What the axis of steps needs to know of the run."""

    step: int = 0
    total_steps: int | None = None
    marks: Sequence[Mark] = field(default=())


def still_true(event_step: int, event_incarnation: int, rollbacks: Iterable[RolledBack]) -> bool:
    """Whether something that happened at a step belongs to the live branch."""
    return all(event_step <= back.step for back in rollbacks if back.from_incarnation >= event_incarnation)


def marks_of(model: RunModel, symbols: Symbols) -> list[Mark]:
    """Checkpoints, rollbacks and changes of the learning rate on the live branch."""
    rollbacks = [event for event in model.events if isinstance(event, RolledBack)]
    marks = [
        Mark(x=info.step, glyph=symbols.checkpoint, tone=Tone.ERROR if info.verified is False else Tone.MARK)
        for info in model.checkpoints
        if still_true(info.step, info.incarnation, rollbacks)
    ]
    marks += [
        Mark(x=event.step, glyph=symbols.lr, tone=Tone.CURVE_2, line=True)
        for event in model.events
        if _changes_lr(event) and still_true(event.step, event.incarnation, rollbacks)
    ]
    # Last, so that they stay visible where several things happened in one column.
    marks += [Mark(x=event.step, glyph=symbols.rollback, tone=Tone.WARNING, line=True) for event in rollbacks]
    return marks


def _changes_lr(event: Event) -> bool:
    return isinstance(event, CommandUpdate) and event.command.startswith("lr ") and event.state == "applied"


def steps_shown(timeline: Timeline, first: float, zoom: float | None) -> Span:
    """The range of steps: everything, or the newest `zoom`; moves in strides so that columns keep their place."""
    last = max(1.0, float(timeline.step))
    if zoom is not None:
        stride = zoom / _ZOOM_EIGHTHS
        end = max(zoom, math.ceil(last / stride) * stride)
        return Span(low=end - zoom, high=end)
    end = axes.step_end(last, timeline.total_steps)
    low = 0.0
    if first > 0.3 * end:
        power = 10.0 ** math.floor(math.log10(max(1.0, end - first)))
        low = max(0.0, math.floor(first / power) * power)
    return Span(low=low, high=max(end, low + 1.0))


def draw_plot(
    plot: Plot,
    feed: Feed,
    view: PlotView,
    timeline: Timeline,
    look: Look,
    *,
    width: int,
    height: int,
    focused: bool = False,
    hint: str = "",
) -> DrawnPlot:
    """Draw a plot into `width` x `height` cells, the first row for title and legend."""
    shown = [(line, _samples(plot, line, feed)) for line in plot.lines]
    firsts = [float(samples.step[0]) for _, samples in shown if len(samples)]
    span_x = steps_shown(timeline, min(firsts, default=0.0), view.zoom)
    curves = [*_abandoned(plot, feed), *(_curve(line, samples, view, look) for line, samples in shown)]
    chart = Chart(
        curves=curves,
        span_x=span_x,
        log_y=view.log_y,
        marks=timeline.marks,
        crosshair=view.crosshair,
        glyphs=look.glyphs,
    )
    span_y = _settled(chart, view, width)
    drawn = render(replace(chart, span_y=span_y), width, height - 1)
    grid = Grid(width, height)
    grid.paste(drawn.grid, 0, 1)
    left, top, columns, rows = drawn.plot
    if drawn.empty and rows:
        text = fit("nothing logged yet", columns)
        grid.put(left + (columns - len(text)) // 2, 1 + rows // 2, text, Tone.DIM)
    live = curves[-len(shown) :]
    readout = _readout(plot, live, view, span_x, columns)
    if not readout and plot.with_value and len(shown[0][1]):
        readout = [(value_text(plot, float(shown[0][1].mean[-1])), Tone.STRONG)]
    _draw_title(grid, plot, look, view, drawn.bad, readout, focused=focused, hint=hint, only_main=len(shown) < 2)
    return DrawnPlot(grid=grid, plot=(left, top + 1, columns, rows), span_x=span_x, span_y=span_y, bad=drawn.bad)


def _samples(plot: Plot, line: Line, feed: Feed) -> Samples:
    samples = feed.curve(line.metric)
    return pace(samples) if plot.pace else samples


def _curve(line: Line, samples: Samples, view: PlotView, look: Look) -> Curve:
    return Curve(
        label=line.label,
        x=samples.step,
        mean=samples.mean,
        low=samples.low,
        high=samples.high,
        tone=line.tone,
        raw_tone=line.raw_tone,
        smooth=line.smooth and view.smooth,
        dashed=line.dashed,
        point=look.symbols.point if line.sparse else "",
    )


def _abandoned(plot: Plot, feed: Feed) -> list[Curve]:
    if plot.pace:
        return []
    return [
        Curve(
            label="",
            x=samples.step,
            mean=samples.mean,
            low=samples.low,
            high=samples.high,
            raw_tone=Tone.FAINT,
            dim=True,
        )
        for branch in feed.branches
        for line in plot.lines[-1:] + plot.lines[:-1]
        if (samples := branch.curves.get(line.metric)) is not None and len(samples)
    ]


def _settled(chart: Chart, view: PlotView, width: int) -> Span | None:
    edges = edges_of(chart.span_x, max(2, width))
    found = data_range([columns_of(c.x, c.low, c.high, c.mean, edges) for c in chart.curves], log=chart.log_y)
    return axes.settle(view.span_y, *found) if found is not None else view.span_y


def value_text(plot: Plot, value: float) -> str:
    """A value of a plot in the form its kind is read in."""
    if plot.kind == "lr":
        return figures.learning_rate(value)
    return figures.quantity(value) if plot.kind == "rate" else figures.number(value)


def _readout(plot: Plot, curves: Sequence[Curve], view: PlotView, span: Span, columns: int) -> list[Piece]:
    if view.crosshair is None:
        return []
    pieces: list[Piece] = [(f"step {view.crosshair:,.0f}", Tone.STRONG)]
    for curve in curves:
        found = value_at(curve, view.crosshair, span, columns)
        if found is None:
            continue
        low, mean, high = found
        text = value_text(plot, mean)
        if high > low and value_text(plot, low) != value_text(plot, high):
            text += f" ({value_text(plot, low)}…{value_text(plot, high)})"
        pieces.append((f"  {curve.label + ' ' if curve.label else ''}{text}", curve.tone))
    return pieces


def _draw_title(
    grid: Grid,
    plot: Plot,
    look: Look,
    view: PlotView,
    bad: int,
    readout: Sequence[Piece],
    *,
    focused: bool,
    hint: str,
    only_main: bool,
) -> None:
    x = grid.put(1, 0, plot.title, Tone.FOCUS if focused else Tone.TITLE)
    if readout:
        grid.put_pieces(x + 3, 0, readout)
        return
    if not only_main:
        for line in plot.lines:
            symbols = look.symbols
            sign = symbols.point if line.sparse else symbols.dashes if line.dashed else symbols.line
            x = grid.put_pieces(x + 2, 0, [(sign, line.tone), (f" {line.label}", Tone.DIM)])
    notes: list[Piece] = [
        (text, tone)
        for text, tone in (
            ("  NaN or inf in " + (f"{bad} places" if bad > 1 else "one place"), Tone.ERROR if bad else Tone.DIM),
            ("  log", Tone.DIM),
            (f"  last {view.zoom or 0:,.0f} steps", Tone.DIM),
        )
        if (bad and "NaN" in text) or (view.log_y and "log" in text) or (view.zoom and "last" in text)
    ]
    x = grid.put_pieces(x, 0, notes)
    if hint and x + 2 + width_of(hint) <= grid.width:
        grid.put_right(0, hint, Tone.DIM)
