"""The bounded queue between the hub's loop and a sink's thread."""

import threading
from collections import deque

from trainctl.wire.messages import Envelope, Rows

LIMIT_MESSAGES = 2000
LIMIT_BYTES = 16 * 1024 * 1024


class Feed:
    """`offer` never waits: what does not fit is counted and left to the journal."""

    def __init__(self, *, limit_messages: int = LIMIT_MESSAGES, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_messages = limit_messages
        self._limit_bytes = limit_bytes
        self._waiting: deque[Envelope] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._ended = False
        self.overflowed = 0

    def offer(self, envelope: Envelope) -> bool:
        """False where it did not fit."""
        size = _size(envelope)
        with self._changed:
            full = len(self._waiting) >= self._limit_messages or self._bytes + size > self._limit_bytes
            if full or self._ended:
                self.overflowed += 1
                return False
            self._waiting.append(envelope)
            self._bytes += size
            self._changed.notify()
            return True

    def take(self, timeout_s: float) -> Envelope | None:
        """The next one; None after `timeout_s`, or at once where nothing more will come."""
        with self._changed:
            if not self._waiting and not self._ended:
                self._changed.wait(timeout_s)
            if not self._waiting:
                return None
            envelope = self._waiting.popleft()
            self._bytes -= _size(envelope)
            return envelope

    def clear(self) -> None:
        """Give up what waits: it will be read from the journal."""
        with self._changed:
            self._waiting.clear()
            self._bytes = 0

    def end(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        return self._ended

    def rest(self, seconds: float) -> None:
        """Wait, unless and until nothing more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended, seconds)


def _size(envelope: Envelope) -> int:
    if isinstance(envelope.body, Rows):
        return sum(len(column.data) for column in envelope.body.columns) + 16 * len(envelope.body.steps) + 200
    return 500
