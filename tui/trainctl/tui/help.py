"""The help: keys of the run's screen and how to read it."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from trainctl.tui.keyline import ACTING, SCREENS
from trainctl.wire.commands import REGISTRY

_LOOKS = (
    ("Tab", "next chart, Shift+Tab the one before"),
    ("← →", "crosshair on the focused chart, or click; Shift moves by ten"),
    ("+ -", "newest steps only, more of them"),
    ("y  s", "logarithmic axis, smoothing"),
    ("space", "freeze the view; training goes on"),
    ("/", "filter events"),
    (":", "palette: every command by name"),
    ("Esc", "one step out"),
    ("q", "leave the cockpit; training goes on"),
)
_READING = (
    ("▲", "checkpoint"),
    ("↩", "rollback: what was abandoned stays, dim"),
    ("◇", "learning rate changed by an operator"),
    ("✖", "NaN or infinity at this step"),
    ("▲ ▼", "beside a number: which way it went in the last minute"),
)
_ANSWERS = (
    "Enter never does what cannot be undone: it goes to the next field. `y` confirms, Ctrl+Y while you",
    "type words, and Ctrl+Enter in terminals that send it. Esc leaves everything as it is.",
)


def help_sections() -> list[tuple[str, list[str]]]:
    """Titles and lines."""
    screens = ", ".join(name for _, name in SCREENS)
    return [
        ("Upper case acts", [f"{key:<7}{label:<12}{REGISTRY[command].summary}" for key, command, label, _ in ACTING]),
        (
            "Lower case looks",
            [
                f"1-{len(SCREENS)}    {screens}",
                *(f"{key:<7}{words}" for key, words in _LOOKS),
                "On the checkpoints' screen R rolls back to the chosen one, K pins or unpins it, v verifies it.",
            ],
        ),
        ("Signs", [f"{glyph:<7}{words}" for glyph, words in _READING]),
        ("Dialogs", [*_ANSWERS]),
    ]


class HelpScreen(ModalScreen[None]):
    """Closes with any of the usual keys."""

    DEFAULT_CSS = """
    HelpScreen { align: center middle; background: $background 60%; }
    HelpScreen > VerticalScroll {
        width: 116; max-width: 96%; height: auto; max-height: 94%;
        background: $surface; border: round $primary 60%; padding: 0 2;
    }
    HelpScreen .title { text-style: bold; color: $primary; }
    HelpScreen Static { margin-bottom: 1; }
    HelpScreen .title { margin-bottom: 0; }
    HelpScreen #keys { dock: bottom; margin: 0; background: $surface; color: $foreground 70%; text-align: right; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter", "dismiss(None)", show=False)]

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            for title, lines in help_sections():
                yield Static(title, classes="title", markup=False)
                yield Static("\n".join(lines), markup=False)
            yield Static("↑ ↓ scroll  Esc close", id="keys", markup=False)
