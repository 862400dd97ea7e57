"""Whatever is lost, doubled or out of order on the way, a client ends with every message once and in order."""

from hypothesis import given
from hypothesis import strategies as st

from trainctl.wire.messages import Envelope, Note
from trainctl.wire.sequence import Gap, Sequencer


def envelope(seq: int) -> Envelope:
    note = Note(time=0.0, step=0, incarnation=1, actor="mk", text=str(seq))
    return Envelope(source="r", epoch=1, stream="events", seq=seq, time=0.0, body=note)


@given(
    head=st.integers(0, 5),
    count=st.integers(1, 30),
    order=st.randoms(use_true_random=False),
    lost=st.sets(st.integers(1, 35)),
    doubled=st.sets(st.integers(1, 35)),
)
def test_any_order_of_losses_and_duplicates_ends_complete(head, count, order, lost, doubled) -> None:  # type: ignore[no-untyped-def]
    sequencer = Sequencer({"events": head})
    published = list(range(1, head + count + 1))
    arriving = [seq for seq in published if seq not in lost] + [seq for seq in published if seq in doubled]
    order.shuffle(arriving)
    seen = [ready.seq for seq in arriving for ready in sequencer.offer(envelope(seq))]
    sequencer.heads({"events": head + count})
    for _ in range(count + 1):
        for gap in sequencer.gaps():
            assert gap.first <= gap.last
            seen += [ready.seq for seq in range(gap.first, gap.last + 1) for ready in sequencer.offer(envelope(seq))]
    assert seen == list(range(head + 1, head + count + 1))
    assert sequencer.gaps() == []


def test_a_range_that_is_gone_is_skipped_and_what_follows_comes() -> None:
    sequencer = Sequencer({"events": 0})
    assert sequencer.offer(envelope(4)) == []
    assert sequencer.gaps() == [Gap(stream="events", first=1, last=3)]
    lost, ready = sequencer.skip(Gap(stream="events", first=1, last=3))
    assert (lost, [item.seq for item in ready]) == (3, [4])
    assert sequencer.gaps() == []


def test_a_heartbeat_tells_of_a_lost_tail() -> None:
    sequencer = Sequencer({"events": 2})
    sequencer.heads({"events": 5})
    assert sequencer.gaps() == [Gap(stream="events", first=3, last=5)]
