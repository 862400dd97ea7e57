"""The agent's end of the GPU poller: starts it, asks it, reads its answers, and never waits for it without a limit."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import Final

from trainctl.agent.gpu_tick import TickReader
from trainctl.agent.gpu_watch import GpuPicture, GpuWatch

MODULE: Final = "trainctl.agent.gpu_poller"
_LEAVES_WITHIN_S: Final = 1.0


class GpuMonitor:
    """Owns the poller's process. Use it from one asyncio loop; `close` when done."""

    def __init__(self) -> None:
        self._watch = GpuWatch()
        self._process: subprocess.Popen[bytes] | None = None
        self._reader = TickReader()
        self._answered = asyncio.Event()
        self._hung_up = False

    async def poll(self, patience_s: float) -> GpuPicture:
        """Ask for a reading, wait up to `patience_s` for it, and return what may be said now."""
        self._reap()
        if self._watch.may_start(time.monotonic()):
            self._start()
        if self._process is not None and not self._hung_up:
            if not self._watch.waiting:
                self._ask()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        await self._answered.wait()
            self._reap()
        return self._watch.picture(time.monotonic())

    async def close(self) -> None:
        """Let the poller leave. One that hangs in the driver is left behind: it goes when the driver lets it."""
        process = self._process
        if process is None:
            return
        self._hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, _LEAVES_WITHIN_S)
        if process.returncode is None:
            process.returncode = 0  # given up on purpose: without this, Popen complains of a child left running
        self._process = None

    def _start(self) -> None:
        self._watch.started(time.monotonic())
        self._reader, self._hung_up = TickReader(), False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C on the agent's terminal is not for a process inside a driver call
            )
        except OSError as error:
            self._watch.ended(time.monotonic(), f"cannot be started ({error})")
            return
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        asyncio.get_running_loop().add_reader(self._process.stdout.fileno(), self._read)

    def _ask(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._answered.clear()
        self._watch.asked(time.monotonic(), time.time())
        with contextlib.suppress(BrokenPipeError):  # it just ended: the end of file on its stdout says so too
            self._process.stdin.write(b"?")

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            data = self._process.stdout.read(65536)
            ticks = self._reader.feed(data) if data else []
        except (OSError, ValueError):
            data, ticks = b"", []
        for tick in ticks:
            self._watch.answered(tick)
            self._answered.set()
        if data == b"":
            self._hang_up()
            self._answered.set()

    def _hang_up(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        if not self._hung_up:
            self._hung_up = True
            asyncio.get_running_loop().remove_reader(self._process.stdout.fileno())
            self._process.stdout.close()
            self._process.stdin.close()

    def _reap(self) -> None:
        """Notice that the process is gone. One that hung up but still exists hangs in the driver: wait for it."""
        process = self._process
        if process is None or not self._hung_up or process.poll() is None:
            return
        self._process = None
        self._watch.ended(time.monotonic(), how_it_ended(process.returncode))


def how_it_ended(returncode: int) -> str:
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-returncode).name}"
    return f"left with code {returncode}"
