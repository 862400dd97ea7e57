"""What is recorded of rank 0's own counting, by attempt and stream.

Rank 0 numbers what it sends over all streams, and sends again what it does not know to be recorded, so a number that is
already there tells a repetition. That holds for each stream by itself and not over all: a packed segment has its events
and its rows in an order of its own, in which numbers grow within a stream alone.
"""

from trainctl.wire.messages import Stream


class LinkHeads:
    """The newest number of each (attempt, stream)."""

    def __init__(self, saved: "list[tuple[int, Stream, int]] | None" = None) -> None:
        self._heads: dict[tuple[int, Stream], int] = {}
        self._have: dict[int, int] = {}
        for attempt, stream, head in saved or []:
            self.note(attempt, stream, head)

    def repeats(self, attempt: int, stream: Stream, link: int) -> bool:
        """Whether that stream has this number, or a newer one; what has no number never repeats."""
        return 0 < link <= self.head(attempt, stream)

    def head(self, attempt: int, stream: Stream) -> int:
        return self._heads.get((attempt, stream), 0)

    def note(self, attempt: int, stream: Stream, link: int) -> None:
        if link > self.head(attempt, stream):
            self._heads[attempt, stream] = link
            self._have[attempt] = max(link, self.have(attempt))

    def have(self, attempt: int) -> int:
        """The newest number of an attempt in any stream: rank 0 goes on behind it."""
        return self._have.get(attempt, 0)

    def saved(self) -> "list[tuple[int, Stream, int]]":
        return [(attempt, stream, head) for (attempt, stream), head in self._heads.items()]
