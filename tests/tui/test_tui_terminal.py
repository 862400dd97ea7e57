"""In a real terminal: the program puts it back however it ends, and NO_COLOR is obeyed."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainctl.client.errors import RunNotFound
from trainctl.tui.app import run_cockpit

SCRIPT = Path(__file__).with_name("cockpit_in_a_terminal.py")


class Terminal:
    """A pseudo terminal with the cockpit in it."""

    def __init__(self, master: int, process: "subprocess.Popen[bytes]") -> None:
        self.master, self.process, self.seen = master, process, b""

    def read_until(self, pattern: bytes, seconds: float = 20.0) -> bytes:
        """Read until what was written matches; words that are drawn in several goes may never stand in one piece."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline, self.seen[-2000:]
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)
        return self.seen


@contextmanager
def terminal(**environ: str) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (36, 120))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "LC_ALL": "C.UTF-8"} | environ
    process = subprocess.Popen([sys.executable, str(SCRIPT)], stdin=slave, stdout=slave, stderr=slave, env=environment)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait(10)
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(number: signal.Signals) -> None:
    with terminal() as screen:
        before = termios.tcgetattr(screen.master)
        screen.read_until(b"RUNNING")
        assert termios.tcgetattr(screen.master) != before, "the cockpit reads keys one by one"
        screen.process.send_signal(number)
        screen.read_until(b"left: quit")
        assert screen.process.wait(10) == 0
        assert termios.tcgetattr(screen.master) == before
        assert b"\x1b[?1049l" in screen.seen


def test_no_color_sends_no_colour() -> None:
    with terminal(NO_COLOR="1") as screen:
        screen.read_until(b"help")
        screen.read_until(b"\xe2[\xa0-\xa3]")  # braille: a chart is drawn
        os.write(screen.master, b"q")
        seen = screen.read_until(b"left: quit")
        codes = {code for found in re.findall(rb"\x1b\[([\d;]*)m", seen) for code in found.split(b";")}
        coloured = {code for code in codes if re.fullmatch(rb"38|48|3[0-7]|4[0-7]|9[0-7]|10[0-7]", code)}
        assert not coloured


def test_a_run_that_is_not_there_is_an_error_before_the_screen_starts() -> None:
    with pytest.raises(RunNotFound):
        run_cockpit("no-such-run")
