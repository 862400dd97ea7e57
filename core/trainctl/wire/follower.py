"""Follow a source: every published message once and in order, across lost messages and restarts of the source.

The rules are in wire/sequence.py; here are the socket, the clock and the questions.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from typing import TypeAlias

import zmq
import zmq.asyncio

from trainctl.wire import codec
from trainctl.wire.messages import (
    BEAT_TOPIC,
    PROTOCOL,
    STREAMS,
    Backfill,
    BackfillRequest,
    Beat,
    Envelope,
    Snapshot,
    SnapshotRequest,
    Stream,
)
from trainctl.wire.peer import NoAnswer, Peer, Refused
from trainctl.wire.sequence import STALE_AFTER_S, Following, Gap, Numbered, SourceGone, Unreadable

__all__ = ["STALE_AFTER_S", "EnvelopeReader", "Follower", "Item", "SourceGone", "ask_range"]

_JITTER_S = (0.05, 0.25)
_EVENTS_AGAIN = 2000  # who missed messages may have missed many events

Item: TypeAlias = Snapshot | Envelope | Beat


class EnvelopeReader:
    """Decodes envelopes; of one with a body that is not known here, at least its numbers."""

    def __init__(self) -> None:
        self._envelope = codec.envelope_decoder()
        self._numbers = codec.decoder(Unreadable, codec.DATA_LIMIT)

    @property
    def refused(self) -> int:
        """Envelopes that could not be read as such."""
        return self._envelope.refused

    def __call__(self, encoded: bytes) -> Numbered | None:
        """None if not even the numbers can be read."""
        try:
            envelope = self._envelope(encoded)
        except codec.DecodeError:
            envelope = None
        if isinstance(envelope, Envelope) and envelope.v <= PROTOCOL:
            return envelope
        try:
            return self._numbers(encoded)  # type: ignore[return-value]
        except codec.DecodeError:
            return None


async def ask_range(peer: Peer, read: EnvelopeReader, gap: Gap) -> list[Numbered]:
    """What a source still has of a range, from its beginning on; maybe a part, none if it is gone.

    Raises `PeerError`.
    """
    request = BackfillRequest(req=0, stream=gap.stream, first=gap.first, last=gap.last)
    answer = await peer.ask(request, Backfill)
    return [item for encoded in answer.envelopes if (item := read(encoded)) is not None]


class Follower:
    """Yields one `Snapshot`, then `Envelope`s in order and `Beat`s as they come.

    When the source does not keep a missing range any more, another `Snapshot` comes, and then what is newer: whoever
    holds history asks for it again at every snapshot, and has no hole. Without `snapshot` such a range is passed over.
    `events` is how many of the newest the first snapshot brings.

    `lost` counts envelopes that could neither be had again nor are told of by a snapshot, and those whose body this
    program does not know. Raises `SourceGone` out of the iteration when the source falls silent; the age of what was
    said is the caller's to show.
    """

    def __init__(
        self, peer: Peer, streams: tuple[Stream, ...] = STREAMS, *, snapshot: bool = True, events: int = 200
    ) -> None:
        self._peer = peer
        self._events = events
        self._streams = streams
        self._wants_snapshot = snapshot
        self._read = EnvelopeReader()
        self._decode_beat = codec.beat_decoder()
        self._rules: Following | None = None

    @property
    def lost(self) -> int:
        return self._rules.lost if self._rules else 0

    @property
    def refused(self) -> int:
        """Published messages that were none of this protocol."""
        return self._read.refused + self._decode_beat.refused

    async def items(self) -> AsyncIterator[Item]:
        socket = self._peer.subscriber()
        try:
            for topic in (*self._streams, BEAT_TOPIC.decode()):
                socket.subscribe(topic)
            # The first beat proves that the subscription is in place: only then may the snapshot be taken.
            beat = await self._first_beat(socket)
            snapshot = await self._snapshot(self._events) if self._wants_snapshot else None
            self._rules = Following(
                epoch=beat.epoch,
                heads=snapshot.heads if snapshot else beat.heads,
                streams=self._streams,
                now=time.monotonic(),
                jitter=lambda: random.uniform(*_JITTER_S),  # noqa: S311 - guards nothing
            )
            if snapshot:
                yield snapshot
            yield beat
            while True:
                gap = self._rules.due(time.monotonic())
                found = await (self._fill(self._rules, gap) if gap else self._hear(self._rules, socket))
                for item in found:
                    yield item
        finally:
            socket.close(0)

    async def _hear(self, rules: Following, socket: zmq.asyncio.Socket) -> Sequence[Item]:
        """What one message brings, if one comes in time."""
        asked = time.monotonic()
        patience_s = rules.patience_s(asked)
        item = await self._receive_within(socket, patience_s)
        now = time.monotonic()
        match item:
            case None:
                rules.waited(asked, patience_s, now)
                return []
            case Beat():
                rules.take_heads(item.epoch, item.heads, now)
                return [item]
            case Envelope() | Unreadable():
                return rules.take(item, now)
            case _:
                rules.heard(now)
                return []

    async def _fill(self, rules: Following, gap: Gap) -> Sequence[Item]:
        """What asking for a missing range brings."""
        try:
            page = await ask_range(self._peer, self._read, gap)
        except (NoAnswer, Refused):
            raise SourceGone("silent") from None
        ready, found = rules.filled(gap, page, time.monotonic())
        if found:
            return ready
        if not self._wants_snapshot:
            return [*ready, *rules.give_up(gap, time.monotonic())]
        snapshot = await self._snapshot(_EVENTS_AGAIN)
        return [*ready, snapshot, *rules.resume(snapshot.heads, time.monotonic())]

    async def _receive_within(self, socket: zmq.asyncio.Socket, timeout_s: float) -> Numbered | Beat | bytes | None:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._receive(socket)
        except TimeoutError:
            return None

    async def _receive(self, socket: zmq.asyncio.Socket) -> Numbered | Beat | bytes:
        """The next message; as it came where it is none of this protocol."""
        frames = await socket.recv_multipart()
        topic, payload = frames[0], b"".join(frames[1:2])  # what a newer source may add behind is not ours
        if topic != BEAT_TOPIC:
            return self._read(payload) or payload
        try:
            return self._decode_beat(payload)  # type: ignore[return-value]
        except codec.DecodeError:
            return payload

    async def _first_beat(self, socket: zmq.asyncio.Socket) -> Beat:
        try:
            async with asyncio.timeout(STALE_AFTER_S):
                while True:
                    if isinstance(item := await self._receive(socket), Beat):
                        return item
        except TimeoutError:
            raise SourceGone("silent") from None

    async def _snapshot(self, events: int) -> Snapshot:
        try:
            return await self._peer.ask(SnapshotRequest(req=0, events=events), Snapshot)
        except NoAnswer:
            raise SourceGone("silent") from None
        except Refused as refused:
            if refused.code != "too_large" or not events:
                raise
        return await self._snapshot(0)
