"""Which envelopes have values in memory that no packed block holds yet, in the order of those values.

Most envelopes of a run have the same metrics, so the names are kept once for all of them, and no longer than the last
of them is here: a script that logs other metrics at each step has as many sets of names as it has steps.
"""

import sys
from collections import Counter, deque
from collections.abc import Iterable
from itertools import islice
from typing import TypeAlias

Names: TypeAlias = tuple[str, ...]
SavedEntries: TypeAlias = list[tuple[int, int, int, int]]
SavedKinds: TypeAlias = list[tuple[int, tuple[int | str, ...]]]


class _Kind:
    """The metrics that came together in one incarnation, and in how many envelopes that are here."""

    __slots__ = ("incarnation", "names", "uses")

    def __init__(self, incarnation: int, names: Names) -> None:
        self.incarnation, self.names, self.uses = incarnation, names, 0


class Unsealed:
    """A queue of envelopes by (epoch, seq), each with how many rows of which metrics it brought."""

    def __init__(self) -> None:
        self._entries: deque[tuple[int, int, int, _Kind]] = deque()
        self._kinds: dict[tuple[int, Names], _Kind] = {}

    @property
    def sets_of_names(self) -> int:
        """How many different ones are kept."""
        return len(self._kinds)

    def append(self, epoch: int, seq: int, rows: int, incarnation: int, names: Names) -> None:
        kind = self._kinds.get((incarnation, names))
        if kind is None:
            kept = tuple(map(sys.intern, names))
            kind = self._kinds[incarnation, kept] = _Kind(incarnation, kept)
        kind.uses += 1
        self._entries.append((epoch, seq, rows, kind))

    @property
    def first(self) -> tuple[int, int] | None:
        """(epoch, seq) of the oldest, None where there is none."""
        return self._entries[0][:2] if self._entries else None

    def tracks(self) -> set[tuple[str, int]]:
        """(name, incarnation) of all of them."""
        return {(name, kind.incarnation) for kind in self._kinds.values() for name in kind.names}

    def begins_with(self, keys: list[tuple[int, int]]) -> bool:
        """Whether the oldest are these (epoch, seq), all of them and in this order."""
        return [entry[:2] for entry in islice(self._entries, len(keys))] == keys

    def drop(self, count: int) -> None:
        for _ in range(count):
            self._pop()

    def take_up_to(self, last: tuple[int, int]) -> Counter[tuple[str, int]]:
        """Drop all up to (epoch, seq) `last`; return how many values they brought, by (name, incarnation)."""
        counts: Counter[tuple[str, int]] = Counter()
        while self._entries and self._entries[0][:2] <= last:
            rows, kind = self._pop()
            for name in kind.names:
                counts[name, kind.incarnation] += rows
        return counts

    def _pop(self) -> tuple[int, _Kind]:
        _, _, rows, kind = self._entries.popleft()
        kind.uses -= 1
        if not kind.uses:
            del self._kinds[kind.incarnation, kind.names]
        return rows, kind

    def saved(self, names: Iterable[str]) -> tuple[SavedEntries, SavedKinds]:
        """The queue, and the sets that its entries name by number, of numbers in `names`, which has all of them."""
        places = {name: at for at, name in enumerate(names)}
        numbers = {id(kind): at for at, kind in enumerate(self._kinds.values())}
        entries = [(epoch, seq, rows, numbers[id(kind)]) for epoch, seq, rows, kind in self._entries]
        return entries, [
            (kind.incarnation, tuple(places[name] for name in kind.names)) for kind in self._kinds.values()
        ]

    def restore(self, entries: SavedEntries, kinds: SavedKinds, names: list[str]) -> None:
        """Be, when empty, what was saved. Raises IndexError for what never was."""
        known = [
            (incarnation, tuple(each if isinstance(each, str) else names[each] for each in members))
            for incarnation, members in kinds
        ]
        for epoch, seq, rows, kind in entries:
            self.append(epoch, seq, rows, *known[kind])
