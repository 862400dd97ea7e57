"""A widget that shows a grid and sends only the cells that changed."""

from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from trainctl.tui.grid import Grid
from trainctl.tui.theme import Look


class Canvas(Widget):
    """Shows the newest grid given to `show`. A grid of another size than the widget is cut or padded."""

    DEFAULT_CSS = "Canvas { width: 1fr; height: 1; }"

    def __init__(self, look: Look, *, id: str | None = None, classes: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id, classes=classes)
        self.look = look
        self._grid: Grid | None = None

    @property
    def grid(self) -> Grid | None:
        """What is on the screen."""
        return self._grid

    def show(self, grid: Grid) -> int:
        """Put a grid on the screen and return how many cells changed."""
        before, self._grid = self._grid, grid
        if before is None or (before.width, before.height) != (grid.width, grid.height):
            self.refresh()
            return grid.width * grid.height
        spans = grid.changes(before)
        if spans:
            self.refresh(*(Region(start, y, end - start, 1) for y, start, end in spans))
        return sum(end - start for _, start, end in spans)

    def render_line(self, y: int) -> Strip:
        grid = self._grid
        blank = self.look.palette[0]
        if grid is None or not 0 <= y < grid.height:
            return Strip.blank(self.size.width, blank)
        strip = grid.strip(y, self.look.palette)
        return strip if grid.width == self.size.width else strip.adjust_cell_length(self.size.width, blank)
