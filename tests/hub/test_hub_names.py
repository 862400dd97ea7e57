"""Metric names without end, over attempts too: the first are recorded, it is told once, and clients can join."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from hub_double import Rank, hub_running, peer_of, rows

from trainctl.hub.names import NAMES_BYTES, NAMES_LIMIT, NameLimit
from trainctl.hub.snapshots import fitting
from trainctl.wire import codec
from trainctl.wire.messages import (
    Anomaly,
    Card,
    LastValue,
    LinkAck,
    Note,
    RunInfo,
    RunState,
    Snapshot,
    SnapshotRequest,
)
from waiting import until


def long_name(attempt: int, number: int) -> str:
    return f"{attempt}/{number:05d}/".ljust(200, "層")


async def picture(card: Card) -> Snapshot:
    async with peer_of(card) as peer:
        return await peer.ask(SnapshotRequest(req=0, events=200), Snapshot)


def test_three_attempts_with_names_of_their_own_keep_no_client_from_joining(tmp_path: Path) -> None:
    with hub_running(tmp_path / "run") as hub:
        for attempt in (1, 2, 3):
            rank = Rank(tmp_path / "run", attempt=attempt)
            rank.connect()
            for first in range(0, 1000, 100):
                rank.record(rows(1, **{long_name(attempt, number): [1.0] for number in range(first, first + 100)}))
            last = rank.record(rows(attempt + 1, loss=[1.0]))
            until(lambda rank=rank, last=last: rank.hear(LinkAck).link >= last, 30, what="the acknowledgement")
            rank.close()
        found = asyncio.run(picture(hub.card()))
    assert found.metrics["loss"].step == 4, "a name that was there before is recorded on"
    assert 500 < len(found.metrics) < 3000
    assert found.metrics_left_out == 0
    told = [event for event in found.events if isinstance(event, Anomaly) and "metric names" in event.text]
    assert len(told) == 1


def test_the_first_names_are_recorded_and_the_others_are_named_once() -> None:
    limit = NameLimit(["loss"])
    assert limit.complaint() is None
    for number in range(NAMES_LIMIT + 50):
        admitted = limit.admitted(rows(1, **{f"m{number}": [1.0], "loss": [2.0]}))
        assert admitted.columns[-1].name == "loss"
    assert [column.name for column in limit.admitted(rows(1, m0=[1.0], m4049=[1.0])).columns] == ["m0"]
    complaint = limit.complaint()
    assert complaint is not None
    assert f"{NAMES_LIMIT} metric names" in complaint


def test_long_names_are_limited_by_their_bytes() -> None:
    limit, admitted = NameLimit([]), 0
    for number in range(2000):
        admitted += len(limit.admitted(rows(1, **{long_name(1, number): [1.0]})).columns)
    assert admitted == NAMES_BYTES // len(long_name(1, 0).encode())


@pytest.mark.parametrize(("metrics", "events"), [(10, 5), (3000, 2000), (20_000, 2000)])
def test_a_snapshot_fits_a_reply_and_says_what_it_lacks(metrics: int, events: int) -> None:
    value = LastValue(step=1, time=1.0, value=1.0, incarnation=1)
    notes = [Note(time=1.0, step=at, incarnation=1, actor="a", text=f"{at:05d}" * 100) for at in range(events)]
    whole = Snapshot(
        req=3,
        info=RunInfo(run="b", id="b", dir="/x", host="h", created=0, started=0, world_size=1),
        state=RunState(state="running", since=0, step=1, step_time=0),
        heads={"metrics": 1},
        metrics={long_name(1, number): value for number in range(metrics)},
        ranks=[],
        nodes=[],
        checkpoints=[],
        events=notes,
        commands=[],
    )
    told = fitting(whole)
    assert len(codec.encode(told)) <= codec.REPLY_LIMIT
    assert len(told.metrics) + told.metrics_left_out == metrics
    assert len(told.events) + told.events_left_out == events
    assert list(told.metrics) == list(whole.metrics)[: len(told.metrics)]
    assert told.events == notes[events - len(told.events) :], "the newest"
    assert told.metrics_left_out == 0 or told.events_left_out > 0, "events go first"
    assert msgspec.structs.replace(told, metrics={}, events=[], metrics_left_out=0, events_left_out=0) == (
        msgspec.structs.replace(whole, metrics={}, events=[])
    )
    assert metrics > 2000 or told == whole
