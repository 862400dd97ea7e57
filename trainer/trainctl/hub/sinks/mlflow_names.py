"""The names that MLflow takes for metrics and parameters. Pure.

MLflow refuses a whole batch for one name that it does not take: names are paths without empty parts, `.` and `..`, of
letters, digits and `_-. :`, at most 250 characters long. Its file store keeps a file for each, so that no name can be
the folder of another, and no part can be longer than 255 bytes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import PurePosixPath

_INVALID = re.compile(r"[^\w\-. :/]")
_BYTES = 240  # and room for a number


class Names:
    """One name for each of ours, and no two alike. Who comes first gets the name that is nearest to its own.

    `kept` are names that were given out before, by ours.
    """

    def __init__(self, *, kept: Mapping[str, str], reserved: Iterable[str] = ()) -> None:
        self._used: dict[str, str] = {}
        self._files: set[str] = set()
        self._folders: set[str] = set()
        for name in reserved:
            self._take(name)
        for name, used in kept.items():
            self._used[name] = used
            self._take(used)

    def of(self, name: str) -> str:
        """The name for MLflow, always the same one."""
        if name not in self._used:
            self._used[name] = used = next(one for one in _candidates(valid(name)) if self._is_free(one))
            self._take(used)
        return self._used[name]

    def _is_free(self, name: str) -> bool:
        return name not in self._files and name not in self._folders and self._files.isdisjoint(_folders(name))

    def _take(self, name: str) -> None:
        self._files.add(name)
        self._folders.update(_folders(name))


def valid(name: str) -> str:
    """The nearest name that MLflow takes: other characters become `_`, and so do parts of nothing but dots."""
    parts = [part for part in _INVALID.sub("_", name).split("/") if part]
    path = "/".join("_" * len(part) if not part.strip(".") else part for part in parts)
    return path.encode()[:_BYTES].decode(errors="ignore").strip("/") or "_"


def _candidates(near: str) -> Iterator[str]:
    yield near
    flat = near.replace("/", ".")
    yield flat
    for number in count(2):
        yield f"{flat}_{number}"


def _folders(name: str) -> list[str]:
    return [str(folder) for folder in PurePosixPath(name).parents][:-1]
