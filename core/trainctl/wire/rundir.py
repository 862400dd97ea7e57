"""A run's directory: its files, and the numbers that are allocated in it.

    run.json             who the run is (RunInfo)
    numbers/KIND-000001  one empty-handed file for each epoch, attempt and incarnation ever given out
    numbers/ended-000001 an attempt that an operator ended without a boundary (wire/endings.py)
    journal/             the recorded wire, in segments
    audit.jsonl          every command, hash-chained
    checkpoints/ID/      MANIFEST.json and what it vouches for
    hub.log              what the hub had to say
    launchers/HOST-PID/  a `trainctl run` that would start the next attempt, and what is wanted of it (wire/launcher.py)
    preempted.json       the last attempt that was preempted, and why (wire/preemption.py)
    left-000001          what attempt 1 ended with and the hub did not take, until it does (wire/left_behind.py)

Numbers are given out by creating a file with O_EXCL and syncing its directory: one winner on any file system, shared
ones too, and no number is ever given twice.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeAlias

from trainctl.wire.paths import runs_dir

Numbered: TypeAlias = Literal["epoch", "attempt", "incarnation"]

_AUDIT_TAIL = 256 * 1024  # longer than any line of it: a request is at most 64 KiB

RUN_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,47}\Z")


def new_run_id(name: str, now: float) -> str:
    """`NAME-YYYYMMDD-HHMMSS-XXXX` (UTC), fit for a file name."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:22] or "run"
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{secrets.token_hex(2)}"


def fsync_dir(path: Path) -> None:
    """Make renames and new names in `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_dir(path: Path) -> None:
    """Make a directory and what is missing above it, for us alone, so that their names survive a power cut."""
    if path.is_dir():
        return
    make_dir(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    # A directory may be written to and not read; then it is for its file system to keep the name.
    with contextlib.suppress(PermissionError):
        fsync_dir(path.parent)


def write_atomic(path: Path, data: bytes | Iterable[bytes], mode: int = 0o600) -> None:
    """Replace `path` as a whole: written beside it, synced, renamed, directory synced. Raises OSError."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.new")
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def keep_link(run_id: str, directory: Path) -> None:
    """Make a run that is kept elsewhere one of the user's runs: a link under the state directory. Raises OSError."""
    link = runs_dir() / run_id
    directory = directory.absolute()
    if link == directory or (link.is_symlink() and link.readlink() == directory):
        return
    if link.is_symlink():  # the directory was moved since
        link.unlink()
    if not link.exists():
        link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        link.symlink_to(directory, target_is_directory=True)


class RunDir:
    """Names of the files in a run's directory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()

    @property
    def info_file(self) -> Path:
        return self.path / "run.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def audit_file(self) -> Path:
        return self.path / "audit.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def hub_log(self) -> Path:
        return self.path / "hub.log"

    @property
    def numbers(self) -> Path:
        return self.path / "numbers"

    def create(self) -> None:
        """Make the directory and its parts. Raises OSError when the file system does not allow it."""
        for part in (self.path, self.journal, self.checkpoints, self.numbers):
            make_dir(part)

    def audit_head(self) -> str | None:
        """The hash of the newest whole line of the audit log, None where there is none or it cannot be read."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), self.audit_file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _AUDIT_TAIL))
            lines = file.read().rpartition(b"\n")[0].splitlines()
            return str(json.loads(lines[-1])["hash"]) if lines else None
        return None

    def newest(self, kind: Numbered) -> int:
        """The highest number given out, 0 if none was."""
        try:
            names = [path.name for path in self.numbers.iterdir()]
        except FileNotFoundError:
            return 0
        given = (name.removeprefix(f"{kind}-") for name in names if name.startswith(f"{kind}-"))
        return max((int(number) for number in given if number.isdigit()), default=0)

    def allocate(self, kind: Numbered) -> int:
        """Give out the next number, for good. Raises OSError (read-only, full)."""
        make_dir(self.numbers)
        while True:
            number = self.newest(kind) + 1
            try:
                handle = os.open(self.numbers / f"{kind}-{number:06d}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                continue
            # The name is the allocation, the content is for people. A full disk takes the one without the other.
            with contextlib.suppress(OSError), os.fdopen(handle, "w") as file:
                json.dump({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}, file)
                file.flush()
                os.fsync(file.fileno())
            fsync_dir(self.numbers)
            return number
