"""A snapshot that every client can take, whatever there is to tell: what does not fit is left out, oldest first."""

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from trainctl.wire import codec
from trainctl.wire.messages import Snapshot

_ROOM = codec.REPLY_LIMIT - 64 * 1024

T = TypeVar("T")


def fitting(snapshot: Snapshot) -> Snapshot:
    """The snapshot within the limit of a reply.

    Events are left out first, the oldest of them, then the metrics that came last; how many is said. Events can be
    asked for, and a metric's next row brings it.
    """
    if len(codec.encode(snapshot)) <= _ROOM:
        return snapshot
    bare = msgspec.structs.replace(snapshot, events=[], metrics={})
    room = _ROOM - len(codec.encode(bare))
    metrics = dict(_newest_last(list(snapshot.metrics.items())[::-1], room)[::-1])
    room -= len(msgspec.msgpack.encode(metrics))
    events = _newest_last(snapshot.events, room)
    return msgspec.structs.replace(
        snapshot,
        events=events,
        metrics=metrics,
        events_left_out=len(snapshot.events) - len(events),
        metrics_left_out=len(snapshot.metrics) - len(metrics),
    )


def _newest_last(items: Sequence[T], room: int) -> list[T]:
    """As many of the last items as fit into so many bytes."""
    first = len(items)
    while first:
        room -= len(msgspec.msgpack.encode(items[first - 1])) + 5
        if room < 0:
            break
        first -= 1
    return list(items[first:])
