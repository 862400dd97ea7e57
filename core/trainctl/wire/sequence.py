"""The rules of following a source without a gap. Pure: no socket, and the clock is an argument.

The Clone pattern (ZeroMQ guide, chapter 5): subscribe and buffer, take a snapshot, apply what is newer. A number
that is skipped is asked for by range; until it comes, what follows waits. A range that nobody keeps any more is what a
new snapshot is for.

    Sequencer   puts the streams in order and names what is missing
    Following   says what a follower does next: wait, ask for a range, take a snapshot, or give the source up
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from trainctl.wire.messages import Envelope, Number, Stream

STALE_AFTER_S = 3.0
WAITING_LIMIT = 5_000
_LATE_S = 1.0


class Unreadable(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of an envelope whose body this program does not know: a newer one published it."""

    epoch: Number
    stream: Stream
    seq: Number


Numbered: TypeAlias = Envelope | Unreadable


class SourceGone(Exception):
    """Nothing was heard for `STALE_AFTER_S` ("silent"), or the source restarted ("restarted"): connect again."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Numbers `first` to `last` of a stream, both included, were published and did not arrive."""

    stream: Stream
    first: int
    last: int


@dataclass
class _Track:
    next_seq: int
    known_head: int
    waiting: dict[int, Numbered] = field(default_factory=dict)

    def advance(self) -> list[Numbered]:
        """Take out of `waiting` what can follow now."""
        ready = []
        while (following := self.waiting.pop(self.next_seq, None)) is not None:
            ready.append(following)
            self.next_seq += 1
        return ready

    def jump(self, next_seq: int) -> list[Numbered]:
        """Go on from `next_seq` if that is further."""
        self.next_seq = max(self.next_seq, next_seq)
        for seq in [seq for seq in self.waiting if seq < self.next_seq]:
            del self.waiting[seq]
        return self.advance()


class Sequencer:
    """Orders the streams of one source from the heads of a snapshot on; streams that are not in there are passed by."""

    def __init__(self, heads: Mapping[Stream, int]) -> None:
        self._tracks = {stream: _Track(next_seq=head + 1, known_head=head) for stream, head in heads.items()}

    def offer(self, item: Numbered) -> list[Numbered]:
        """Take one envelope; return those that are now in order. Duplicates and old ones return nothing.

        What finds no room to wait is forgotten, and shows as missing later.
        """
        track = self._tracks.get(item.stream)
        if track is None:
            return []
        track.known_head = max(track.known_head, item.seq)
        if item.seq < track.next_seq or item.seq in track.waiting:
            return []
        if item.seq == track.next_seq or len(track.waiting) < WAITING_LIMIT:
            track.waiting[item.seq] = item
        return track.advance()

    def heads(self, heads: Mapping[str, int]) -> None:
        """Learn from a heartbeat how far each stream has come."""
        for stream, track in self._tracks.items():
            track.known_head = max(track.known_head, heads.get(stream, 0))

    def gaps(self) -> list[Gap]:
        """The first missing range of every stream that has one."""
        found = []
        for stream, track in self._tracks.items():
            if track.next_seq > track.known_head:
                continue
            last = min(track.waiting, default=track.known_head + 1) - 1
            found.append(Gap(stream=stream, first=track.next_seq, last=last))
        return found

    def has(self, gap: Gap) -> bool:
        """Whether the first number of what was a gap has come, or was given up, since."""
        return self._tracks[gap.stream].next_seq > gap.first

    def skip(self, gap: Gap) -> tuple[int, list[Numbered]]:
        """Give up what has not come of a range's beginning; return how many that were, and what can follow now."""
        track = self._tracks[gap.stream]
        first = track.next_seq
        after = min([gap.last + 1, *track.waiting])
        return max(0, after - first), track.jump(after)

    def resume(self, heads: Mapping[str, int]) -> list[Numbered]:
        """Go on after a snapshot, which tells of everything up to its heads; return what can follow now.

        Raises `SourceGone` for a snapshot that ends before what was published: it is of another life of the source.
        """
        ready = []
        for stream, track in self._tracks.items():
            head = heads.get(stream, 0)
            if head < track.next_seq - 1:
                raise SourceGone("restarted")
            # The snapshot knows better than any heartbeat what there is.
            track.known_head = max(head, *track.waiting, 0)
            ready += track.jump(head + 1)
        return ready


class Following:
    """What one follower does, from its first heartbeat to `SourceGone`.

    The caller reads messages, waiting at most `patience_s` for one, and hands each to `take`. Then, as long as `due`
    names a range, it asks for it and hands over what came with `filled`. A source that has none of it is asked for a
    snapshot, and `resume` goes on behind that; who follows without snapshots calls `give_up` instead.

    Args:
        epoch: of the first heartbeat.
        heads: the numbers to go on from, of a snapshot or of that heartbeat.
        streams: the streams that are followed; the others of `heads` are not.
        now: monotonic seconds, as in all methods.
        jitter: seconds to wait before asking for what is missing. At random, because the missing may be on its way,
            and so that not everybody asks at the same moment.
    """

    def __init__(
        self,
        *,
        epoch: int,
        heads: Mapping[str, int],
        streams: Sequence[Stream],
        now: float,
        jitter: Callable[[], float],
    ) -> None:
        self._epoch = epoch
        self._sequencer = Sequencer({stream: heads.get(stream, 0) for stream in streams})
        self._jitter = jitter
        self._heard = now
        self._ask_at: float | None = None
        self.lost = 0

    def patience_s(self, now: float) -> float:
        """How long to wait for the next message before something else is to be done."""
        until = self._heard + STALE_AFTER_S
        return max(0.0, min(until, self._ask_at if self._ask_at is not None else until) - now)

    def heard(self, now: float) -> None:
        """The source said something, whatever it was."""
        self._heard = now

    def check(self, now: float) -> None:
        """Raise `SourceGone` if the source has been silent for too long."""
        if now - self._heard >= STALE_AFTER_S:
            raise SourceGone("silent")

    def waited(self, asked: float, patience_s: float, now: float) -> None:
        """Nothing came while `patience_s` was waited from `asked` on: `check`, unless that wait ended late. Then the
        follower itself was stopped or starved, and what came meanwhile is still to be read."""
        if now - asked > patience_s + _LATE_S:
            self._heard += now - asked
        self.check(now)

    def take(self, item: Numbered, now: float) -> list[Envelope]:
        """Take what was published; return what is in order now. Raises `SourceGone` if the source restarted."""
        self.heard(now)
        if not self._is_present(item.epoch):
            return []
        return self._settle(self._sequencer.offer(item), now)

    def take_heads(self, epoch: int, heads: Mapping[str, int], now: float) -> None:
        """Take a heartbeat. Raises `SourceGone` if the source restarted."""
        self.heard(now)
        if self._is_present(epoch):
            self._sequencer.heads(heads)
            self._settle([], now)

    def due(self, now: float) -> Gap | None:
        """The range to ask for now, if there is one."""
        if self._ask_at is None or now < self._ask_at:
            return None
        return next(iter(self._sequencer.gaps()), None)

    def filled(self, gap: Gap, page: Sequence[Numbered], now: float) -> tuple[list[Envelope], bool]:
        """Take what came of a range that was asked for, which may be its beginning only.

        Returns what is in order now, and whether the source had the beginning. Where it had not, the source does not
        keep that any more: take a snapshot and `resume`, or `give_up`. Raises `SourceGone` if the source restarted.
        """
        self.heard(now)
        ready: list[Numbered] = []
        for item in page:
            if item.epoch > self._epoch:
                raise SourceGone("restarted")
            if item.stream == gap.stream and gap.first <= item.seq <= gap.last:
                ready += self._sequencer.offer(item)
        found = self._sequencer.has(gap)
        return self._settle(ready, now), found

    def give_up(self, gap: Gap, now: float) -> list[Envelope]:
        """Count as lost for good what has not come of a range's beginning; return what is in order now."""
        lost, ready = self._sequencer.skip(gap)
        self.lost += lost
        return self._settle(ready, now)

    def resume(self, heads: Mapping[str, int], now: float) -> list[Envelope]:
        """Go on behind a snapshot; return what is in order now. Raises `SourceGone` if the source restarted."""
        self.heard(now)
        return self._settle(self._sequencer.resume(heads), now)

    def _is_present(self, epoch: int) -> bool:
        """False for what a source that was superseded still says."""
        if epoch > self._epoch:
            raise SourceGone("restarted")
        return epoch == self._epoch

    def _settle(self, ready: list[Numbered], now: float) -> list[Envelope]:
        if not self._sequencer.gaps():
            self._ask_at = None
        elif self._ask_at is None:
            self._ask_at = now + self._jitter()
        envelopes = [item for item in ready if isinstance(item, Envelope)]
        self.lost += len(ready) - len(envelopes)
        return envelopes
