"""A real terminal for tests: tmux, on a server of its own."""

import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from waiting import until


class Tmux:
    """One program in one tmux window of a given size."""

    def __init__(self, server: str) -> None:
        self.server = server

    def tmux(self, *words: str) -> str:
        done = subprocess.run(["tmux", "-L", self.server, *words], capture_output=True, text=True, timeout=20)
        return done.stdout

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    def keys(self, *keys: str) -> None:
        for key in keys:
            self.tmux("send-keys", key)

    def type(self, text: str) -> None:
        self.tmux("send-keys", "-l", text)

    def wait(self, pattern: str, timeout_s: float = 30.0) -> str:
        """Wait until the screen shows `pattern`; return the screen."""

        def shown() -> str | None:
            screen = self.screen()
            return screen if re.search(pattern, screen) else None

        try:
            found = until(shown, timeout_s, what=f"{pattern!r} on the screen")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.screen()}") from None
        assert found is not None
        return found

    def pid(self) -> int:
        return int(self.tmux("list-panes", "-F", "#{pane_pid}"))


@contextmanager
def tmux(command: Sequence[str], *, size: tuple[int, int] = (120, 36)) -> Iterator[Tmux]:
    """Run `command` in a terminal of (columns, rows); the window stays after it ended, to be read."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    terminal = Tmux(f"test-{uuid.uuid4().hex[:8]}")
    columns, rows = size
    size_words = ["-x", str(columns), "-y", str(rows)]
    # Without COLUMNS and LINES, which the test runner may have set: they would beat the terminal's own size.
    shell = 'unset COLUMNS LINES; LC_ALL=C.UTF-8 "$0" "$@"; echo "ended with $?"; exec cat'
    words = ["-f", "/dev/null", "new-session", "-d", *size_words, "sh", "-c", shell, *command]
    try:
        subprocess.run(["tmux", "-L", terminal.server, *words], check=True, timeout=20)
        yield terminal
    finally:
        terminal.tmux("kill-server")
