"""How far something is that takes a while: a bar on a terminal, a line at its beginning elsewhere. On stderr."""

import sys
import time
from collections.abc import Callable
from typing import Self, TextIO

from trainctl.wire.figures import file_size, plain

_WIDTH = 24
_DRAW_S = 0.1
_CLEAR_LINE = "\r\x1b[K"


def bar_line(name: str, done: int, total: int, elapsed_s: float) -> str:
    """`NAME  ━━━━━━────  1.2 GB of 4.0 GB, 850 MB/s`. The rate is that of all so far."""
    share = min(1.0, done / total) if total else 1.0
    filled = int(share * _WIDTH)
    rate = f", {file_size(int(done / elapsed_s))}/s" if done and elapsed_s > 0 else ""
    return f"{plain(name)}  {'━' * filled}{'─' * (_WIDTH - filled)}  {file_size(done)} of {file_size(total)}{rate}"


class BytesProgress:
    """Call it with (done, total); a `with` block takes the bar away again."""

    def __init__(
        self, name: str, total: int, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._stream = stream or sys.stderr
        self._clock = clock
        self._began = clock()
        self._drawn: float | None = None
        self._bar = self._stream.isatty()
        self._total = total

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if not self._bar or (self._drawn is not None and now - self._drawn < _DRAW_S):
            return
        self._drawn = now
        self._write(_CLEAR_LINE + bar_line(self._name, done, total, now - self._began))

    def __enter__(self) -> Self:
        if self._bar:
            self(0, self._total)
        else:
            self._write(f"{plain(self._name)}: {file_size(self._total)}\n")
        return self

    def __exit__(self, *_raised: object) -> None:
        if self._bar:
            self._write(_CLEAR_LINE)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
