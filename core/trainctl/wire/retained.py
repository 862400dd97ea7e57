"""The newest envelopes of one stream, encoded, for subscribers that missed a few."""

import itertools
from collections import deque

RETAINED_BYTES = 8 * 1024 * 1024


class Retained:
    """Bounded by count and by bytes, whichever is reached first. Numbers grow; one that was never sent is no reason to
    give others in its place."""

    def __init__(self, count: int, limit_bytes: int = RETAINED_BYTES) -> None:
        self._kept: deque[tuple[int, bytes]] = deque()
        self._count = count
        self._limit_bytes = limit_bytes
        self._bytes = 0

    def append(self, seq: int, encoded: bytes) -> None:
        self._kept.append((seq, encoded))
        self._bytes += len(encoded)
        while len(self._kept) > self._count or (self._bytes > self._limit_bytes and len(self._kept) > 1):
            self._bytes -= len(self._kept.popleft()[1])

    def range(self, first: int, last: int) -> list[bytes] | None:
        """Numbers `first` to `last` as far as they exist, or None where `first` is no longer kept."""
        if not self._kept or self._kept[0][0] > first:
            return None
        unsent = self._kept[-1][0] - self._kept[0][0] + 1 - len(self._kept)
        start = max(0, first - self._kept[0][0] - unsent)
        return [encoded for seq, encoded in itertools.islice(self._kept, start, None) if first <= seq <= last]
