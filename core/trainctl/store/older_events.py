"""Events that are too old to be kept in memory, from the journal's files."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from trainctl.store.event_pages import Page, Place
from trainctl.store.frames import Frame, segment_frames, segments
from trainctl.store.links import LinkHeads
from trainctl.store.packed import UNUSABLE, PackedEnvelopes, envelopes_of
from trainctl.store.tails import key_decoder
from trainctl.wire import codec
from trainctl.wire.messages import Envelope, Event, Events, EventsRequest, NodeReading, Ranks, Rows, Stream


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """What the events before a segment come to: the newest of them, rank 0's numbers, and how many they are."""

    segment: int
    head: Place
    links: list[tuple[int, Stream, int]]
    count: int

    @property
    def behind(self) -> Place:
        """The first place that an event of the segment can have."""
        epoch, seq = self.head
        return epoch, seq + 1


class _Tag(msgspec.Struct):
    """What kind of packed frame it is, and no more of a block of rows than that."""

    type: str
    data: bytes = b""


_tag = msgspec.msgpack.Decoder(_Tag)


class _Reader:
    """Takes the events of segments one after another, each once, as `RunRecord.apply` does."""

    def __init__(self, mark: _Mark) -> None:
        self.head = mark.head
        self.count = mark.count
        self.links = LinkHeads(mark.links)
        self._decode = codec.envelope_decoder()

    def mark(self, segment: int) -> _Mark:
        return _Mark(segment=segment, head=self.head, links=self.links.saved(), count=self.count)

    def events(self, directory: Path, segment: int) -> Iterator[tuple[Place, Event]]:
        """The events of a segment, oldest first; what cannot be read is passed over: whoever replays it tells."""
        for found in segment_frames(directory, segment):
            for payload in _payloads(found):
                try:
                    if key_decoder.decode(payload).stream != "events":
                        continue
                    envelope = self._decode(payload)
                except (codec.DecodeError, msgspec.MsgspecError):
                    continue
                assert isinstance(envelope, Envelope)
                event = envelope.body
                if not isinstance(event, Rows | Ranks | NodeReading) and self._is_new(envelope):
                    self.count += 1
                    yield self.head, event

    def _is_new(self, envelope: Envelope) -> bool:
        if (envelope.epoch, envelope.seq) <= self.head:
            return False
        self.head = (envelope.epoch, envelope.seq)
        if self.links.repeats(envelope.attempt, envelope.stream, envelope.link):
            return False
        self.links.note(envelope.attempt, envelope.stream, envelope.link)
        return True


def _payloads(found: Frame) -> list[bytes]:
    if not found.packed:
        return [found.payload]
    try:
        tag = _tag.decode(found.payload)
        return envelopes_of(PackedEnvelopes(data=tag.data)) if tag.type == "envelopes" else []
    except UNUSABLE:
        return []


class OlderEvents:
    """Answers from a journal's files. May be asked in any thread; one answer is made at a time.

    What repeats what can only be said from the beginning on, so the first answer reads all segments up to those in
    memory once; what is remembered of each is a mark, and later answers read the segments that they are about.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._marks: list[_Mark] = []
        self._marked_to: Place | None = None
        self._count = 0  # of the events up to there
        self._lock = threading.Lock()

    def page(self, request: EventsRequest, first: Place, forgotten: int, *, within_s: float | None = None) -> Events:
        """The events before `request.before` and before `first`, the oldest in memory, of which there should be
        `forgotten`: with `within_s` a page of them, which may end anywhere and be empty; without it all of them.

        Raises OSError.
        """
        deadline = None if within_s is None else time.monotonic() + within_s
        before = first if request.before is None else min(first, (request.before.epoch, request.before.seq))
        page = Page(request, bounded=within_s is not None)
        with self._lock:
            if not self._mark_up_to(first, deadline):
                return page.end(before)
            for mark in reversed([mark for mark in self._marks if mark.behind < before]):
                self._fill(page, mark, before)
                if page.full or page.over or (deadline is not None and time.monotonic() > deadline):
                    return page.end(mark.behind)
            return page.end(None, missing=max(0, forgotten - self._count))

    def _fill(self, page: Page, mark: _Mark, before: Place) -> None:
        """Add what one segment has."""
        wanted: deque[tuple[Place, Event]] = deque(maxlen=page.limit + 1 if page.bounded else None)
        oldest: Event | None = None
        for place, event in _Reader(mark).events(self._journal, mark.segment):
            if place >= before:
                break
            oldest = oldest or event
            if page.wants(event):
                wanted.append((place, event))
        page.add(reversed(wanted))
        if oldest is not None and not page.full:
            page.passes(oldest)

    def _mark_up_to(self, first: Place, deadline: float | None) -> bool:
        """Mark the segments that begin before a place; False where there was no time to get there."""
        numbers = segments(self._journal)
        if any(mark.segment not in numbers for mark in self._marks):
            self._marks, self._marked_to = [], None  # somebody deleted them
        if not self._marks and numbers:
            self._marks.append(_Mark(segment=numbers[0], head=(0, 0), links=[], count=0))
        if self._marked_to == first:
            return True
        while self._marks:
            reader = _Reader(self._marks[-1])
            self._count = reader.count
            for place, _ in reader.events(self._journal, self._marks[-1].segment):
                if place >= first:
                    break
                self._count = reader.count
            following = next((number for number in numbers if number > self._marks[-1].segment), None)
            if reader.head >= first or following is None:
                break
            self._marks.append(reader.mark(following))
            if deadline is not None and time.monotonic() > deadline:
                return False
        self._marked_to = first
        return True
