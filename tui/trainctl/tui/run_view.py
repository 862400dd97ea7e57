"""The run's screen: charts, ranks, nodes, events."""

from textual.app import ComposeResult
from textual.containers import Container, Vertical

from trainctl.client.model import RunModel
from trainctl.tui.arrange import Plan, arrange, most_node_rows
from trainctl.tui.canvas import Canvas
from trainctl.tui.chart_view import ChartView
from trainctl.tui.event_lines import Line, draw_events
from trainctl.tui.feed import Feed
from trainctl.tui.nodes_panel import draw_nodes, node_rows
from trainctl.tui.plot_view import Timeline, marks_of
from trainctl.tui.plots import Plot, plots_for
from trainctl.tui.ranks_panel import draw_ranks, rank_rows
from trainctl.tui.theme import Look

MOST_CHARTS = 9


class RunView(Vertical):
    """Arranges itself for any size and draws its parts when told to, charts one after another."""

    DEFAULT_CSS = """
    RunView { height: 1fr; }
    RunView #charts { layout: grid; grid-size: 2 2; grid-gutter: 0 2; height: 1fr; }
    RunView ChartView { width: 1fr; height: 1fr; }
    """

    def __init__(self, model: RunModel, feed: Feed, look: Look) -> None:
        super().__init__(id="run")
        self.model = model
        self.feed = feed
        self.look = look
        self.plots: tuple[Plot, ...] = plots_for(())
        self.first = 0  # the first plot that is shown
        self.plan: Plan | None = None
        self._metrics: frozenset[str] = frozenset()
        self._turn = 0
        self._drawn_version: dict[int, tuple[int, int]] = {}

    def compose(self) -> ComposeResult:
        with Container(id="charts"):
            for index in range(MOST_CHARTS):
                yield ChartView(self.look, self.plots[index % 4], self.feed, id=f"chart-{index}")
        yield Canvas(self.look, id="ranks-line")
        yield Canvas(self.look, id="nodes-line")
        yield Canvas(self.look, id="events-lines")

    @property
    def charts(self) -> list[ChartView]:
        """The charts on the screen."""
        count = min(self.plan.charts if self.plan else 0, len(self.plots))
        return list(self.query(ChartView))[:count]

    def divide(self, width: int, height: int, *, vital_rows: int, header_rows: int) -> Plan:
        """Divide the terminal anew if anything changed; return the division."""
        names = frozenset(self.model.metrics)
        if names != self._metrics:
            self._metrics, self.plots = names, plots_for(names)
            self.plan = None
        plan = arrange(
            width,
            height,
            plots=len(self.plots),
            vital_rows=vital_rows,
            rank_rows=rank_rows(self.model, width, 2),
            node_rows=node_rows(self.model, self.look.symbols, width, most_node_rows(height)),
            header_rows=header_rows,
        )
        if plan != self.plan:
            self._apply(plan)
        return plan

    def _apply(self, plan: Plan) -> None:
        self.plan = plan
        grid = self.query_one("#charts")
        grid.display = plan.charts > 0
        if plan.charts:
            grid.styles.grid_size_columns, grid.styles.grid_size_rows = plan.chart_columns, plan.chart_rows
        grid.styles.margin = (plan.gap, 0, plan.gap if not plan.tiny and plan.ranks and self._roomy(plan) else 0, 0)
        for name, rows in (("#ranks-line", plan.ranks), ("#nodes-line", plan.nodes), ("#events-lines", plan.events)):
            part = self.query_one(name)
            part.display = rows > 0
            part.styles.height = max(1, rows)
        if self.first >= len(self.plots) or plan.charts >= len(self.plots):
            self.first = 0
        self._assign()

    @staticmethod
    def _roomy(plan: Plan) -> bool:
        return plan.gap > 0 and plan.events >= 3

    def _assign(self) -> None:
        """Give every chart on the screen its plot."""
        shown = self.charts
        for view in self.query(ChartView):
            view.display = view in shown
        for index, view in enumerate(shown):
            number = (self.first + index) % len(self.plots)
            view.set_plot(self.plots[number])
            more = len(self.plots) > len(shown)
            view.hint = f"{number + 1} of {len(self.plots)}  Tab next" if more and index == 0 else ""
        self._drawn_version.clear()

    def next_chart(self, step: int) -> None:
        """Focus the next chart; past the last one on the screen the next plots come in."""
        shown = self.charts
        if not shown:
            return
        focused = next((index for index, view in enumerate(shown) if view.has_focus), None)
        at = (0 if step > 0 else len(shown) - 1) if focused is None else focused + step
        if len(shown) == 1 and len(self.plots) > 1:
            at = step
        if not 0 <= at < len(shown) and len(self.plots) > len(shown):
            self.first = (self.first + step * len(shown)) % len(self.plots)
            self._assign()
        view = shown[at % len(shown)]
        view.focus()
        self.draw_charts()

    # --- drawing

    def timeline(self) -> Timeline:
        return Timeline(
            step=self.model.state.step if self.model.state else 0,
            total_steps=self.model.total_steps,
            marks=marks_of(self.model, self.look.symbols),
        )

    def draw_charts(self) -> None:
        """Draw every chart now."""
        timeline = self.timeline()
        for view in self.charts:
            view.draw(timeline)

    def draw_next_charts(self, turns: int) -> None:
        """Draw a share of the charts, so that all have been drawn after `turns` calls; those without news are left."""
        shown = self.charts
        self._turn = (self._turn + 1) % turns
        due = [(index, view) for index, view in enumerate(shown) if index % turns == self._turn]
        if not due:
            return
        timeline = self.timeline()
        for index, view in due:
            version = (self.feed.version, len(timeline.marks))
            if self._drawn_version.get(index) != version:
                self._drawn_version[index] = version
                view.draw(timeline)

    def draw_lines(self, now: float | None = None) -> None:
        """Draw ranks and nodes."""
        plan = self.plan
        if plan is None:
            return
        width, symbols = self.size.width, self.look.symbols
        if plan.ranks:
            self.query_one("#ranks-line", Canvas).show(draw_ranks(self.model, symbols, width, plan.ranks, now))
        if plan.nodes:
            self.query_one("#nodes-line", Canvas).show(draw_nodes(self.model, symbols, width, plan.nodes, now))

    def draw_events(self, lines: list[Line]) -> None:
        if self.plan is not None and self.plan.events:
            grid = draw_events(self.model, self.look.symbols, self.size.width, self.plan.events, lines)
            self.query_one("#events-lines", Canvas).show(grid)
