"""Colours for meanings, and glyphs for terminals that have fewer.

Three palettes: true colour, the terminal's own sixteen, and none at all (`NO_COLOR`), where bold, dim and reverse are
left. A palette maps every `Tone` to a style; nothing else in the cockpit names a colour.
"""

import locale
import os
from collections.abc import Mapping
from dataclasses import dataclass

from rich.style import Style
from textual.theme import Theme

from trainctl.tui.raster import Glyphs
from trainctl.tui.tones import Tone

BACKGROUND = "#0d1117"
SURFACE = "#151b24"

_TRUE: dict[Tone, tuple[str, str]] = {
    Tone.TEXT: ("#d3dae3", ""),
    Tone.STRONG: ("#f3f6fa", "bold"),
    Tone.DIM: ("#8792a2", ""),
    Tone.FAINT: ("#46515f", ""),
    Tone.TITLE: ("#a9b4c2", ""),
    Tone.FOCUS: ("#6cc6ff", "bold"),
    Tone.KEY: ("#6cc6ff", "bold"),
    Tone.KEY_OFF: ("#525d6b", ""),
    Tone.RUNNING: ("#6fd88f", "bold"),
    Tone.PAUSED: ("#ffd05e", "bold"),
    Tone.STALLED: ("#ff9c54", "bold"),
    Tone.LOST: ("#ff6e6e", "bold"),
    Tone.FINISHED: ("#82aaff", "bold"),
    Tone.STALE: ("#c3a3ff", "bold"),
    Tone.GOOD: ("#6fd88f", ""),
    Tone.WARNING: ("#ffd05e", ""),
    Tone.ERROR: ("#ff6e6e", ""),
    Tone.NOTE: ("#82aaff", ""),
    Tone.STRUCK: ("#6a7585", "strike"),
    Tone.CURSOR: ("#f3f6fa", "on #223041"),
    Tone.CROSSHAIR: ("#8792a2", ""),
    Tone.CURVE_1: ("#62c4ff", ""),
    Tone.CURVE_2: ("#d69bff", ""),
    Tone.CURVE_3: ("#ffc65c", ""),
    Tone.CURVE_4: ("#72e0b8", ""),
    Tone.RAW_1: ("#2b5573", ""),
    Tone.RAW_2: ("#584068", ""),
    Tone.RAW_3: ("#6e5a34", ""),
    Tone.RAW_4: ("#2f6352", ""),
    Tone.BAR: ("#6fd88f", "on #1c2532"),
    Tone.BAR_REST: ("#1c2532", "on #1c2532"),
    Tone.MARK: ("#a9b4c2", ""),
    Tone.BANNER: ("#0d1117", "bold on #ffd05e"),
    Tone.METER: ("#3b83ad", ""),
    Tone.METER_2: ("#3f9478", ""),
}

_SIXTEEN: dict[Tone, str] = {
    Tone.TEXT: "default",
    Tone.STRONG: "bold",
    Tone.DIM: "bright_black",
    Tone.FAINT: "bright_black",
    Tone.TITLE: "default",
    Tone.FOCUS: "bold bright_cyan",
    Tone.KEY: "bold bright_cyan",
    Tone.KEY_OFF: "bright_black",
    Tone.RUNNING: "bold bright_green",
    Tone.PAUSED: "bold bright_yellow",
    Tone.STALLED: "bold yellow",
    Tone.LOST: "bold bright_red",
    Tone.FINISHED: "bold bright_blue",
    Tone.STALE: "bold bright_magenta",
    Tone.GOOD: "green",
    Tone.WARNING: "bright_yellow",
    Tone.ERROR: "bright_red",
    Tone.NOTE: "bright_blue",
    Tone.STRUCK: "bright_black strike",
    Tone.CURSOR: "reverse",
    Tone.CROSSHAIR: "default",
    Tone.CURVE_1: "bright_cyan",
    Tone.CURVE_2: "bright_magenta",
    Tone.CURVE_3: "bright_yellow",
    Tone.CURVE_4: "bright_green",
    Tone.RAW_1: "cyan",
    Tone.RAW_2: "magenta",
    Tone.RAW_3: "yellow",
    Tone.RAW_4: "green",
    Tone.BAR: "green",
    Tone.BAR_REST: "bright_black",
    Tone.MARK: "default",
    Tone.BANNER: "bold reverse",
    Tone.METER: "cyan",
    Tone.METER_2: "green",
}

_STRONG_WITHOUT_COLOUR = frozenset(
    {Tone.STRONG, Tone.FOCUS, Tone.KEY, Tone.RUNNING, Tone.PAUSED, Tone.STALLED, Tone.LOST, Tone.FINISHED, Tone.STALE}
    | {Tone.ERROR, Tone.WARNING, Tone.CURVE_1, Tone.CURVE_2, Tone.CURVE_3, Tone.CURVE_4}
)
_QUIET_WITHOUT_COLOUR = frozenset(
    {Tone.DIM, Tone.FAINT, Tone.KEY_OFF, Tone.RAW_1, Tone.RAW_2, Tone.RAW_3, Tone.RAW_4, Tone.BAR_REST}
)


def _true_colour() -> dict[int, Style]:
    return {
        int(tone): Style.parse(f"{colour} {more}" if "on " in more else f"{colour} on {BACKGROUND} {more}")
        for tone, (colour, more) in _TRUE.items()
    }


def _sixteen() -> dict[int, Style]:
    return {int(tone): Style.parse(text) for tone, text in _SIXTEEN.items()}


def _plain() -> dict[int, Style]:
    styles = {}
    for tone in Tone:
        text = "bold" if tone in _STRONG_WITHOUT_COLOUR else "dim" if tone in _QUIET_WITHOUT_COLOUR else "none"
        if tone in {Tone.CURSOR, Tone.BANNER}:
            text = "reverse"
        styles[int(tone)] = Style.parse("dim strike" if tone is Tone.STRUCK else text)
    return styles


def palette(*, colours: bool, true_colour: bool) -> Mapping[int, Style]:
    """The style of every tone for what the terminal can show."""
    if not colours:
        return _plain()
    return _true_colour() if true_colour else _sixteen()


@dataclass(frozen=True, kw_only=True)
class Symbols:
    """Glyphs with a meaning."""

    running: str = "●"
    paused: str = "▮▮"
    stalled: str = "◑"
    lost: str = "✕"
    finished: str = "■"
    stale: str = "◌"
    recorded: str = "▷"
    busy: str = "◆"
    up: str = "▲"
    down: str = "▼"
    warning: str = "⚠"
    good: str = "✓"
    info: str = "·"
    command: str = "›"
    note: str = "✎"
    rollback: str = "↩"
    checkpoint: str = "▲"
    pointer: str = "◀"
    times: str = "×"
    ellipsis: str = "…"
    arrow: str = "→"
    bar: str = "▏▎▍▌▋▊▉█"
    bar_left: str = "▕"
    bar_right: str = "▏"
    levels: str = "▁▂▃▄▅▆▇█"
    rule: str = "─"
    divider: str = "│"
    separator: str = "·"
    point: str = "◆"
    line: str = "─"
    dashes: str = "┄"
    pinned: str = "●"
    lr: str = "◇"


ASCII_SYMBOLS = Symbols(
    running="*",
    paused="||",
    stalled="~",
    lost="X",
    finished="#",
    stale="?",
    recorded=">",
    busy="+",
    up="^",
    down="v",
    warning="!",
    good="+",
    info="-",
    command=">",
    note='"',
    rollback="R",
    checkpoint="A",
    pointer="<",
    times="x",
    ellipsis="...",
    arrow="->",
    bar="#",
    bar_left="[",
    bar_right="]",
    levels=".:-=+*%#",
    rule="-",
    divider="|",
    separator="-",
    point="o",
    line="-",
    dashes=":",
    pinned="*",
    lr="L",
)


@dataclass(frozen=True, kw_only=True)
class Look:
    """How to draw on this terminal."""

    palette: Mapping[int, Style]
    symbols: Symbols = Symbols()
    glyphs: Glyphs = "braille"
    ansi: bool = False


def glyphs_here(environ: Mapping[str, str] = os.environ, encoding: str | None = None) -> Glyphs:
    """Dots as fine as the terminal has: `TRAINCTL_GLYPHS` decides, else its locale and kind."""
    asked = environ.get("TRAINCTL_GLYPHS", "")
    if asked in {"braille", "block", "ascii"}:
        return asked  # type: ignore[return-value]  # narrowed by the line above
    if "utf" not in (encoding if encoding is not None else locale.getpreferredencoding(False)).lower():
        return "ascii"
    return "block" if environ.get("TERM", "") == "linux" else "braille"  # the console's font has no braille


def look_for(*, color_system: str | None, no_color: bool, glyphs: Glyphs | None = None) -> Look:
    """The look for a terminal with this colour system (`truecolor`, `256`, `standard`, None)."""
    kind = glyphs_here() if glyphs is None else glyphs
    colours = not no_color and color_system is not None
    true_colour = color_system in {"truecolor", "256"}
    return Look(
        palette=palette(colours=colours, true_colour=true_colour),
        symbols=ASCII_SYMBOLS if kind == "ascii" else Symbols(),
        glyphs=kind,
        ansi=not (colours and true_colour),
    )


DARK = Theme(
    name="trainctl",
    primary="#6cc6ff",
    secondary="#82aaff",
    accent="#6cc6ff",
    warning="#ffd05e",
    error="#ff6e6e",
    success="#6fd88f",
    foreground="#d3dae3",
    background=BACKGROUND,
    surface=SURFACE,
    panel="#1b2330",
    dark=True,
    variables={
        "block-cursor-background": "#223041",
        "block-cursor-foreground": "#f3f6fa",
        "input-cursor-background": "#6cc6ff",
        "input-selection-background": "#223041",
        "border": "#6cc6ff",
        "scrollbar": "#2c3a4c",
        "scrollbar-hover": "#3a4b61",
        "scrollbar-active": "#6cc6ff",
        "scrollbar-background": SURFACE,
        "scrollbar-background-hover": SURFACE,
        "scrollbar-background-active": SURFACE,
        "scrollbar-corner-color": SURFACE,
    },
)

ANSI_THEME = "ansi-dark"
"""The toolkit's own theme of sixteen colours: what dialogs and inputs use where `Look.ansi` is true."""
