"""The audit log: who asked for what and what became of it, one JSON object a line, each chained to the one before.

`hash` is the SHA-256 of the previous line's hash and of the line itself (its keys sorted, without `hash`); the first
line's `prev` is 64 zeros. Changing, removing or inserting a line breaks the chain from there on.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from trainctl.wire.rundir import fsync_dir

Json: TypeAlias = bool | int | float | str | None

FIRST = "0" * 64


@dataclass(frozen=True, kw_only=True)
class AuditProblem:
    """The first line that does not fit; what stands before it is untouched."""

    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line} {self.text}"


class NotTheWriter(Exception):
    """The log is another's to write by now."""


class AuditLog:
    """Appends entries; they are on disk before `append` returns. One writer at a time.

    `may_write` is asked before each, in the thread that appends; it may raise OSError.
    """

    def __init__(self, path: Path, may_write: Callable[[], bool] = lambda: True) -> None:
        self.path = path
        self.head = FIRST
        self._may_write = may_write
        self._left: int | None = None  # the size at which we left it

    def append(self, *entries: Mapping[str, Json]) -> None:
        """Write entries and fsync them. Raises OSError or `NotTheWriter`, and then nothing of them is in the log."""
        self._ask()
        if self._learn_head():
            self._ask()  # reading may have taken long
        head, lines = self.head, b""
        for entry in entries:
            line = _chained(head, entry)
            head = str(json.loads(line)["hash"])
            lines += line.encode() + b"\n"
        existed = self.path.exists()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(handle).st_size
            try:
                _write_all(handle, lines)
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
        if not existed:
            fsync_dir(self.path.parent)
        self.head = head
        self._left = size + len(lines)

    def lines(self, limit: int) -> list[str]:
        """The newest `limit` lines, oldest first. Raises OSError."""
        try:
            text = self.path.read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return []
        return text.splitlines()[-limit:] if limit > 0 else []

    def mentions(self, command_id: str) -> bool:
        """Whether a command of this id was ever written down. Reads the whole log; raises OSError."""
        wanted = f'"id":{json.dumps(command_id)}'.encode()
        try:
            with self.path.open("rb") as file:
                return any(wanted in line and json.loads(line).get("id") == command_id for line in file)
        except FileNotFoundError:
            return False

    def _ask(self) -> None:
        if not self._may_write():
            raise NotTheWriter

    def _learn_head(self) -> bool:
        """Read the log where it is not known, or not as it was left; whether that was so."""
        if self._left is not None and self._size() == self._left:
            return False
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            data = b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            # A crash tore the last line. It was not synced, so nothing was accepted on its strength.
            os.truncate(self.path, whole)
        # Another hub may have gone on from our line. Where that is gone the chain goes on from it all the same: whoever
        # cuts the log or writes it anew is found out by that.
        if self._left is None or _last_hash(data[: self._left]) == self.head:
            self.head = _last_hash(data[:whole])
        self._left = whole
        return True

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0


def _last_hash(data: bytes) -> str:
    """The hash of the last line."""
    last = data.rstrip(b"\n").rpartition(b"\n")[2]
    if not last:
        return FIRST
    try:
        return str(json.loads(last)["hash"])
    except (ValueError, KeyError, TypeError):
        return hashlib.sha256(last).hexdigest()  # the chain is broken there, and verify_audit says so


def verify_audit(path: Path, kept: Mapping[str, str] | None = None) -> AuditProblem | None:
    """Check the whole chain, and that the hashes `kept` elsewhere (each with where) are in it: None when all fits.

    Raises OSError; a log that does not exist is an empty one.
    """
    return verify_lines(_lines(path), kept)


def check_audit(path: Path, kept: Mapping[str, str], head: str = FIRST) -> tuple[int, str | None]:
    """The same, for who is not here: how many lines there are, and the problem in words. Raises OSError.

    `head` is the hash of the line that whoever writes the log wrote last, if it is known.
    """
    problem = verify_lines(_lines(path), kept, head)
    return sum(1 for _ in _lines(path)), None if problem is None else str(problem)


def verify_lines(
    lines: Iterable[str], kept: Mapping[str, str] | None = None, newest: str = FIRST
) -> AuditProblem | None:
    """The same for lines at hand, oldest first; `newest` is the hash of the one that was written last, if known."""
    head, number = FIRST, 0
    missing = {found: f"checkpoint {where} keeps" for found, where in (kept or {}).items()}
    if newest != FIRST:
        missing.setdefault(newest, "its hub knows")
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            # A name given twice, or spaces: readers of such a line need not agree on what it says.
            altered = _canonical(found) != line.rstrip("\n")
            stated = found.pop("hash")
            previous = found["prev"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return AuditProblem(line=number, text="is no entry of the audit log")
        if previous != head:
            return AuditProblem(line=number, text="does not follow the line before: one was changed, added or removed")
        if altered:
            return AuditProblem(line=number, text="was changed: it is not in the one form in which lines are written")
        if _hash(found) != stated:
            return AuditProblem(line=number, text="was changed: its hash does not fit its content")
        head = stated
        missing.pop(head, None)
    if missing:
        where = next(iter(missing.values()))
        text = f"is missing: {where} the hash of a line that is not here: the log was cut or rewritten"
        return AuditProblem(line=number + 1, text=text)
    return None


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for line in file:
                yield line.decode("utf-8", "replace")
    except FileNotFoundError:
        return


def _chained(head: str, entry: Mapping[str, Json]) -> str:
    linked = {name: _plain(value) for name, value in entry.items()} | {"prev": head}
    return _canonical(linked | {"hash": _hash(linked)})


def _hash(linked: Mapping[str, Json]) -> str:
    return hashlib.sha256((str(linked["prev"]) + _canonical(linked)).encode()).hexdigest()


def _canonical(entry: Mapping[str, Json]) -> str:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Json) -> Json:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _write_all(handle: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.write(handle, memoryview(data)[written:])
