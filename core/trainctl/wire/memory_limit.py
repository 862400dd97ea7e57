"""The memory that this process's cgroup allows, which in a job or a container is less than the machine has.

Version 2 (`memory.max`, `memory.current`) and version 1 (`memory.limit_in_bytes`, `memory.usage_in_bytes`) of the
kernel's interface. Limits nest: the smallest on the way up holds. File cache that the kernel would give back first
(`inactive_file`) is not counted as used, as the kernel's own out-of-memory decisions do not count it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class _Interface:
    limit: str
    usage: str
    inactive: str


_V2 = _Interface(limit="memory.max", usage="memory.current", inactive="inactive_file")
_V1 = _Interface(limit="memory.limit_in_bytes", usage="memory.usage_in_bytes", inactive="total_inactive_file")


class MemoryLimit:
    """The tightest limit found above this process; `find` returns None where there is none."""

    def __init__(self, directory: Path, interface: _Interface, limit_bytes: int) -> None:
        self._directory = directory
        self._interface = interface
        self.limit_bytes = limit_bytes

    @classmethod
    def find(cls, machine_bytes: int, *, membership: str, root: Path = _CGROUPS) -> "MemoryLimit | None":
        """`membership` is the text of /proc/self/cgroup; limits of `machine_bytes` or more are none."""
        found: MemoryLimit | None = None
        for directory, interface in _levels(membership, root):
            limit = _number(directory / interface.limit)
            if limit is not None and limit < (found.limit_bytes if found else machine_bytes):
                found = cls(directory, interface, limit)
        return found

    def used_bytes(self) -> int | None:
        """Memory in use under the limit; None when the cgroup cannot be read."""
        usage = _number(self._directory / self._interface.usage)
        return None if usage is None else max(0, usage - self._inactive_bytes())

    def _inactive_bytes(self) -> int:
        with contextlib.suppress(OSError):
            for line in (self._directory / "memory.stat").read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == self._interface.inactive:
                    return int(value)
        return 0


def _levels(membership: str, root: Path) -> Iterator[tuple[Path, _Interface]]:
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top, interface = root, _V2
        elif "memory" in controllers.split(","):
            top, interface = root / "memory", _V1
        else:
            continue
        # Inside a container the path may name a place outside its view: then only its top is there to be read.
        own = PurePosixPath(path.lstrip("/"))
        for level in (own, *own.parents):
            yield top / level, interface


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # absent, or "max": no limit here
        return int(path.read_text())
    return None
