"""What is left of the screen when the terminal is too small for it. Pure."""

from trainctl.client.figures import plain
from trainctl.client.model import RunModel
from trainctl.tui import figures
from trainctl.tui.event_lines import Line
from trainctl.tui.grid import Grid, Piece, fit, width_of
from trainctl.tui.header import headline, progress_bar
from trainctl.tui.theme import Symbols
from trainctl.tui.tones import Tone


def draw_small_header(
    model: RunModel, symbols: Symbols, width: int, *, now: float | None = None, tag: str = ""
) -> Grid:
    """Two lines: state and run; step, or what is wrong."""
    grid = Grid(width, 2)
    head = headline(model, symbols, now)
    first: list[Piece] = [(f" {head.glyph} {head.word}", head.tone), (f" {head.age}" if head.age else "", Tone.DIM)]
    first += [(f"  {plain(model.name)}", Tone.STRONG), (f"  {tag}" if tag else "", Tone.NOTE)]
    grid.put_pieces(0, 0, first)
    state, total = model.state, model.total_steps
    if state is None:
        grid.put_pieces(1, 1, [(head.story, Tone.DIM)])
        return grid
    x = grid.put(1, 1, fit(f"step {figures.count(state.step)}", width - 1), Tone.STRONG)
    if head.story:
        grid.put_pieces(x, 1, [(f"  {head.hint or head.story}", Tone.TEXT)])
    elif total:
        _draw_small_progress(grid, x, state.step, total, symbols)
    return grid


def _draw_small_progress(grid: Grid, x: int, step: int, total: int, symbols: Symbols) -> None:
    """Behind the step how far that is. A part that does not fit whole is left out: half a number is a wrong one."""
    share = min(1.0, step / total)
    whole, percent = f"/{figures.count(total)}", f"{share * 100:.1f}% "
    if x + width_of(whole) > grid.width:
        return
    x = grid.put(x, 1, whole, Tone.DIM)
    if x + 1 + width_of(percent) > grid.width:
        return
    right = grid.put_right(1, percent, Tone.TEXT)
    if right - x - 2 >= 6:
        grid.put_pieces(x + 1, 1, progress_bar(share, right - x - 2, symbols))


def draw_small_hint(line: Line, width: int) -> Grid:
    """One line of the event line's, where there is no event line."""
    grid = Grid(width, 1)
    grid.put_pieces(1, 0, [(f"{line.glyph} ", line.tone), (line.text, line.tone)])
    return grid
