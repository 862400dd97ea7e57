"""Events from the newest back, a page at a time. Pure.

A page ends at a `EventPlace`: the events before it are on the next one. Places do not move when events are added, so
pages join without a seam, also where the first come from the hub's memory and the others from the journal.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import msgspec

from trainctl.wire.codec import REPLY_LIMIT
from trainctl.wire.events import kind_of
from trainctl.wire.messages import Event, EventPlace, Events, EventsRequest

PAGE = 2000
_ROOM = REPLY_LIMIT - 64 * 1024
# Nothing is recorded later than this after it happened (rank 0 keeps what no hub takes for a minute or a little more).
_LATE_S = 3600.0

Place = tuple[int, int]  # epoch and number of the event's envelope


class Page:
    """One answer, filled from the newest event back; one that is not `bounded` holds all that there is."""

    def __init__(self, request: EventsRequest, *, bounded: bool = True) -> None:
        self._request = request
        self.bounded = bounded
        self._kinds = {"node" if kind == "node-event" else kind for kind in request.kinds}
        self.limit = max(0, min(request.limit, PAGE))
        self._room = _ROOM
        self._found: deque[Event] = deque()
        self._oldest: Place | None = None  # of what is in the page
        self.full = bounded and self.limit == 0
        self.over = False  # whatever is older is of no interest

    def add(self, events: Iterable[tuple[Place, Event]]) -> None:
        """Take events, newest first, as far as they match and there is room."""
        asked = self._request.before
        before = None if asked is None else (asked.epoch, asked.seq)
        for place, event in events:
            if self.full or self.over:
                return
            if before is not None and place >= before:
                continue
            self.passes(event)
            if not self.over and self.wants(event):
                self._put(place, event)

    def passes(self, event: Event) -> None:
        """Whoever looks has come as far back as to this event."""
        since = self._request.since
        self.over = self.over or (since is not None and event.time < since - _LATE_S)

    def end(self, reached: Place | None, *, missing: int = 0) -> Events:
        """The answer; `reached`: where whoever looked has stopped, None at the beginning of the record."""
        if self.over:
            reached = None
        elif self.full and self._oldest is not None:
            reached = self._oldest
        before = None if reached is None else EventPlace(epoch=reached[0], seq=reached[1])
        missing = 0 if before is not None or self.over else missing
        return Events(req=self._request.req, events=list(self._found), before=before, missing=missing)

    def wants(self, event: Event) -> bool:
        """Whether an event matches what is asked for."""
        request = self._request
        return (
            (not self._kinds or kind_of(event) in self._kinds)
            and (request.since is None or event.time >= request.since)
            and (request.from_step is None or event.step >= request.from_step)
        )

    def _put(self, place: Place, event: Event) -> None:
        if self.bounded:
            self._room -= len(msgspec.msgpack.encode(event)) + 5
            self.full = self._room < 0 and bool(self._found)
            if self.full:
                return
        self._found.appendleft(event)
        self._oldest = place
        self.full = self.bounded and len(self._found) >= self.limit


class Places:
    """Where the events of a record stand, in the order in which they came: as many as are kept."""

    def __init__(self, kept: int) -> None:
        self._places: deque[Place] = deque(maxlen=kept)

    def __reversed__(self) -> Iterator[Place]:
        return reversed(self._places)

    def add(self, place: Place) -> None:
        self._places.append(place)

    @property
    def first(self) -> Place:
        return self._places[0]

    @property
    def behind(self) -> Place:
        """One behind the newest."""
        epoch, seq = self._places[-1] if self._places else (0, 0)
        return epoch, seq + 1

    def saved(self) -> tuple[tuple[int, int, int], ...]:
        """As runs: epoch, first number, how many."""
        runs: list[tuple[int, int, int]] = []
        for epoch, seq in self._places:
            if runs and (epoch, seq) == (runs[-1][0], runs[-1][1] + runs[-1][2]):
                runs[-1] = (epoch, runs[-1][1], runs[-1][2] + 1)
            else:
                runs.append((epoch, seq, 1))
        return tuple(runs)

    def restore(self, runs: Iterable[tuple[int, int, int]], count: int, head: Place) -> None:
        """Be what was saved for `count` events; where a version that knew no places saved them, they end at `head`.

        Raises ValueError for what nobody saved like this.
        """
        found = [(epoch, first + at) for epoch, first, many in runs for at in range(min(many, count + 1))]
        if not found and count < (self._places.maxlen or 0):  # nothing is older, so it will do that they grow
            found = [(head[0], head[1] - count + 1 + at) for at in range(count)]
        if len(found) != count:
            raise ValueError(f"places of {len(found)} events, and {count} events")
        self._places.extend(found)
