"""Envelopes that were appended to the journal and are not known to be on disk: kept until a sync has proved them.

A file system tells once that it could not write back what it had taken, drops it, and lets the next sync succeed.
"""

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """An envelope that has to come into the journal."""

    encoded: bytes
    stream: str
    seq: int
    link: int
    attempt: int


class Unproven:
    """In the order in which they were appended, the newest `limit_bytes` of them. `prove` may run in a thread that
    syncs, `waiting` in any, the rest in the one that appends."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept: deque[tuple[int, Waiting]] = deque()
        self._bytes = 0
        self._given_up = 0  # number of the newest that was over the limit
        self._proved = 0
        self.appended = 0

    def append(self, item: Waiting) -> None:
        self.appended += 1
        self._prune()
        self._kept.append((self.appended, item))
        self._bytes += len(item.encoded)
        while self._bytes > self._limit_bytes:
            self._given_up = self._pop()

    def prove(self, number: int) -> None:
        """What was appended up to that `appended` is on disk."""
        self._proved = max(self._proved, number)

    def take(self) -> tuple[list[Waiting], int]:
        """Those that are kept, which then are here no more, and how many had to be given up."""
        self._prune()
        taken, given_up = [item for _, item in self._kept], max(0, self._given_up - self._proved)
        self._kept.clear()
        self._bytes, self._proved = 0, self.appended
        return taken, given_up

    def waiting(self) -> list[Waiting]:
        """Those that are kept, oldest first."""
        return [item for number, item in list(self._kept) if number > self._proved]

    def link(self, attempt: int) -> int | None:
        """The oldest of rank 0's numbers in that attempt."""
        self._prune()
        return next((item.link for _, item in self._kept if item.link and item.attempt == attempt), None)

    def _prune(self) -> None:
        while self._kept and self._kept[0][0] <= self._proved:
            self._pop()

    def _pop(self) -> int:
        number, item = self._kept.popleft()
        self._bytes -= len(item.encoded)
        return number
