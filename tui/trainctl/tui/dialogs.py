"""The dialogs of the acting keys, one class each."""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Input, Static

from trainctl.client.figures import plain, scalar
from trainctl.client.model import RunModel
from trainctl.tui import figures
from trainctl.tui.dialog import Box, Dialog, NumberField, TextField, Wish, field_row
from trainctl.tui.table import TableView
from trainctl.tui.tables import bounds, tunables_table
from trainctl.tui.theme import Look
from trainctl.wire.commands import (
    Abort,
    Action,
    AddNote,
    CheckpointRemove,
    CheckpointSave,
    LrScale,
    LrSet,
    Restart,
    SetTunable,
    Stop,
    check,
)
from trainctl.wire.expressions import ExpressionError, parse
from trainctl.wire.manifest import pick
from trainctl.wire.messages import Tunable


def undo_fields() -> Widget:
    """`undo by itself after [ ] steps unless [ ]`, for commands that may revert."""
    return field_row(
        "undo by itself after",
        NumberField(id="revert", placeholder="never"),
        "steps unless",
        TextField(id="unless", placeholder="for example loss < 2.3"),
    )


def undo_of(dialog: Dialog) -> tuple[int | None, str | None]:
    """What the undo fields say. Raises ValueError."""
    after = dialog.query_one("#revert", NumberField).count() or None
    unless = dialog.query_one("#unless", TextField).value.strip() or None
    if unless is not None:
        if after is None:
            raise ValueError("“unless” needs a number of steps after which to undo")
        try:
            parse(unless)
        except ExpressionError as error:
            raise ValueError(str(error)) from None
    return after, unless


def table_rows(dialog: Dialog, most: int) -> int:
    """Lines for a table to choose from, so that what is below it is still in sight on a short terminal."""
    return min(most, max(3, dialog.app.size.height - 12))


class LrDialog(Dialog):
    """Scale the schedule or pin a value; shows the rate now and after."""

    title_text = "Learning rate"
    types_words = True

    def body(self) -> Iterable[Widget]:
        yield field_row("scale the schedule by", NumberField("0.5", id="scale"), "or pin it at", NumberField(id="set"))
        yield Static("", id="preview", classes="words", markup=False)
        yield Static("", classes="aside")
        yield undo_fields()

    def on_mount(self) -> None:
        self._preview()

    def on_input_changed(self, event: Input.Changed) -> None:
        other = {"scale": "#set", "set": "#scale"}.get(event.input.id or "")
        if other and event.value and event.input.has_focus:
            self.query_one(other, NumberField).value = ""
        self.tell("")
        self._preview()

    def _numbers(self) -> tuple[float | None, float | None]:
        return self.query_one("#scale", NumberField).number(), self.query_one("#set", NumberField).number()

    def _preview(self) -> None:
        lr = self.model.state.lr if self.model.state else None
        now, scheduled = (lr.effective, lr.scheduled) if lr else (None, None)
        try:
            scale, value = self._numbers()
        except ValueError:
            scale = value = None  # half typed; the dialog says so when it is to be applied
        problem = check(self._action(scale, value)) if scale is not None or value is not None else None
        base = scheduled if scheduled is not None else now
        after = value if value is not None else scale * base if scale is not None and base is not None else None
        words = f"now {figures.learning_rate(now)} {self.look.symbols.arrow} {figures.learning_rate(after)} effective"
        words += f"      scheduled {figures.learning_rate(scheduled)}"
        preview = self.query_one("#preview", Static)
        preview.set_class(problem is not None, "bad")
        preview.update(words if problem is None else f"cannot be applied: {problem}")

    @staticmethod
    def _action(scale: float | None, value: float | None) -> Action:
        return LrScale(factor=scale) if scale is not None else LrSet(value=value or 0.0)

    def wish(self) -> Wish:
        scale, value = self._numbers()
        if (scale is None) == (value is None):
            raise ValueError("give a factor, or a value to pin the learning rate at")
        after, unless = undo_of(self)
        return Wish(action=self._action(scale, value), revert_after=after, unless=unless)


class CheckpointDialog(Dialog):
    """Save now. Harmless, so Enter does it."""

    title_text = "Save a checkpoint"
    verb = "save"
    enter_applies = True
    types_words = True

    def body(self) -> Iterable[Widget]:
        yield field_row("note", TextField(id="note", placeholder="optional"))

    def wish(self) -> Wish:
        return Wish(action=CheckpointSave(note=self.query_one("#note", TextField).value.strip() or None))


class NoteDialog(Dialog):
    """A line for the run's log."""

    title_text = "Write a note into the log"
    verb = "write"
    enter_applies = True
    types_words = True

    def body(self) -> Iterable[Widget]:
        yield field_row("note", TextField(id="note"))

    def wish(self) -> Wish:
        text = self.query_one("#note", TextField).value.strip()
        if not text:
            raise ValueError("type a note")
        return Wish(action=AddNote(text=text))


class StopDialog(Dialog):
    """End the training well."""

    title_text = "Stop the training"
    verb = "stop"
    AUTO_FOCUS = ""

    def body(self) -> Iterable[Widget]:
        step = self.model.state.step if self.model.state else 0
        total = self.model.total_steps
        left = f", {total - step:,} steps before its end" if total else ""
        yield Static(
            f"A checkpoint is saved, then every rank leaves its loop at one boundary{left}.",
            classes="words",
            markup=False,
        )
        yield Static("The run can be resumed from that checkpoint later.", classes="words aside", markup=False)

    def wish(self) -> Wish:
        return Wish(action=Stop())


class AbortDialog(Dialog):
    """End the training without saving."""

    title_text = "Abort the training"
    verb = "abort"
    AUTO_FOCUS = ""

    def body(self) -> Iterable[Widget]:
        step = self.model.state.step if self.model.state else 0
        good = [info.step for info in self.model.checkpoints if info.verified is not False]
        since = f"{step - max(good):,} steps since checkpoint {max(good):,} are lost" if good else "all steps are lost"
        yield Static(
            f"Every rank leaves its loop at one boundary. Nothing is saved: {since}.", classes="words", markup=False
        )

    def wish(self) -> Wish:
        return Wish(action=Abort())


class RestartDialog(Dialog):
    """End every rank at once and start the next attempt."""

    title_text = "Restart the training"
    verb = "restart"
    AUTO_FOCUS = ""

    def body(self) -> Iterable[Widget]:
        last = pick(self.model.checkpoints, "last")
        begins = (
            f"from checkpoint {last.id} (step {last.step:,})" if last is not None else "anew: nothing was saved yet"
        )
        yield Static(
            f"The nodes' agents end every rank now, at no boundary; the next attempt begins {begins}.",
            classes="words",
            markup=False,
        )
        aside = "For ranks that hang. From another checkpoint: trainctl restart --from."
        yield Static(aside, classes="words aside", markup=False)

    def wish(self) -> Wish:
        return Wish(action=Restart())


class RemoveDialog(Dialog):
    """Delete one checkpoint for good."""

    title_text = "Delete a checkpoint"
    verb = "delete"
    AUTO_FOCUS = ""

    def __init__(self, model: RunModel, look: Look, checkpoint: str) -> None:
        super().__init__(model, look)
        self.checkpoint = checkpoint

    def body(self) -> Iterable[Widget]:
        info = next((info for info in self.model.checkpoints if info.id == self.checkpoint), None)
        what = f"{self.checkpoint} of step {info.step:,}" if info is not None else self.checkpoint
        yield Static(f"{what} is deleted from the disk. Nothing brings it back.", classes="words", markup=False)
        aside = "The last good checkpoint and pinned ones are never deleted."
        yield Static(aside, classes="words aside", markup=False)

    def wish(self) -> Wish:
        return Wish(action=CheckpointRemove(checkpoint=self.checkpoint))


class TunablesDialog(Dialog):
    """What the script lets an operator change: choose one, type a value."""

    title_text = "Tunables"
    verb = "set"
    types_words = True
    AUTO_FOCUS = "TableView"
    DEFAULT_CSS = """
    TunablesDialog TableView { height: 8; margin-bottom: 1; }
    TunablesDialog.-short TableView { margin-bottom: 0; }
    """

    def __init__(self, model: RunModel, look: Look, tunables: Sequence[Tunable]) -> None:
        super().__init__(model, look)
        self.tunables = {tunable.name: tunable for tunable in tunables}

    def body(self) -> Iterable[Widget]:
        yield TableView(self.look, id="choose")
        yield Static("", id="which", classes="words", markup=False)
        yield field_row("new value", TextField(id="value"))
        yield undo_fields()

    def on_mount(self) -> None:
        view = self.query_one("#choose", TableView)
        view.styles.height = table_rows(self, 8)
        view.put(tunables_table(list(self.tunables.values())))
        self._show()

    def on_table_view_moved(self) -> None:
        self._show()

    def on_table_view_chosen(self) -> None:
        """Enter on a tunable goes on to its value."""
        self.query_one("#value", TextField).focus()

    def on_input_changed(self) -> None:
        self.tell("")

    def _chosen(self) -> Tunable:
        key = self.query_one("#choose", TableView).key
        if key is None:
            raise ValueError("the script registered no tunable")
        return self.tunables[key]

    def _show(self) -> None:
        try:
            chosen = self._chosen()
        except ValueError as error:
            self.tell(str(error))
            return
        unit = f" {plain(chosen.unit)}" if chosen.unit else ""
        words = f"{plain(chosen.name)} is {scalar(chosen.value)}{unit} now, takes {taken(chosen)}"
        self.query_one("#which", Static).update(words)
        self.query_one("#value", TextField).value = ""

    def wish(self) -> Wish:
        chosen = self._chosen()
        value = typed_value(chosen, self.query_one("#value", TextField).value.strip())
        after, unless = undo_of(self)
        return Wish(action=SetTunable(name=chosen.name, value=value), revert_after=after, unless=unless)


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def taken(tunable: Tunable) -> str:
    """What a tunable takes: its kind, and its bounds where it has any."""
    return " ".join(part for part in (_KINDS.get(tunable.kind, tunable.kind), bounds(tunable)) if part)


_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


def typed_value(tunable: Tunable, text: str) -> bool | int | float | str:
    """What was typed, as the tunable's kind and within its bounds. Raises ValueError with what would be right."""
    if not text:
        raise ValueError(f"type a value for {tunable.name}")
    if tunable.kind == "str":
        return text
    if tunable.kind == "bool":
        if text.lower() not in _TRUE | _FALSE:
            raise ValueError(f"{tunable.name} is true or false")
        return text.lower() in _TRUE
    try:
        value: int | float = int(text) if tunable.kind == "int" else float(text)
    except ValueError:
        raise ValueError(f"{tunable.name} is {'a whole number' if tunable.kind == 'int' else 'a number'}") from None
    low, high = tunable.minimum, tunable.maximum
    if value != value or (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{tunable.name} takes {bounds(tunable) or 'a finite number'}")
    return value


class LeaveDialog(ModalScreen[str | None]):
    """Leaving the cockpit of a run that was started with it."""

    DEFAULT_CSS = """
    LeaveDialog { align: center middle; background: $background 60%; }
    LeaveDialog > #box {
        width: 64; max-width: 96%; height: auto; max-height: 100%;
        background: $surface; border: round $primary 60%; padding: 0 2;
    }
    LeaveDialog #title { text-style: bold; margin-bottom: 1; }
    LeaveDialog #keys { dock: bottom; background: $surface; color: $foreground 70%; width: 100%; text-align: right; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "answer('stay')", show=False),
        Binding("g,enter", "answer('go-on')", show=False),
        Binding("s,S", "answer('stop')", show=False),
    ]

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run_name = run

    def compose(self) -> ComposeResult:
        with Box(id="box"):
            yield Static(f"Leave the cockpit of {self.run_name}", id="title", markup=False)
            yield Static(
                "g   training goes on without the cockpit; `trainctl tui` comes back to it\n"
                "s   training stops: a checkpoint is saved first\n",
                markup=False,
            )
            yield Static("Esc stay    Enter or g go on    s stop", id="keys", markup=False)

    def action_answer(self, answer: str) -> None:
        self.dismiss(None if answer == "stay" else answer)


Opener = Callable[[RunModel, Look], Dialog]

SIMPLE_DIALOGS: dict[str, Opener] = {
    "lr scale": LrDialog,
    "lr set": LrDialog,
    "checkpoint save": CheckpointDialog,
    "note": NoteDialog,
    "stop": StopDialog,
    "abort": AbortDialog,
    "restart": RestartDialog,
}
"""Dialogs that need nothing but the model, by command. The others are opened by the commander."""
