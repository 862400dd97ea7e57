"""A rectangle of character cells, each with a tone: what every panel draws into and what is compared between frames.

Drawing into plain arrays keeps the panels free of the toolkit, and comparing two grids gives exactly the cells that
changed: on a slow line only those are sent.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from rich.cells import get_character_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

from trainctl.tui.tones import Tone

Codes: TypeAlias = npt.NDArray[np.uint32]
Tones: TypeAlias = npt.NDArray[np.uint8]
Piece: TypeAlias = tuple[str, Tone]

_SPACE = ord(" ")
_CONTINUED = 0  # the right half of a wide character


def width_of(text: str) -> int:
    """Cells that a text takes."""
    return len(text) if text.isascii() else sum(get_character_cell_size(char) for char in text)


def fit(text: str, width: int, *, ellipsis: str = "…") -> str:
    """Cut a text to `width` cells, and say so with an ellipsis."""
    if width_of(text) <= width:
        return text
    if width <= 0:
        return ""
    kept, used = [], 0
    for char in text:
        used += get_character_cell_size(char)
        if used > width - 1:
            break
        kept.append(char)
    return "".join(kept) + ellipsis


class Grid:
    """`codes[row, column]` are code points, `tones[row, column]` indices into a palette. Writing outside is cut."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = max(0, width), max(0, height)
        self.codes: Codes = np.full((self.height, self.width), _SPACE, np.uint32)
        self.tones: Tones = np.zeros((self.height, self.width), np.uint8)

    def put(self, x: int, y: int, text: str, tone: Tone = Tone.TEXT) -> int:
        """Write a text and return the column behind it."""
        if not 0 <= y < self.height:
            return x + width_of(text)
        if text.isascii():
            start, end = max(0, x), min(self.width, x + len(text))
            if start < end:
                part = text[start - x : end - x].encode()
                self.codes[y, start:end] = np.frombuffer(part, np.uint8)
                self.tones[y, start:end] = tone
            return x + len(text)
        for char in text:
            cells = get_character_cell_size(char)
            if cells == 0:
                continue
            if x >= 0 and x + cells <= self.width:
                self.codes[y, x] = ord(char)
                self.tones[y, x] = tone
                if cells == 2:
                    self.codes[y, x + 1] = _CONTINUED
                    self.tones[y, x + 1] = tone
            x += cells
        return x

    def put_right(self, y: int, text: str, tone: Tone = Tone.TEXT, *, right: int | None = None) -> int:
        """Write a text that ends before column `right` and return where it begins."""
        x = (self.width if right is None else right) - width_of(text)
        self.put(x, y, text, tone)
        return x

    def put_pieces(self, x: int, y: int, pieces: Sequence[Piece], *, until: int | None = None) -> int:
        """Write pieces one after another, cut with an ellipsis before column `until`; return the column behind."""
        end = self.width if until is None else until
        for text, tone in pieces:
            room = end - x
            if room <= 0:
                break
            x = self.put(x, y, fit(text, room), tone)
        return x

    def tone_row(self, y: int, tone: Tone, start: int = 0, end: int | None = None) -> None:
        """Give all cells of a row one tone."""
        if 0 <= y < self.height:
            self.tones[y, start:end] = tone

    def paste(self, other: "Grid", x: int, y: int) -> None:
        """Copy another grid in; it must fit."""
        self.codes[y : y + other.height, x : x + other.width] = other.codes
        self.tones[y : y + other.height, x : x + other.width] = other.tones

    def text(self) -> list[str]:
        """The rows as plain text."""
        return ["".join(chr(code) for code in row if code) for row in self.codes.tolist()]

    def strip(self, y: int, palette: Mapping[int, Style]) -> Strip:
        """One row as the toolkit wants it."""
        codes, tones = self.codes[y], self.tones[y]
        if not self.width:
            return Strip([], 0)
        starts = np.flatnonzero(tones[1:] != tones[:-1]) + 1
        bounds = [0, *starts.tolist(), self.width]
        text = codes.astype("<u4").tobytes().decode("utf-32-le")
        segments = [Segment(text[a:b].replace("\0", ""), palette[int(tones[a])]) for a, b in itertools.pairwise(bounds)]
        return Strip(segments, self.width)

    def changes(self, before: "Grid") -> list[tuple[int, int, int]]:
        """Spans `(row, from, to)` in which this grid differs from an earlier one of the same size.

        Spans of a row that lie close together are joined: moving the cursor costs as much as a few cells.
        """
        differs = (self.codes != before.codes) | (self.tones != before.tones)
        spans: list[tuple[int, int, int]] = []
        for y in np.flatnonzero(differs.any(axis=1)).tolist():
            columns = np.flatnonzero(differs[y])
            breaks = np.flatnonzero(np.diff(columns) > _JOIN_WITHIN)
            starts = columns[np.concatenate(([0], breaks + 1))]
            ends = columns[np.concatenate((breaks, [len(columns) - 1]))] + 1
            if _CONTINUED in self.codes[y] or _CONTINUED in before.codes[y]:
                starts, ends = starts[:1] * 0, ends[-1:] * 0 + self.width  # never cut a wide character in two
            spans.extend((y, int(a), int(b)) for a, b in zip(starts, ends, strict=True))
        return spans


_JOIN_WITHIN = 6
