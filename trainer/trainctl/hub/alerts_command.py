"""Runs the alert command once: without a shell, in a session of its own, with a deadline."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

_TAIL_BYTES = 400
_PIPE_BYTES = 65_536
_GRACE_S = 2.0
# The key that authenticates ranks to one another is nobody else's.
_SECRETS = frozenset({"TRAINCTL_RUN_SECRET"})


async def run_command(
    arguments: Sequence[str], *, stdin: bytes, extra: Mapping[str, str], directory: Path, timeout_s: float
) -> str | None:
    """Run a command in `directory` and wait for it; return why it failed, or None.

    It gets the hub's environment with `extra`, and its niceness. At the deadline, or when this is cancelled, its
    process group gets SIGTERM, and SIGKILL two seconds later.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS} | dict(extra)
    with _Output() as output:
        try:
            process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=output.theirs,
                stderr=output.theirs,
                cwd=directory,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return f"{arguments[0]} cannot be started: {getattr(error, 'strerror', None) or error}"
        assert process.stdin is not None
        try:
            async with asyncio.timeout(timeout_s):
                await _feed(process.stdin, stdin)
                code = await process.wait()
        except TimeoutError:
            return f"{arguments[0]} took longer than {timeout_s:g} s and was ended{output.words()}"
        finally:
            await _end(process)
        if code == 0:
            return None
        how = f"ended with {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
        return f"{arguments[0]} {how}{output.words()}"


class _Output:
    """The end of what a command says. Closed with the command, whoever it left behind with the other end in hand."""

    def __enter__(self) -> Self:
        self._ours, self.theirs = os.pipe()
        os.set_blocking(self._ours, False)
        self._said = bytearray()
        asyncio.get_running_loop().add_reader(self._ours, self._read)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.get_running_loop().remove_reader(self._ours)
        os.close(self._ours)
        os.close(self.theirs)

    def words(self) -> str:
        """What it said, as the end of a sentence."""
        self._read()
        text = " ".join(self._said.decode(errors="replace").split())
        return f"; it said: {text}" if text else ""

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._said += os.read(self._ours, _PIPE_BYTES)
            del self._said[:-_TAIL_BYTES]


async def _feed(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a command need not read
        writer.write(data)
        await writer.drain()
    writer.close()


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await process.wait()
    # A process that survives SIGKILL hangs in the kernel; nothing more can be done to it.
