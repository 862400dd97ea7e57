"""The one screen of the cockpit: header, vitals, a body that the number keys change, and the line of keys."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import ContentSwitcher, Input

from trainctl.client.model import RunModel
from trainctl.tui import figures
from trainctl.tui.canvas import Canvas
from trainctl.tui.commander import Commander
from trainctl.tui.dialog import TextField
from trainctl.tui.event_lines import Progress, news_of
from trainctl.tui.feed import Feed
from trainctl.tui.grid import Grid
from trainctl.tui.header import draw_header, draw_vitals, headline, lateness, vitals
from trainctl.tui.help import HelpScreen
from trainctl.tui.keyline import Key, draw_banner, draw_keys, keys_for
from trainctl.tui.run_view import RunView
from trainctl.tui.small import draw_small_header, draw_small_hint
from trainctl.tui.table import TableView
from trainctl.tui.tables import checkpoints_table, events_table, nodes_table, ranks_table
from trainctl.tui.theme import Look
from trainctl.tui.tight import TightCompositor

TICKS_PER_S = 4


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the screen shows and acts through."""

    model: RunModel
    feed: Feed
    look: Look
    progress: Progress
    commander: Commander
    ready: Callable[[], None]


class CockpitScreen(Screen[None]):
    """Draws itself from the model: vitals twice a second, charts and lists once, news at once."""

    DEFAULT_CSS = """
    CockpitScreen { background: $background; layout: vertical; overflow: hidden; }
    CockpitScreen #body { height: 1fr; }
    CockpitScreen #body TableView { height: 1fr; margin: 1 0; }
    CockpitScreen #filter { display: none; height: 1; background: $panel; margin: 0 1; width: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(key, f"act('{command}')", command, show=False)
            for key, command in (
                ("P", "pause"),
                ("L", "lr scale"),
                ("C", "checkpoint save"),
                ("R", "rollback"),
                ("S", "stop"),
                ("T", "set"),
                ("E", "eval"),
            )
        ),
        *(
            Binding(key, f"look('{name}')", name, show=False)
            for key, name in (("1", "run"), ("2", "ranks"), ("3", "nodes"), ("4", "checkpoints"), ("5", "events"))
        ),
        Binding("K", "pin", "keep", show=False),
        Binding("v", "verify", "verify", show=False),
        Binding("slash", "filter", "filter", show=False),
        Binding("colon", "app.command_palette", "palette", show=False),
        Binding("question_mark", "help", "help", show=False),
        Binding("space", "freeze", "freeze", show=False),
        Binding("tab", "next_chart(1)", "next chart", show=False),
        Binding("shift+tab", "next_chart(-1)", "chart before", show=False),
        Binding("escape", "step_out", "step out", show=False),
    ]
    AUTO_FOCUS = ""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._compositor = TightCompositor()
        self.parts = parts
        self.model, self.look = parts.model, parts.look
        self.shown = "run"
        self.frozen_at: float | None = None
        self.words = ""
        self.seen_until = 0.0
        self._ticks = 0
        self._vital_rows = 1
        self._keys: list[Key] = []
        self.ready = False

    def compose(self) -> ComposeResult:
        yield Canvas(self.look, id="header")
        yield Canvas(self.look, id="vitals")
        with ContentSwitcher(initial="run", id="body"):
            yield RunView(self.model, self.parts.feed, self.look)
            yield TableView(self.look, id="ranks")
            yield TableView(self.look, id="nodes")
            yield TableView(self.look, id="checkpoints")
            yield TableView(self.look, id="events", follow=True)
        yield TextField(id="filter", placeholder="words that an event must have; Esc clears")
        yield Canvas(self.look, id="keys")

    def on_mount(self) -> None:
        self.seen_until = time.time()
        self.ready = True
        self.redraw()
        self.parts.ready()
        self.set_interval(1 / TICKS_PER_S, self.tick)

    def on_resize(self, event: events.Resize) -> None:
        del event
        self._vital_rows = 1
        self.call_after_refresh(self.redraw)

    # --- drawing

    @property
    def run_view(self) -> RunView:
        return self.query_one(RunView)

    def redraw(self) -> None:
        """Draw everything now."""
        self._arrange()
        self._draw_top()
        self._draw_body()
        self._draw_keys()

    def news(self) -> None:
        """Something happened that should not wait: a state, an event, a command's progress."""
        if self.ready and self.frozen_at is None:
            self._arrange()
            self._draw_top()
            self._draw_events()
            self._draw_keys()

    def tick(self) -> None:
        """A quarter of a second went by."""
        self._ticks += 1
        if self.frozen_at is not None:
            self._draw_keys()
            return
        whole_second = self._ticks % TICKS_PER_S == 0
        if self._ticks % 2 == 0:
            self._draw_top()
            self._draw_events()
            self._draw_keys()
        if self.app.screen is not self:
            return  # a dialog lies above: what is behind it can wait
        if whole_second:
            self._arrange()
            self._draw_lists()
        if self.shown == "run":
            self.run_view.draw_next_charts(TICKS_PER_S)

    def _arrange(self) -> None:
        width, height = self.size.width, self.size.height
        if not width or not height:
            return
        found = vitals(self.model, self.parts.feed, self.look.symbols)
        needed = sum(len(v.label) + len(v.value) + len(v.note) + 5 for v in found)
        header = self._header(width).height
        if needed >= width:
            self._vital_rows = 2  # and so it stays: a screen that moves up and down with its numbers cannot be read
        plan = self.run_view.divide(width, height, vital_rows=self._vital_rows, header_rows=header)
        self.query_one("#header").styles.height = plan.header
        self.query_one("#vitals").styles.height = plan.vitals

    def _draw_top(self) -> None:
        plan, width, symbols = self.run_view.plan, self.size.width, self.look.symbols
        if plan is None:
            return
        header = draw_small_header(self.model, symbols, width, tag=self._tag()) if plan.tiny else self._header(width)
        self.query_one("#header", Canvas).show(header)
        found = vitals(self.model, self.parts.feed, symbols)
        grid = draw_vitals(found, symbols, width, plan.vitals, lateness(self.model))
        self.query_one("#vitals", Canvas).show(grid)

    def _header(self, width: int) -> Grid:
        news = news_of(self.model.events, self.seen_until)
        return draw_header(self.model, self.look.symbols, width, news=news, tag=self._tag())

    def _tag(self) -> str:
        if self.model.link == "recorded":
            return "recorded"
        return "read-only" if self.parts.commander.read_only else ""

    def _draw_body(self) -> None:
        if self.shown == "run":
            self.run_view.draw_charts()
        self._draw_lists()
        self._draw_events()

    def _draw_lists(self) -> None:
        model, symbols = self.model, self.look.symbols
        match self.shown:
            case "run":
                self.run_view.draw_lines()
            case "ranks":
                self.query_one("#ranks", TableView).put(ranks_table(model, symbols))
            case "nodes":
                self.query_one("#nodes", TableView).put(nodes_table(model, symbols))
            case "checkpoints":
                self.query_one("#checkpoints", TableView).put(checkpoints_table(model, symbols, model.checkpoints))
            case _:
                self.seen_until = model.source_time()
                self.query_one("#events", TableView).put(events_table(model, symbols, self.words))

    def _draw_events(self) -> None:
        if self.shown == "run":
            self.run_view.draw_events(self.parts.progress.current(time.monotonic()))

    def _draw_keys(self) -> None:
        width, symbols = self.size.width, self.look.symbols
        canvas, plan = self.query_one("#keys", Canvas), self.run_view.plan
        if self.frozen_at is not None:
            canvas.show(draw_banner(self._frozen_words(width), width))
            self._keys = []
            return
        lines = self.parts.progress.current(time.monotonic())
        if self.shown != "run" and lines:
            # The event lines are on the run's screen; elsewhere the line of keys lends its place.
            grid, self._keys = draw_small_hint(lines[-1], width), []
        else:
            keys = keys_for(
                paused=self.model.state is not None and self.model.state.state == "paused",
                off=self.parts.commander.off(),
                screen=self.shown,
                short=width < 160,
                one_chart=plan is not None and plan.charts < len(self.run_view.plots),
                tiny=plan is not None and plan.tiny,
            )
            grid, self._keys = draw_keys(keys, symbols, width)
        canvas.show(grid)

    def _frozen_words(self, width: int) -> str:
        state = self.model.state
        head = headline(self.model, self.look.symbols)
        age = figures.duration(time.monotonic() - (self.frozen_at or 0.0))
        goes_on = "training goes on" if state is not None and state.state == "running" else f"the run is {head.word}"
        step = f", now at step {state.step:,}" if state is not None else ""
        words = f"VIEW FROZEN {age} — {goes_on}{step} · space thaws"
        return words if len(words) < width else f"FROZEN — {goes_on} · space thaws"

    # --- looking

    def action_look(self, name: str) -> None:
        """Change the body."""
        self.shown = name
        self.query_one("#body", ContentSwitcher).current = name
        if name == "run":
            self.set_focus(None)
        else:
            self.query_one(f"#{name}", TableView).focus()
        self.query_one("#filter").display = name == "events" and bool(self.words)
        self.call_after_refresh(self.redraw)

    def action_filter(self) -> None:
        """Words that an event must have."""
        self.action_look("events")
        field = self.query_one("#filter", TextField)
        field.display = True
        field.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self.words = event.value
        self._draw_lists()

    def on_input_submitted(self) -> None:
        self.query_one("#events", TableView).focus()

    def action_step_out(self) -> None:
        field = self.query_one("#filter", TextField)
        if self.shown == "events" and (field.has_focus or self.words):
            field.value = self.words = ""
            field.display = False
            self.query_one("#events", TableView).focus()
            self._draw_lists()
        elif self.shown != "run":
            self.action_look("run")
        else:
            self.set_focus(None)

    def action_freeze(self) -> None:
        """Hold the picture still, or let it go on."""
        self.frozen_at = time.monotonic() if self.frozen_at is None else None
        if self.frozen_at is None:
            self.redraw()
        else:
            self._draw_keys()

    def action_next_chart(self, step: int) -> None:
        if self.shown == "run":
            self.run_view.next_chart(step)
        else:
            self.query_one(f"#{self.shown}", TableView).focus()

    def action_help(self) -> None:
        self.app.push_screen(HelpScreen())

    # --- acting

    def _chosen_checkpoint(self) -> str:
        return self.query_one("#checkpoints", TableView).key or "" if self.shown == "checkpoints" else ""

    def action_act(self, command: str) -> None:
        self.parts.commander.press(command, target=self._chosen_checkpoint())

    def action_pin(self) -> None:
        self.parts.commander.toggle_pin(self._chosen_checkpoint())

    def action_verify(self) -> None:
        if checkpoint := self._chosen_checkpoint():
            self.parts.commander.verify(checkpoint)

    async def on_click(self, event: events.Click) -> None:
        """A click on a key of the bottom line presses it."""
        if event.screen_y != self.size.height - 1:
            return
        for key in self._keys:
            if key.place[0] <= event.screen_x < key.place[1]:
                names = {"?": "question_mark", "/": "slash", ":": "colon", "Tab": "tab"}
                self.app.simulate_key(names.get(key.key, key.key))
