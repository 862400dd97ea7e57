"""Tables drawn into grids, and the widget that shows one with a cursor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from trainctl.tui.canvas import Canvas
from trainctl.tui.grid import Grid, Piece, fit, width_of
from trainctl.tui.theme import Look
from trainctl.tui.tones import Tone

Align: TypeAlias = Literal["left", "right"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """`width` 0 takes what the content needs, -1 what is left. Of too many columns those of least `worth` go first."""

    title: str
    width: int = 0
    align: Align = "left"
    worth: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: a key of its own, and a piece for each column."""

    key: str
    cells: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    columns: tuple[Column, ...]
    rows: Sequence[Row]
    empty: str = "nothing here yet"
    title: str = ""


_LEAST_LEFT = 24  # cells that a column of free text may claim before columns of less worth stay


def _wanted(table: Table, index: int) -> int:
    """Cells that a column needs, at least."""
    column = table.columns[index]
    if column.width > 0:
        return column.width
    content = max((width_of(row.cells[index][0]) for row in table.rows), default=0)
    content = max(content, width_of(column.title))
    return content if column.width == 0 else min(content, _LEAST_LEFT)


def _shown(table: Table, width: int) -> list[tuple[int, int]]:
    """The columns that fit whole, each with its cells: the least worth go first, of those the last; the first stays.

    What is left goes to the column that takes what is left, and is all that one gets.
    """
    wanted = {index: _wanted(table, index) for index in range(len(table.columns))}

    def room() -> int:
        return width - 2 - sum(wanted.values()) - 2 * (len(wanted) - 1)

    while room() < 0 and len(wanted) > 1:
        fixed = [index for index in list(wanted)[1:] if table.columns[index].width >= 0]
        if not fixed:
            break
        del wanted[min(fixed, key=lambda index: (table.columns[index].worth, -index))]
    spare = room()
    return [(index, max(0, have + spare) if table.columns[index].width < 0 else have) for index, have in wanted.items()]


def draw_table(table: Table, width: int, height: int, *, cursor: int | None = None, offset: int = 0) -> Grid:
    """Titles, then the rows from `offset`; the row at `cursor` is lit over its whole width."""
    grid = Grid(width, height)
    shown = _shown(table, width)
    x = 1
    for index, have in shown:
        column = table.columns[index]
        _cell(grid, x, 0, (column.title, Tone.DIM), have, column.align)
        x += have + 2
    if not table.rows:
        grid.put(1, 2 if height > 2 else height - 1, fit(table.empty, width - 2), Tone.DIM)
    for y, row in enumerate(table.rows[offset : offset + height - 1], start=1):
        x = 1
        for index, have in shown:
            _cell(grid, x, y, row.cells[index], have, table.columns[index].align)
            x += have + 2
        if offset + y - 1 == cursor:
            grid.tone_row(y, Tone.CURSOR)
    return grid


def _cell(grid: Grid, x: int, y: int, piece: Piece, width: int, align: Align) -> None:
    text = fit(piece[0], width)
    grid.put(x + (width - width_of(text) if align == "right" else 0), y, text, piece[1])


class TableView(Canvas, can_focus=True):
    """A table with a cursor that stays on its row, by key, while rows come and go.

    With `follow` it shows the end as long as the cursor is on the last row.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home,g", "move(-1000000)", show=False),
        Binding("end,G", "move(1000000)", show=False),
        Binding("enter", "choose", show=False),
    ]

    class Moved(Message):
        """The cursor is on another row."""

        def __init__(self, view: "TableView", key: str) -> None:
            super().__init__()
            self.view, self.key = view, key

        @property
        def control(self) -> "TableView":
            return self.view

    class Chosen(Moved):
        """Enter was pressed on a row."""

    def __init__(self, look: Look, *, follow: bool = False, id: str | None = None) -> None:  # noqa: A002
        super().__init__(look, id=id)
        self.follow = follow
        self.table = Table(columns=(), rows=())
        self.cursor = 0
        self.top = 0

    @property
    def key(self) -> str | None:
        """The key of the row under the cursor."""
        return self.table.rows[self.cursor].key if self.cursor < len(self.table.rows) else None

    def put(self, table: Table) -> None:
        """Show other content."""
        before, at_end = self.key, self.cursor >= len(self.table.rows) - 1
        self.table = table
        keys = [row.key for row in table.rows]
        if self.follow and at_end:
            self.cursor = max(0, len(keys) - 1)
        elif before in keys:
            self.cursor = keys.index(before)
        else:
            self.cursor = min(self.cursor, max(0, len(keys) - 1))
        self.draw()

    def draw(self) -> None:
        width, height = self.size.width, self.size.height
        if width < 2 or height < 2:
            return
        visible = height - 1
        self.top = min(max(self.top, self.cursor - visible + 1), self.cursor)
        self.top = max(0, min(self.top, len(self.table.rows) - visible))
        self.show(draw_table(self.table, width, height, cursor=self.cursor, offset=self.top))

    def on_resize(self) -> None:
        self.draw()

    def action_move(self, rows: int) -> None:
        self._go(self.cursor + rows)

    def action_page(self, pages: int) -> None:
        self._go(self.cursor + pages * max(1, self.size.height - 2))

    def action_choose(self) -> None:
        if (key := self.key) is not None:
            self.post_message(self.Chosen(self, key))

    def _go(self, to: int) -> None:
        self.cursor = min(max(0, to), max(0, len(self.table.rows) - 1))
        self.draw()
        if (key := self.key) is not None:
            self.post_message(self.Moved(self, key))

    def on_click(self, event: events.Click) -> None:
        if 0 < event.y <= len(self.table.rows) - self.top:
            self._go(self.top + event.y - 1)

    def on_mouse_scroll_down(self) -> None:
        self.action_move(1)

    def on_mouse_scroll_up(self) -> None:
        self.action_move(-1)
