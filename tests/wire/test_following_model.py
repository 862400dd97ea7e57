"""Any order of drops, doubles, reorderings, packed ranges and restarts ends in a client with the history of the hub.

A model of a hub, of a network that loses, doubles and reorders, and of a client that does what `Following` says.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainctl.wire.messages import Beat, Envelope, Note, Stream
from trainctl.wire.sequence import STALE_AFTER_S, Following, Gap, Numbered, SourceGone, Unreadable

FOLLOWED: tuple[Stream, ...] = ("metrics", "events")


class ModelHub:
    """Numbers what it publishes; loses what was not on disk when it restarts; keeps only the newer ones singly."""

    def __init__(self) -> None:
        self.epoch = 1
        self.log: dict[str, dict[int, Numbered]] = {stream: {} for stream in FOLLOWED}
        self.packed = dict.fromkeys(FOLLOWED, 0)
        self._published = 0

    @property
    def heads(self) -> dict[str, int]:
        return {stream: len(log) for stream, log in self.log.items()}

    def publish(self, stream: Stream, *, readable: bool = True) -> Numbered:
        self._published += 1
        seq = len(self.log[stream]) + 1
        note = Note(time=0.0, step=0, incarnation=1, actor="mk", text=str(self._published))
        made: Numbered = Unreadable(epoch=self.epoch, stream=stream, seq=seq)
        if readable:
            made = Envelope(source="r", epoch=self.epoch, stream=stream, seq=seq, time=0.0, body=note)
        self.log[stream][seq] = made
        return made

    def beat(self) -> Beat:
        return Beat(source="r", epoch=self.epoch, time=0.0, heads=self.heads)

    def restart(self, lost: int) -> None:
        self.epoch += 1
        for stream, log in self.log.items():
            for seq in range(max(self.packed[stream], len(log) - lost) + 1, len(log) + 1):
                del log[seq]

    def pack(self, stream: Stream, keep: int) -> None:
        self.packed[stream] = max(self.packed[stream], len(self.log[stream]) - keep)

    def backfill(self, gap: Gap, page: int) -> list[Numbered]:
        if gap.first <= self.packed[gap.stream]:
            return []
        log = self.log[gap.stream]
        return [log[seq] for seq in range(gap.first, min(gap.last, gap.first + page - 1) + 1) if seq in log]


@dataclass
class ModelClient:
    """Holds history: what a snapshot's history brought, and every envelope since."""

    hub: ModelHub
    rules: Following | None = None
    epoch: int = 0
    history: dict[str, dict[int, Numbered]] = field(default_factory=dict)
    snapshots: int = 0
    seen: list[Envelope] = field(default_factory=list)

    def connect(self, now: float) -> None:
        heads, self.epoch = self.snapshot(), self.hub.epoch
        self.rules = Following(epoch=self.hub.epoch, heads=heads, streams=FOLLOWED, now=now, jitter=lambda: 0.1)

    def snapshot(self) -> dict[str, int]:
        self.snapshots += 1
        self.seen.clear()
        self.history = {stream: dict(log) for stream, log in self.hub.log.items()}
        return self.hub.heads

    def hear(self, message: Numbered | Beat, now: float) -> None:
        if self.rules is None:
            return
        try:
            if isinstance(message, Beat):
                self.rules.take_heads(message.epoch, message.heads, now)
            else:
                self.keep(self.rules.take(message, now))
        except SourceGone:
            self.rules = None

    def ask(self, now: float, page: int) -> None:
        """What is due; the answer comes at once."""
        if self.rules is None:
            self.connect(now)
        assert self.rules is not None
        try:
            if (gap := self.rules.due(now)) is None:
                return
            ready, found = self.rules.filled(gap, self.hub.backfill(gap, page), now)
            self.keep(ready)
            if not found:
                present = self.epoch == self.hub.epoch
                assert gap.first <= self.hub.packed[gap.stream] or not present, "a snapshot only for what is gone"
                ready = self.rules.resume(self.snapshot(), now)
                self.keep(ready)
        except SourceGone:
            self.rules = None

    def keep(self, ready: list[Envelope]) -> None:
        for envelope in ready:
            before = [item.seq for item in self.seen if item.stream == envelope.stream]
            assert not before or envelope.seq > before[-1], "once and in order"
            self.seen.append(envelope)
            self.history[envelope.stream][envelope.seq] = envelope


def settle(hub: ModelHub, client: ModelClient, now: float) -> None:
    """Nothing is lost from here on: a heartbeat comes, and time for the jitter."""
    for _ in range(2):
        client.ask(now, 3)
        client.hear(hub.beat(), now)
    for _ in range(60):
        now += 0.2
        client.ask(now, 3)
        client.hear(hub.beat(), now)
    settled = client.snapshots
    for _ in range(5):
        now += 0.2
        client.ask(now, 3)
    assert client.snapshots == settled, "and then there is nothing left to ask for"


OPERATIONS = st.one_of(
    st.tuples(st.just("publish"), st.sampled_from(FOLLOWED), st.integers(0, 9)),
    st.tuples(st.just("deliver"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("drop"), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("beat"), st.just(0), st.just(0)),
    st.tuples(st.just("restart"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("pack"), st.sampled_from(FOLLOWED), st.integers(0, 4)),
    st.tuples(st.just("ask"), st.integers(1, 4), st.just(0)),
)


@settings(max_examples=2000, deadline=None)
@given(operations=st.lists(OPERATIONS, max_size=60))
def test_whatever_happens_on_the_way_the_client_ends_with_the_hubs_history(operations: list[tuple]) -> None:  # type: ignore[type-arg]
    hub, now = ModelHub(), 100.0
    client = ModelClient(hub)
    client.connect(now)
    on_the_way: list[Numbered | Beat] = []
    for kind, first, second in operations:
        now += 0.07
        match kind:
            case "publish":
                on_the_way.append(hub.publish(first, readable=second > 0))
            case "beat":
                on_the_way.append(hub.beat())
            case "deliver" if on_the_way:
                at = first % len(on_the_way)
                client.hear(on_the_way[at] if second else on_the_way.pop(at), now)  # true: it comes again later
            case "drop" if on_the_way:
                on_the_way.pop(first % len(on_the_way))
            case "restart":
                hub.restart(first)
            case "pack":
                hub.pack(first, second)
            case "ask":
                client.ask(now, first)
    settle(hub, client, now)
    assert readable(client.history) == readable(hub.log)


def readable(history: dict[str, dict[int, Numbered]]) -> dict[str, list[Envelope]]:
    return {
        stream: [item for _, item in sorted(items.items()) if isinstance(item, Envelope)]
        for stream, items in history.items()
    }


def following(head: int = 0, now: float = 0.0) -> Following:
    return Following(epoch=1, heads={"events": head}, streams=("events",), now=now, jitter=lambda: 0.2)


def note(seq: int, epoch: int = 1) -> Envelope:
    body = Note(time=0.0, step=0, incarnation=1, actor="mk", text=str(seq))
    return Envelope(source="r", epoch=epoch, stream="events", seq=seq, time=0.0, body=body)


def test_a_source_is_stale_after_three_seconds_of_silence_on_the_receivers_clock() -> None:
    rules = following(now=50.0)
    assert rules.patience_s(50.0) == STALE_AFTER_S == 3.0
    rules.check(52.9)
    rules.take_heads(1, {}, 52.9)
    rules.check(55.8)
    with pytest.raises(SourceGone, match="silent"):
        rules.check(55.9)


def test_a_follower_that_was_stopped_itself_reads_what_came_meanwhile_before_it_calls_the_source_silent() -> None:
    rules = following(now=50.0)
    patience_s = rules.patience_s(51.0)
    rules.waited(51.0, patience_s, 65.0)  # it was to end at 53: eleven seconds of sleep, or more
    assert rules.patience_s(65.0) == patience_s == 2.0
    rules.waited(65.0, patience_s, 66.9)
    with pytest.raises(SourceGone, match="silent"):
        rules.waited(65.0, patience_s, 67.1)


def test_what_is_missing_is_asked_for_after_the_jitter_and_not_if_it_comes_by_itself() -> None:
    rules = following(now=0.0)
    assert rules.take(note(2), 1.0) == []
    assert rules.due(1.1) is None
    assert rules.patience_s(1.1) == pytest.approx(0.1)
    assert rules.take(note(1), 1.15) == [note(1), note(2)]
    assert rules.due(9.0) is None
    rules.take(note(4), 2.0)
    assert rules.due(2.2) == Gap(stream="events", first=3, last=3)


def test_what_an_older_life_of_the_source_still_says_is_not_taken_and_a_newer_one_ends_it() -> None:
    rules = Following(epoch=2, heads={"events": 3}, streams=("events",), now=0.0, jitter=lambda: 0.2)
    assert rules.take(note(4, epoch=1), 1.0) == []
    assert rules.take(note(4, epoch=2), 1.0) == [note(4, epoch=2)]
    with pytest.raises(SourceGone, match="restarted"):
        rules.take(note(5, epoch=3), 1.0)
    with pytest.raises(SourceGone, match="restarted"):
        rules.take_heads(3, {}, 1.0)


def test_an_envelope_that_a_newer_program_published_is_counted_and_holds_nothing_up() -> None:
    rules = following()
    assert rules.take(Unreadable(epoch=1, stream="events", seq=1), 1.0) == []
    assert rules.take(note(2), 1.0) == [note(2)]
    assert rules.lost == 1


def test_an_answer_without_the_beginning_of_the_range_never_leads_to_asking_for_ever() -> None:
    rules = following()
    rules.take(note(9), 0.0)
    gap = rules.due(1.0)
    assert gap == Gap(stream="events", first=1, last=8)
    for page in ([], [note(9)], [note(50)], [note(4), note(5)]):
        assert rules.filled(gap, page, 1.0) == ([], False)
    assert [item.seq for item in rules.give_up(gap, 1.0)] == [4, 5]
    assert rules.lost == 3
    assert rules.due(1.0) == Gap(stream="events", first=6, last=8)


def test_a_snapshot_goes_on_behind_what_it_tells_of() -> None:
    rules = following()
    rules.take(note(5), 0.0)
    rules.take(note(9), 0.0)
    assert [item.seq for item in rules.resume({"events": 8}, 1.0)] == [9]
    assert (rules.due(2.0), rules.lost) == (None, 0)


def test_a_heartbeat_that_was_wrong_is_mended_by_the_next_snapshot() -> None:
    rules = following()
    rules.take_heads(1, {"events": 10**15}, 0.0)
    assert rules.due(1.0) == Gap(stream="events", first=1, last=10**15)
    assert rules.resume({"events": 0}, 1.0) == []
    assert rules.due(2.0) is None


def test_a_snapshot_that_ends_before_what_was_heard_is_of_another_life_of_the_source() -> None:
    rules = following()
    rules.take(note(1), 0.0)
    with pytest.raises(SourceGone, match="restarted"):
        rules.resume({"events": 0}, 1.0)
