"""How a run's hub reaches the `trainctl run`s that started it, one on each node: small files in the run's directory.

    launchers/HOST-PID/launcher.json   who would start the next attempt; there while that `trainctl run` lives
    launchers/HOST-PID/ending.json     an operator's wish, written by the hub before the ranks are ended; it takes that
    launchers/HOST-PID/ending.reserve  room for that wish, so that a disk that has filled up meanwhile still takes it

`trainctl run` opens no socket, and a run's directory is what all of them see.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from trainctl.wire.places import own_started, process_started
from trainctl.wire.rundir import fsync_dir, make_dir, write_atomic

_LAUNCHER: Final = "launcher.json"
_WISH: Final = "ending.json"
_RESERVE: Final = "ending.reserve"
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


def _folder(directory: Path, host: str, pid: int) -> Path:
    return directory / "launchers" / f"{host}-{pid}"


def _own(directory: Path) -> Path:
    return _folder(directory, socket.gethostname(), os.getpid())


def announce(directory: Path) -> Launcher:
    """This process starts attempts of the run in `directory`; an old wish is forgotten. Raises OSError."""
    launcher = Launcher(host=socket.gethostname(), pid=os.getpid(), started=own_started())
    for folder in _folders(directory):
        if (known := _read(folder)) is None or (known.host == launcher.host and not _lives(known)):
            _clear(folder)
    folder = _own(directory)
    _clear(folder)
    make_dir(folder)
    write_atomic(folder / _LAUNCHER, msgspec.json.encode(launcher))
    with contextlib.suppress(OSError):  # a wish may still find room, when there is one
        write_atomic(folder / _RESERVE, b" " * _RESERVED_BYTES)
    return launcher


def withdraw(directory: Path, launcher: Launcher) -> None:
    """This process starts no more attempts."""
    with contextlib.suppress(OSError):  # whoever reads it sees that the process is gone
        _clear(_folder(directory, launcher.host, launcher.pid))
        (directory / "launchers").rmdir()


def find_launchers(directory: Path) -> list[Launcher]:
    """Who would start the next attempt. One on another host is believed."""
    return [launcher for folder in _folders(directory) if (launcher := _read(folder)) is not None and _lives(launcher)]


def request_ending(directory: Path, request: EndRequest, hosts: Collection[str] = ()) -> list[Path]:
    """Tell each launcher, as a whole or not at all; the wishes, which they take away. Raises OSError.

    Of several only those on `hosts` are told: a node that was lost leaves its file behind.
    """
    found = find_launchers(directory)
    meant = [launcher for launcher in found if launcher.host in hosts] or found
    if not meant:
        raise FileNotFoundError(errno.ENOENT, "there is none any more")
    told: list[Path] = []
    for launcher in meant:
        folder = _folder(directory, launcher.host, launcher.pid)
        try:
            _tell(folder, msgspec.json.encode(request))
        except OSError:
            if request.what == "restart":
                drop_request(told)
            raise
        told.append(folder / _WISH)
    return told


def take_request(directory: Path) -> EndRequest | None:
    """What this launcher is asked for, once: reading it takes it away."""
    path = _own(directory) / _WISH
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        request = msgspec.json.decode(path.read_bytes(), type=EndRequest)
        path.unlink()
        fsync_dir(path.parent)
        return request
    return None


def drop_request(told: Sequence[Path]) -> bool:
    """Take back the wishes of a command that was not carried out; false, and none is, when a launcher has its own
    already."""
    if not all(path.exists() for path in told):
        return False
    taken_back: list[tuple[Path, bytes]] = []
    for path in told:
        try:
            wish = path.read_bytes()
            path.unlink()
        except OSError:
            for other, lost in taken_back:
                with contextlib.suppress(OSError):
                    write_atomic(other, lost)
            return False
        taken_back.append((path, wish))
    return True


def wait_until_taken(told: Sequence[Path], patience_s: float, pause_s: float = 0.05) -> bool:
    """Whether every launcher took its wish in time. Blocks: for a thread of its own."""
    deadline = time.monotonic() + patience_s
    while any(path.exists() for path in told):
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause_s)
    return True


def _folders(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted((directory / "launchers").iterdir())
    return []


def _read(folder: Path) -> Launcher | None:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((folder / _LAUNCHER).read_bytes(), type=Launcher)
    return None


def _lives(launcher: Launcher) -> bool:
    if launcher.host != socket.gethostname():
        return True
    try:
        return process_started(launcher.pid) == launcher.started
    except OSError:
        return False


def _clear(folder: Path) -> None:
    """Nothing of a launcher is left. What cannot be deleted stays."""
    with contextlib.suppress(OSError):
        for name in (_LAUNCHER, _WISH, _RESERVE):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _tell(folder: Path, told: bytes) -> None:
    try:
        write_atomic(folder / _WISH, told)
    except OSError:
        if len(told) > _RESERVED_BYTES or not (folder / _RESERVE).exists():
            raise
        _write_into_reserve(folder, told)


def _write_into_reserve(folder: Path, told: bytes) -> None:
    """Blocks that are there already are written to, and a rename takes none. Raises OSError."""
    with (folder / _RESERVE).open("r+b") as file:
        file.write(told.ljust(_RESERVED_BYTES))
        file.flush()
        os.fsync(file.fileno())
    (folder / _RESERVE).replace(folder / _WISH)
    fsync_dir(folder)
