"""What all dialogs share: they say what will happen, Esc steps out, and Enter is never the dangerous answer.

A dangerous answer is `y`, Ctrl+Y while a text is being typed, or Ctrl+Enter where the terminal sends it (many do not).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Input, Label, Static

from trainctl.client.figures import plain
from trainctl.client.model import RunModel
from trainctl.tui import figures
from trainctl.tui.theme import Look
from trainctl.wire.commands import Action, check

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A command as a dialog leaves it: what to do, and whether to undo it by itself."""

    action: Action
    revert_after: int | None = None
    unless: str | None = None


class NumberField(Input):
    """An input for one number. `y` is never part of a number, so it applies."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("y", "screen.apply", show=False, priority=True)]

    def __init__(self, value: str = "", *, placeholder: str = "", id: str | None = None) -> None:  # noqa: A002
        super().__init__(value, placeholder=placeholder, id=id, restrict=r"[0-9eE.+\-]*", compact=True)

    def number(self) -> float | None:
        """The number, None when empty. Raises ValueError with what to type."""
        text = self.value.strip()
        if not text:
            return None
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number: type for example 0.5 or 3e-4") from None

    def count(self) -> int | None:
        """A whole number of 0 or more, None when empty. Raises ValueError with what to type."""
        number = self.number()
        if number is None:
            return None
        if number < 0 or number != int(number):
            raise ValueError(f"{self.value.strip()!r} is not a whole number of 0 or more")
        return int(number)


class TextField(Input):
    """An input for words."""

    def __init__(self, value: str = "", *, placeholder: str = "", id: str | None = None) -> None:  # noqa: A002
        super().__init__(value, placeholder=placeholder, id=id, compact=True)


def field_row(*parts: str | Widget) -> Horizontal:
    """Words and inputs on one line."""
    return Horizontal(*(Label(part, markup=False) if isinstance(part, str) else part for part in parts), classes="row")


def where_and_when(model: RunModel, *, brief: bool = False) -> str:
    """On which run, how many ranks and at which step a command would act.

    A run that is held acts at once, at the step it is held at; a moving one gets a few steps further meanwhile.
    """
    ranks = figures.plural(model.info.world_size if model.info else len(model.ranks), "rank")
    step = model.state.step if model.state else 0
    if model.state is not None and model.state.state == "paused":
        if brief:
            return f"{plain(model.name)} · {ranks} · now, held at {step:,}"
        return f"{plain(model.name)} · on {ranks} · applies now, at step {step:,}, while the run is held"
    if brief:
        return f"{plain(model.name)} · {ranks} · ≈ step {step + _STEPS_ON_THE_WAY:,}"
    return f"{plain(model.name)} · applies on {ranks} at the next boundary (≈ step {step + _STEPS_ON_THE_WAY:,})"


_STEPS_ON_THE_WAY = 3

NARROW = 80  # columns below which a dialog puts every field on a line of its own
SHORT = 20  # rows below which it leaves out what only explains


class Box(VerticalScroll, can_focus=False):
    """The frame of a dialog: its foot stays in sight, the rest scrolls where the terminal is too small for it."""


class Dialog(ModalScreen[Wish | None]):
    """Base: subclasses give `title`, `body()` and `wish()`."""

    DEFAULT_CSS = """
    Dialog { align: center middle; background: $background 60%; }
    Dialog > #box {
        width: 84; max-width: 96%; height: auto; max-height: 96%;
        background: $surface; border: round $primary 60%; padding: 0 2;
    }
    Dialog #title { text-style: bold; color: $foreground; }
    Dialog #where { color: $foreground 60%; margin-bottom: 1; }
    Dialog .row { height: 1; width: 100%; }
    Dialog .row Label { padding-right: 1; color: $foreground 70%; }
    Dialog .words { color: $foreground 85%; height: auto; }
    Dialog .bad { color: $error; }
    Dialog Input { width: 14; background: $panel; margin-right: 2; }
    Dialog TextField { width: 1fr; }
    Dialog #foot { dock: bottom; height: auto; background: $surface; }
    Dialog #problem { color: $error; height: auto; display: none; margin-top: 1; }
    Dialog #keys { color: $foreground 70%; width: 100%; text-align: right; margin-top: 1; }
    Dialog.-narrow > #box { padding: 0 1; }
    Dialog.-narrow .row { layout: grid; grid-size: 2; grid-columns: auto 1fr; grid-rows: 1; height: auto; }
    Dialog.-narrow .row Input { margin-right: 0; }
    Dialog.-short > #box { max-height: 100%; }
    Dialog.-short #where, Dialog.-short #problem, Dialog.-short #keys { margin: 0; }
    Dialog.-short .aside { display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "cancel", show=False, priority=True),
        Binding("y", "apply", "apply", show=False),
        Binding("ctrl+y,ctrl+enter,ctrl+j", "apply", "apply", show=False, priority=True),
    ]
    AUTO_FOCUS: ClassVar[str | None] = "Input"
    title_text = ""
    verb = "apply"
    enter_applies = False
    types_words = False

    def __init__(self, model: RunModel, look: Look) -> None:
        super().__init__()
        self.model = model
        self.look = look
        self.HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (NARROW, "-wide")]
        self.VERTICAL_BREAKPOINTS = [(0, "-short"), (SHORT, "-tall")]

    def compose(self) -> ComposeResult:
        with Box(id="box"):
            yield Static(self.title_text, id="title", markup=False)
            yield Static("", id="where", markup=False)
            yield from self.body()
            with Vertical(id="foot"):
                yield Static("", id="problem", markup=False)
                yield Static("", id="keys", markup=False)
        self.set_interval(1.0, self._say_where)

    def on_resize(self, event: events.Resize) -> None:
        """Say it in fewer words where there is less room."""
        del event
        self._say_where()
        self.query_one("#keys", Static).update(self._keys_text(narrow=self.app.size.width < NARROW))

    def _say_where(self) -> None:
        """The run goes on, or is held, while the dialog is open."""
        brief = self.app.size.width < NARROW
        self.query_one("#where", Static).update(where_and_when(self.model, brief=brief))

    def _keys_text(self, *, narrow: bool) -> str:
        typed = self.types_words and not self.enter_applies
        apply = ("Enter" if self.types_words else "Enter or y") if self.enter_applies else "y"
        if narrow:
            return f"Esc cancel  {'Enter' if self.enter_applies else 'Ctrl+Y' if typed else apply} {self.verb}"
        return f"Esc cancel    {apply} {self.verb}{' (Ctrl+Y while typing)' if typed else ''}"

    def body(self) -> Iterable[Widget]:
        """The widgets between the head and the keys."""
        return ()

    def wish(self) -> Wish:
        """What is asked for. Raises ValueError with a sentence that says what to type."""
        raise NotImplementedError

    def tell(self, problem: str) -> None:
        """Show a problem, or take it away with an empty text."""
        line = self.query_one("#problem", Static)
        line.display = bool(problem)
        line.update(problem)

    def action_apply(self) -> None:
        try:
            wish = self.wish()
        except ValueError as error:
            self.tell(str(error))
            return
        if (problem := check(wish.action)) is not None:
            self.tell(problem)
            return
        self.dismiss(wish)

    def action_leave(self) -> None:
        self.dismiss(None)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter goes on to the next field, or applies what does no harm."""
        event.stop()
        if self.enter_applies:
            self.action_apply()
        else:
            self.focus_next(Input)
