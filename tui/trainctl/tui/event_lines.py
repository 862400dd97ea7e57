"""Events and commands on their way as lines. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trainctl.client.figures import plain
from trainctl.client.lines import command_text, event_text, kind_of, severity_of
from trainctl.client.model import RunModel
from trainctl.tui import figures
from trainctl.tui.grid import Grid, Piece
from trainctl.tui.header import News
from trainctl.tui.theme import Symbols
from trainctl.tui.tones import Tone
from trainctl.wire.commands import FINAL_COMMAND_STATES
from trainctl.wire.messages import (
    CheckpointSaved,
    CommandUpdate,
    Event,
    Note,
    Output,
    RolledBack,
    StateChanged,
)

_SEVERITY = {"info": Tone.TEXT, "good": Tone.GOOD, "warning": Tone.WARNING, "error": Tone.ERROR}
_NEWS = (Tone.DIM, Tone.GOOD, Tone.WARNING, Tone.ERROR)
_SETTLED_SHOWN_S = 20.0
_ROUTINE = frozenset({"evaluating", "checkpointing", "paused"})


def glyph_of(event: Event, symbols: Symbols) -> tuple[str, Tone]:
    """A glyph and a tone for an event."""
    severity = severity_of(event)
    tone = _SEVERITY[severity]
    match event:
        case RolledBack():
            return symbols.rollback, tone
        case Note():
            return symbols.note, Tone.NOTE
        case Output():
            return symbols.divider, Tone.DIM
        case CommandUpdate(state=state) if state not in FINAL_COMMAND_STATES:
            return symbols.command, Tone.NOTE
        case _:
            glyph = {"warning": symbols.warning, "error": symbols.lost, "good": symbols.good}.get(severity)
            return glyph or symbols.info, tone


def event_pieces(event: Event, symbols: Symbols) -> list[Piece]:
    """Time, glyph and words of an event."""
    glyph, tone = glyph_of(event, symbols)
    words = Tone.DIM if isinstance(event, Output) else tone if tone in {Tone.WARNING, Tone.ERROR} else Tone.TEXT
    return [(f"{figures.clock(event.time)}  ", Tone.DIM), (f"{glyph} ", tone), (event_text(event), words)]


def worth_a_line(event: Event) -> bool:
    """Whether an event is shown on the run's screen.

    Not what ranks print, nor the steps of a command on its way, nor the coming and going of evaluations; and a pause
    is told by its command.
    """
    match event:
        case Output():
            return False
        case CommandUpdate():
            return event.state in FINAL_COMMAND_STATES
        case StateChanged():
            return event.state not in _ROUTINE and not (event.state == "running" and event.before in _ROUTINE)
        case _:
            return True


def routine(event: Event) -> bool:
    """Whether an event is one of those that come by the clock: a checkpoint that is as it should be."""
    return isinstance(event, CheckpointSaved) and severity_of(event) == "good"


def newsworthy(event: Event) -> bool:
    """Whether an event should call the operator: a warning, an error, a command's outcome, a rollback."""
    if severity_of(event) in {"warning", "error"}:
        return not isinstance(event, Output)
    return isinstance(event, CommandUpdate | RolledBack) and worth_a_line(event)


def news_of(events: Iterable[Event], seen_until: float) -> News:
    """How many newsworthy events came after `seen_until`, in the tone of the worst."""
    rank = {tone: index for index, tone in enumerate(_NEWS)}
    unseen = [event for event in events if event.time > seen_until and newsworthy(event)]
    worst = max((rank.get(_SEVERITY[severity_of(event)], 0) for event in unseen), default=0)
    return News(count=len(unseen), tone=_NEWS[worst] if worst >= rank[Tone.WARNING] else Tone.DIM)


def matches(event: Event, words: str) -> bool:
    """Whether an event has every one of the words, in its kind, severity or text."""
    if not words:
        return True
    text = f"{kind_of(event)} {severity_of(event)} step {event.step} {event_text(event)}".lower()
    return all(word in text for word in words.lower().split())


# --- commands on their way


@dataclass(frozen=True, kw_only=True)
class Line:
    """What the event line says about a command."""

    text: str
    tone: Tone
    glyph: str
    until: float | None = None  # on the monotonic clock; None while it is on its way


@dataclass(kw_only=True)
class Progress:
    """Commands sent from here, until a while after their outcome. The clock is the caller's.

    The run reports every outcome as an event too; once that is in the log, the line here goes.
    """

    symbols: Symbols
    lines: dict[str, Line] = field(default_factory=dict)
    _keys: dict[str, str] = field(default_factory=dict)
    _logged: set[str] = field(default_factory=set)

    def logged(self, command_id: str) -> None:
        """The outcome of a command is in the log."""
        self._logged.add(command_id)
        self.lines.pop(self._keys.pop(command_id, ""), None)

    def sending(self, key: str, words: str) -> None:
        self.lines[key] = Line(text=f"{words}: sending", tone=Tone.NOTE, glyph=self.symbols.command)

    def update(self, key: str, update: CommandUpdate, now: float) -> None:
        """Note where a command stands."""
        final = update.state in FINAL_COMMAND_STATES
        self._keys[update.id] = key
        if final and update.id in self._logged:
            self.logged(update.id)
            return
        text = command_text(update)
        if update.state == "accepted":
            text += ", waits for the next boundary"
        severity = severity_of(update)
        glyph = {"good": self.symbols.good, "warning": self.symbols.warning, "error": self.symbols.lost}
        self.lines[key] = Line(
            text=text,
            tone=_SEVERITY[severity] if final else Tone.NOTE,
            glyph=glyph.get(severity, self.symbols.command) if final else self.symbols.command,
            until=now + _SETTLED_SHOWN_S if final else None,
        )

    def say(self, key: str, text: str, tone: Tone, now: float) -> None:
        """A line of the cockpit's own, such as why a key does nothing."""
        glyph = {Tone.ERROR: self.symbols.lost, Tone.WARNING: self.symbols.warning, Tone.GOOD: self.symbols.good}
        self.lines[key] = Line(
            text=plain(text), tone=tone, glyph=glyph.get(tone, self.symbols.info), until=now + _SETTLED_SHOWN_S
        )

    def current(self, now: float) -> list[Line]:
        """What to show now, oldest first; what has been there long enough goes."""
        self.lines = {key: line for key, line in self.lines.items() if line.until is None or line.until > now}
        return list(self.lines.values())


def newest_events(events: Sequence[Event], most: int) -> list[Event]:
    """The newest events that are worth a line, oldest first.

    Of checkpoints only the newest is among them, and none where there is but one line: they come by the clock, and
    would push out what an operator did and what went wrong.
    """
    shown: list[Event] = []
    checkpoint: Event | None = None
    for event in reversed(events):
        if len(shown) >= most:
            break
        if routine(event):
            if checkpoint is None:
                checkpoint = event
                if most > 1:
                    shown.insert(0, event)
        elif worth_a_line(event):
            shown.insert(0, event)
    return shown or ([checkpoint] if checkpoint is not None and most > 0 else [])


def draw_events(model: RunModel, symbols: Symbols, width: int, rows: int, lines: Sequence[Line] = ()) -> Grid:
    """The newest events, oldest first; commands on their way stay at the bottom until they are settled."""
    grid = Grid(width, rows)
    lines = list(lines)[-rows:]
    space = rows - len(lines)
    shown = newest_events(model.events, space)
    if not shown and not lines:
        grid.put(1, 0, "no events yet", Tone.DIM)
    for y, event in enumerate(shown):
        grid.put_pieces(1, y, event_pieces(event, symbols))
    for y, line in enumerate(lines, start=len(shown)):
        grid.put_pieces(1, y, [(f"{line.glyph} ", line.tone), (line.text, line.tone)])
    return grid
