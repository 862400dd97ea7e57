"""The one way into the run's history: number, journal, apply, publish, always in this order.

The journal takes an event at once, everything else before the loop's next turn, and all of it later while the disk
hangs (`patient_keeper`): neither publishing nor followers wait for that.
"""

import logging
from collections import deque
from collections.abc import Callable

from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.ownership import Ownership
from trainctl.store.record import RunRecord
from trainctl.wire.messages import Body, Envelope
from trainctl.wire.server import Server

log = logging.getLogger(__name__)


class Recorder:
    """Takes bodies; does nothing more once a newer hub took over."""

    def __init__(self, *, record: RunRecord, keeper: JournalKeeper, server: Server, ownership: Ownership) -> None:
        self.record = record
        self._keeper = keeper
        self._server = server
        self._ownership = ownership
        self._followers: list[Callable[[Envelope], None]] = []
        self._untold: deque[Envelope] = deque()

    def follow(self, follower: Callable[[Envelope], None]) -> None:
        """Call `follower` with every envelope after it was given to the journal and published. It must not raise, nor
        take long; it may take further bodies, which come to all followers after the one at hand."""
        self._followers.append(follower)

    def take(self, body: Body, *, attempt: int = 0, link: int = 0) -> Envelope | None:
        """Record and publish one body; None when this hub may no longer write."""
        if not self._ownership.held():
            return None
        envelope, encoded = self._server.number(body, attempt=attempt, link=link)
        self._keeper.append(encoded, envelope.stream, envelope.seq, link, attempt)
        self.record.apply(envelope)
        self._server.send(envelope, encoded)
        self._untold.append(envelope)
        if len(self._untold) == 1:
            self._tell()
        return envelope

    def _tell(self) -> None:
        # The newest leaves the queue last, so that what a follower takes meanwhile is queued behind it and not nested.
        while self._untold:
            for follower in self._followers:
                try:
                    follower(self._untold[0])
                except Exception:  # a fault in what only looks on must not stop the history
                    log.exception("a follower of the history failed")
            self._untold.popleft()
