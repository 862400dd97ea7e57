"""What a disk may hold after the power went: every state that POSIX allows, not only those of one file system.

The rules, harsher than any file system in use
- A file's bytes are what its last sync made of them; of what was written since, nothing, half or all may be there.
- A directory's names are those of its last sync; of what changed since, any part may be there, in order. A rename is
  one change. A sync of a file does not keep its name.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from effects import Effect

_MOST_SUBSETS = 64  # of the changes of one directory; of more changes only what came first, last, alone or is missing


@dataclass
class _File:
    now: bytes = b""
    synced: bytes = b""

    def after_cut(self) -> set[bytes]:
        half = self.now[: (len(self.synced) + len(self.now)) // 2]
        return {self.now, self.synced, half}


@dataclass(frozen=True)
class _Change:
    """Names that go and a name that comes, at once."""

    gone: str | None = None
    come: tuple[str, int] | None = None

    def apply(self, names: dict[str, int]) -> None:
        if self.gone is not None:
            names.pop(self.gone, None)
        if self.come is not None:
            names[self.come[0]] = self.come[1]


@dataclass
class _Directory:
    now: dict[str, int] = field(default_factory=dict)
    synced: dict[str, int] = field(default_factory=dict)
    since: list[_Change] = field(default_factory=list)

    def change(self, change: _Change) -> None:
        change.apply(self.now)
        self.since.append(change)

    def after_cut(self) -> list[dict[str, int]]:
        states: list[dict[str, int]] = []
        for kept in _subsets(len(self.since)):
            names = dict(self.synced)
            for number in kept:
                self.since[number].apply(names)
            if names not in states:
                states.append(names)
        return states


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    if 2**count <= _MOST_SUBSETS:
        for size in range(count + 1):
            yield from itertools.combinations(range(count), size)
        return
    for number in range(count + 1):
        yield tuple(range(number))
        yield tuple(range(number, count))
    for number in range(count):
        yield (number,)
        yield tuple(other for other in range(count) if other != number)


class Disk:
    """The files below `root`, as effects make them."""

    def __init__(self, root: Path) -> None:
        self._root = PurePosixPath(root)
        self._nodes: list[_File | _Directory] = [_Directory()]

    def apply(self, effect: Effect) -> None:
        match effect.kind:
            case "create" | "mkdir":
                self._nodes.append(_File() if effect.kind == "create" else _Directory())
                directory, name = self._parent(effect.path)
                directory.change(_Change(come=(name, len(self._nodes) - 1)))
            case "unlink" | "rmdir":
                directory, name = self._parent(effect.path)
                directory.change(_Change(gone=name))
            case "rename":
                directory, old = self._parent(effect.path)
                target, new = self._parent(effect.other)
                assert directory is target, "a rename from one directory into another is not in this model"
                directory.change(_Change(gone=old, come=(new, directory.now[old])))
            case "write" | "truncate":
                file = self._node(effect.path)
                assert isinstance(file, _File)
                before = file.now[: effect.offset].ljust(effect.offset, b"\0")
                after = file.now[effect.offset + len(effect.data) :] if effect.kind == "write" else b""
                file.now = before + effect.data + after
            case "fsync":
                node = self._node(effect.path)
                node.synced = node.now if isinstance(node, _File) else dict(node.now)  # type: ignore[assignment]
                if isinstance(node, _Directory):
                    node.since = []
            case _:
                raise AssertionError(f"the model does not know {effect.kind}")

    def files(self) -> dict[str, bytes]:
        """Path below the root and content of every file, as a running process sees them."""
        return {path: node.now for path, node in self._walk(0, "") if isinstance(node, _File)}

    def after_cut(self) -> Iterator[frozenset[tuple[str, bytes]]]:
        """Every content that the files may have when the power goes now and comes back."""
        yield from self._states(0, "")

    def _states(self, number: int, path: str) -> list[frozenset[tuple[str, bytes]]]:
        node = self._nodes[number]
        if isinstance(node, _File):
            return [frozenset({(path, content)}) for content in node.after_cut()]
        found = set()
        for names in node.after_cut():
            below = [self._states(child, f"{path}/{name}" if path else name) for name, child in names.items()]
            found |= {frozenset().union(*parts) for parts in itertools.product(*below)}
        return list(found)

    def _walk(self, number: int, path: str) -> Iterator[tuple[str, "_File | _Directory"]]:
        node = self._nodes[number]
        yield path, node
        if isinstance(node, _Directory):
            for name, child in node.now.items():
                yield from self._walk(child, f"{path}/{name}" if path else name)

    def _node(self, path: str) -> "_File | _Directory":
        node = self._nodes[0]
        for part in PurePosixPath(path).relative_to(self._root).parts:
            assert isinstance(node, _Directory)
            node = self._nodes[node.now[part]]
        return node

    def _parent(self, path: str) -> tuple[_Directory, str]:
        inside = PurePosixPath(path)
        directory = self._node(str(inside.parent))
        assert isinstance(directory, _Directory)
        return directory, inside.name
