"""The widget of one plot: focus, crosshair, zoom."""

from dataclasses import replace
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType

from trainctl.tui.canvas import Canvas
from trainctl.tui.feed import Feed
from trainctl.tui.plot_view import DrawnPlot, PlotView, Timeline, draw_plot
from trainctl.tui.plots import Plot
from trainctl.tui.theme import Look

_LEAST_ZOOM = 20.0


class ChartView(Canvas, can_focus=True):
    """Draws a plot when told to and when somebody looks at it in another way."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "crosshair", show=False),
        Binding("right", "move(1)", "crosshair", show=False),
        Binding("shift+left", "move(-10)", "crosshair", show=False),
        Binding("shift+right", "move(10)", "crosshair", show=False),
        Binding("plus,equals_sign", "zoom(0.5)", "zoom in", show=False),
        Binding("minus", "zoom(2)", "zoom out", show=False),
        Binding("y", "log", "log axis", show=False),
        Binding("s", "smooth", "smoothing", show=False),
        Binding("escape", "plain", "plain view", show=False),
    ]

    def __init__(self, look: Look, plot: Plot, feed: Feed, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(look, id=id)
        self.plot = plot
        self.feed = feed
        self.view = PlotView()
        self.timeline = Timeline()
        self.hint = ""
        self.drawn: DrawnPlot | None = None

    def set_plot(self, plot: Plot) -> None:
        """Show another plot, from its plain view."""
        if plot != self.plot:
            same = plot.title == self.plot.title
            self.plot = plot
            if not same:
                self.view = PlotView()

    def draw(self, timeline: Timeline | None = None) -> None:
        """Draw again from the feed."""
        if timeline is not None:
            self.timeline = timeline
        width, height = self.size.width, self.size.height
        if width < 4 or height < 2:
            return
        self.drawn = draw_plot(
            self.plot,
            self.feed,
            self.view,
            self.timeline,
            self.look,
            width=width,
            height=height,
            focused=self.has_focus,
            hint=self.hint,
        )
        self.view = replace(self.view, span_y=self.drawn.span_y)
        self.show(self.drawn.grid)

    def on_resize(self) -> None:
        self.draw()

    def on_focus(self) -> None:
        self.draw()

    def on_blur(self) -> None:
        self.draw()

    def action_move(self, cells: int) -> None:
        """Move the crosshair; the first press puts it on the newest step."""
        if self.drawn is None or not self.drawn.plot[2]:
            return
        span, columns = self.drawn.span_x, self.drawn.plot[2]
        cell = (span.high - span.low) / columns
        at = self.view.crosshair
        # The middle of a cell, so that a move always reaches the next one.
        moved = float(self.timeline.step) if at is None else at + cells * cell
        self.view = replace(self.view, crosshair=min(max(moved, span.low + cell / 2), span.high - cell / 2))
        self.draw()

    def action_zoom(self, factor: float) -> None:
        have = self.view.zoom if self.view.zoom is not None else max(_LEAST_ZOOM, float(self.timeline.step))
        zoom = max(_LEAST_ZOOM, have * factor)
        self.view = replace(self.view, zoom=None if zoom >= self.timeline.step else zoom, span_y=None)
        self.draw()

    def action_log(self) -> None:
        self.view = replace(self.view, log_y=not self.view.log_y, span_y=None)
        self.draw()

    def action_smooth(self) -> None:
        self.view = replace(self.view, smooth=not self.view.smooth)
        self.draw()

    def action_plain(self) -> None:
        """Crosshair away; a second press leaves the zoom."""
        if self.view.crosshair is not None:
            self.view = replace(self.view, crosshair=None)
        elif self.view.zoom is not None:
            self.view = replace(self.view, zoom=None, span_y=None)
        else:
            self.screen.set_focus(None)
        self.draw()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if event.button:
            self._point(event.x)

    def on_click(self, event: events.Click) -> None:
        self._point(event.x)

    def _point(self, x: int) -> None:
        if self.drawn is None:
            return
        left, _, columns, _ = self.drawn.plot
        if left <= x < left + columns:
            span = self.drawn.span_x
            step = span.low + (x - left + 0.5) / columns * (span.high - span.low)
            self.view = replace(self.view, crosshair=step)
            self.draw()
