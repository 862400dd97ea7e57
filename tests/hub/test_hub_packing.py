"""A real hub with a large journal: it packs while it lives, dies, comes back, and what it leaves opens at once."""

import asyncio
from pathlib import Path

import numpy as np
from hub_double import RUN, HubProcess, Rank, hub_running, peer_of

from trainctl.store.frames import packed_file, recorded_segments, segments
from trainctl.store.replay import load_record
from trainctl.store.saved import read_index
from trainctl.wire.messages import (
    Backfill,
    BackfillRequest,
    Card,
    Column,
    History,
    HistoryRequest,
    LinkAck,
    LinkBye,
    Rows,
)
from trainctl.wire.rundir import RunDir
from waiting import until

ROWS = 8000
PACKETS = 300  # 8000 float64 values each: more than two segments of 8 MB


def batch(number: int) -> Rows:
    steps = list(range(number * ROWS + 1, (number + 1) * ROWS + 1))
    data = np.random.default_rng(number).normal(size=ROWS).astype("<f8").tobytes()
    columns = [Column(name="loss", dtype="f8", data=data)]
    return Rows(attempt=1, incarnation=1, steps=steps, times=[1e9 + step for step in steps], columns=columns)


def value_at(step: int) -> float:
    number = (step - 1) // ROWS
    return float(np.random.default_rng(number).normal(size=ROWS)[(step - 1) % ROWS])


def send(rank: Rank, first: int, last: int) -> None:
    """Send batches, and wait until the hub has the last of them on disk."""
    links = [rank.record(batch(number)) for number in range(first, last)]
    until(lambda: rank.hear(LinkAck).link >= links[-1], 60, what="the hub's acknowledgement")


async def at_step(card: Card, step: int) -> list[float]:
    async with peer_of(card) as peer:
        asked = HistoryRequest(req=0, metrics=["loss"], from_step=step, to_step=step)
        found = await peer.ask(asked, History)
    return np.frombuffer(found.series[0].columns["value"], "<f8").tolist()


async def backfill(card: Card, first: int, last: int) -> Backfill:
    async with peer_of(card) as peer:
        return await peer.ask(BackfillRequest(req=0, stream="metrics", first=first, last=last), Backfill)


def test_a_hub_packs_its_journal_and_loses_nothing_when_it_is_killed(tmp_path: Path) -> None:
    journal = RunDir(tmp_path / "run").journal
    with hub_running(tmp_path / "run") as hub:
        rank = Rank(tmp_path / "run")
        rank.connect()
        send(rank, 0, PACKETS)
        until(lambda: packed_file(journal, 1).exists(), 30, what="the first segment to be packed")
        assert asyncio.run(at_step(hub.card(), 5)) == [value_at(5)], "a value that is only on disk is as good as any"
        hub.kill()
        rank.close()
    again = HubProcess(tmp_path / "run", linger_s=1.0)
    try:
        assert rank.connect().have == PACKETS
        assert asyncio.run(backfill(again.card(), 1, 3)).gone, "single envelopes of a packed segment cannot be had"
        assert asyncio.run(backfill(again.card(), PACKETS - 1, PACKETS)).envelopes
        send(rank, PACKETS, PACKETS + 100)
        for step in (1, ROWS * 150 + 7, ROWS * (PACKETS + 100)):
            assert asyncio.run(at_step(again.card(), step)) == [value_at(step)]
        rank.say(LinkBye(state="finished", step=ROWS * (PACKETS + 100)))
        rank.close()
        assert again.process.wait(30) == 0
    finally:
        again.close()
    assert recorded_segments(journal) == [], "at its end the hub leaves nothing unpacked"
    saved = read_index(journal)
    assert saved is not None
    assert [number for number, _ in saved.segments] == segments(journal)
    record = load_record(tmp_path / "run")
    assert (record.info.id, record.state.state) == (RUN, "finished")
    found = record.metrics.query("loss")
    assert np.array_equal(found["step"], np.arange(1, ROWS * (PACKETS + 100) + 1))
    expected = np.concatenate([np.random.default_rng(number).normal(size=ROWS) for number in range(PACKETS + 100)])
    assert np.array_equal(found["value"], expected)
