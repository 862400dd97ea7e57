"""The bottom line: which keys there are, and which of them are off. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainctl.tui.grid import Grid
from trainctl.tui.theme import Symbols
from trainctl.tui.tones import Tone
from trainctl.wire.commands import REGISTRY

# Key, command of the registry, label, short label: in the order of the footer.
ACTING: tuple[tuple[str, str, str, str], ...] = (
    ("P", "pause", "pause", "pause"),
    ("L", "lr scale", "lr", "lr"),
    ("C", "checkpoint save", "checkpoint", "ckpt"),
    ("R", "rollback", "rollback", "back"),
    ("S", "stop", "stop", "stop"),
    ("T", "set", "tunables", "tune"),
    ("E", "eval", "evaluate", "eval"),
)
SCREENS: tuple[tuple[str, str], ...] = (
    ("1", "run"),
    ("2", "ranks"),
    ("3", "nodes"),
    ("4", "checkpoints"),
    ("5", "events"),
)

_MORE = (("/", "filter"), (":", "palette"), ("?", "help"), ("q", "leave"))


def off_reason(command: str, capabilities: Mapping[str, bool | str]) -> str | None:
    """Why a run does not support a command, or None. What a run does not mention it is taken to support."""
    answer = capabilities.get(REGISTRY[command].capability or command, True)
    if answer is True:
        return None
    return answer if isinstance(answer, str) else "this run does not support it"


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key with what it does; `place` is where it ended up: from and to column."""

    key: str
    label: str
    off: bool = False
    here: bool = False
    place: tuple[int, int] = (0, 0)


def keys_for(
    *, paused: bool, off: Mapping[str, str], screen: str, short: bool, one_chart: bool, tiny: bool = False
) -> Sequence[Key | None]:
    """The keys of the footer in order; None is a divider. `off`: reasons by command."""
    pause = "resume" if paused else "pause"
    if tiny:
        acting = [Key(key="P", label=pause, off="pause" in off), Key(key="?", label="help")]
        return [*acting, None, Key(key="enlarge", label="to 60×15")]
    acting = [
        Key(key=key, label=pause if command == "pause" else brief if short else label, off=command in off)
        for key, command, label, brief in ACTING
    ]
    if screen == "checkpoints":
        acting += [Key(key="K", label="keep", off="rollback" in off), Key(key="v", label="verify")]
    if short:
        looks = [Key(key="Tab", label="chart")] if one_chart and screen == "run" else []
        return [*acting, None, Key(key="?", label="help"), *looks, Key(key="1-5", label="screens")]
    looks = [Key(key=key, label=name, here=name == screen) for key, name in SCREENS]
    more = [Key(key=key, label=label) for key, label in _MORE]
    return [*acting, None, *looks, None, *more]


def draw_keys(keys: Sequence[Key | None], symbols: Symbols, width: int) -> tuple[Grid, list[Key]]:
    """The line, and the keys with their places; what does not fit is left out."""
    grid = Grid(width, 1)
    spread = 2 if sum(len(k.key) + len(k.label) + 3 for k in keys if k) + 8 <= width else 1
    x, placed = 1, []
    for key in keys:
        if key is None:
            if x + 2 < width:
                grid.put(x, 0, symbols.divider, Tone.FAINT)
            x += 1 + spread
            continue
        end = x + len(key.key) + 1 + len(key.label)
        if end > width:
            break
        after = grid.put(x, 0, key.key, Tone.KEY_OFF if key.off else Tone.KEY)
        tone = Tone.KEY_OFF if key.off else Tone.STRONG if key.here else Tone.DIM
        after = grid.put(after + 1, 0, key.label, tone)
        placed.append(Key(key=key.key, label=key.label, off=key.off, here=key.here, place=(x, after)))
        x = after + spread
    return grid, placed


def draw_banner(text: str, width: int) -> Grid:
    """The bottom line when it has to say something that must not be missed."""
    grid = Grid(width, 1)
    grid.tone_row(0, Tone.BANNER)
    grid.put(1, 0, text[: max(0, width - 2)], Tone.BANNER)
    return grid
