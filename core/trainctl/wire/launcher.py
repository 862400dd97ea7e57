"""How a run's hub reaches the `trainctl run` that started it: small files in the run's directory.

    launcher.json   who would start the next attempt; there while `trainctl run` lives
    ending.json     an operator's wish, written by the hub before the ranks are ended, taken away by the launcher
    ending.reserve  room for that wish, so that a disk that has filled up meanwhile still takes it

`trainctl run` opens no socket, and a run's directory is what both see.
"""

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Final, Literal

import msgspec

from trainctl.wire.places import own_started, process_started
from trainctl.wire.rundir import fsync_dir, write_atomic

_RESERVED_BYTES: Final = 4096  # a command's id and an actor's name are far shorter


class Launcher(msgspec.Struct, frozen=True, kw_only=True):
    """A `trainctl run` at work."""

    host: str
    pid: int
    started: float  # as in /proc, so that a recycled pid is not taken for it


class EndRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`abort`: no further attempt. `restart`: another one, resumed from `target` (`last` or a checkpoint's id)."""

    what: Literal["abort", "restart"]
    command: str
    actor: str
    attempt: int
    target: str = "last"


def _launcher_file(directory: Path) -> Path:
    return directory / "launcher.json"


def _request_file(directory: Path) -> Path:
    return directory / "ending.json"


def _reserve(directory: Path) -> Path:
    return directory / "ending.reserve"


def announce(directory: Path) -> Launcher:
    """This process starts the attempts of the run in `directory`; an old wish is forgotten. Raises OSError."""
    launcher = Launcher(host=socket.gethostname(), pid=os.getpid(), started=own_started())
    _request_file(directory).unlink(missing_ok=True)
    write_atomic(_launcher_file(directory), msgspec.json.encode(launcher))
    with contextlib.suppress(OSError):  # a wish may still find room, when there is one
        write_atomic(_reserve(directory), b" " * _RESERVED_BYTES)
    return launcher


def withdraw(directory: Path, launcher: Launcher) -> None:
    """This process starts no more attempts."""
    if _read_launcher(directory) == launcher:
        with contextlib.suppress(OSError):  # whoever reads it sees that the process is gone
            _launcher_file(directory).unlink()
            _reserve(directory).unlink(missing_ok=True)


def find_launcher(directory: Path) -> Launcher | None:
    """Who would start the next attempt, None when nobody would. One on another host is believed."""
    launcher = _read_launcher(directory)
    if launcher is None or launcher.host != socket.gethostname():
        return launcher
    try:
        return launcher if process_started(launcher.pid) == launcher.started else None
    except OSError:
        return None


def _read_launcher(directory: Path) -> Launcher | None:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(_launcher_file(directory).read_bytes(), type=Launcher)
    return None


def request_ending(directory: Path, request: EndRequest) -> None:
    """Tell the launcher, as a whole or not at all. Raises OSError."""
    told = msgspec.json.encode(request)
    try:
        write_atomic(_request_file(directory), told)
    except OSError:
        if len(told) > _RESERVED_BYTES or not _reserve(directory).exists():
            raise
        _write_into_reserve(directory, told)


def _write_into_reserve(directory: Path, told: bytes) -> None:
    """Blocks that are there already are written to, and a rename takes none. Raises OSError."""
    with _reserve(directory).open("r+b") as file:
        file.write(told.ljust(_RESERVED_BYTES))
        file.flush()
        os.fsync(file.fileno())
    _reserve(directory).replace(_request_file(directory))
    fsync_dir(directory)


def take_request(directory: Path) -> EndRequest | None:
    """What the launcher is asked for, once: reading it takes it away."""
    path = _request_file(directory)
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        request = msgspec.json.decode(path.read_bytes(), type=EndRequest)
        path.unlink()
        fsync_dir(directory)
        return request
    return None


def drop_request(directory: Path, command: str) -> bool:
    """Take back the wish of a command that was not carried out; false when the launcher has it already."""
    path = _request_file(directory)
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        if msgspec.json.decode(path.read_bytes(), type=EndRequest).command == command:
            path.unlink()
            return True
    return False


def wait_until_taken(directory: Path, patience_s: float, pause_s: float = 0.05) -> bool:
    """Whether the launcher took the wish in time. Blocks: for a thread of its own."""
    deadline = time.monotonic() + patience_s
    while _request_file(directory).exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause_s)
    return True
