"""Packing behind a backlog happens in the hub's loop, and everybody else has turns in between."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from trainctl.hub import packing
from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.ownership import Ownership
from trainctl.hub.packing import JournalPacking
from trainctl.store import frames, journal
from trainctl.store.frames import packed_file, recorded_segments, segments
from trainctl.store.journal import JournalIndex, JournalWriter
from trainctl.store.packing import packing_steps
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record, replay_journal
from trainctl.store.saved import read_index
from trainctl.wire import codec
from trainctl.wire.messages import Column, Envelope, Rows, RunInfo
from trainctl.wire.rundir import RunDir


class Packs:
    """A hub's packing over a journal of one metric that is its step, in segments of some 20,000 steps."""

    def __init__(self, directory: Path, envelopes: int) -> None:
        self.run = RunDir(directory)
        self.run.create()
        info = RunInfo(run="m", id="m", dir=str(directory), host="h", created=0, started=0, world_size=1)
        self.run.info_file.write_bytes(msgspec.json.encode(info))
        writer = JournalWriter(self.run.journal, segment_bytes=200_000)
        for seq in range(1, envelopes + 1):
            steps = list(range(seq * 100 - 99, seq * 100 + 1))
            column = Column(name="loss", dtype="f4", data=np.array(steps, "<f4").tobytes())
            body = Rows(attempt=1, incarnation=1, steps=steps, times=[1e9 + step for step in steps], columns=[column])
            envelope = Envelope(
                source="m", epoch=1, stream="metrics", seq=seq, time=1e9, body=body, attempt=1, link=seq
            )
            writer.append(codec.encode(envelope), "metrics", seq)
        writer.close()
        self.record, index = RunRecord(info), JournalIndex(self.run.journal)
        replay_journal(self.record, index, self.run.journal)
        self.keeper = JournalKeeper(self.run.journal, index)
        self.ownership = Ownership(self.run)
        self.packing = JournalPacking(record=self.record, keeper=self.keeper, ownership=self.ownership)

    async def run_until(self, done: Any) -> None:
        task = asyncio.create_task(self.packing.run())
        try:
            async with asyncio.timeout(60):
                while not done():
                    await asyncio.sleep(0.01)
                    if task.done():
                        task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_LOOK_S", 0.0)
    monkeypatch.setattr(packing, "_FRESH_S", -1.0)


def test_while_a_backlog_is_packed_the_loop_turns_between_any_two_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = Packs(tmp_path, envelopes=2000)
    assert len(packs.keeper.full_segments()) > 4
    monkeypatch.setattr(packing, "_TURN_S", 0.0)
    turns, seen = [0], list[int]()

    def noted(directory: Path, number: int) -> Any:
        def steps() -> Any:
            inner = packing_steps(directory, number)
            return (yield from watched(inner))

        return steps()

    def watched(inner: Any) -> Any:
        while True:
            try:
                next(inner)
            except StopIteration as done:
                return done.value
            seen.append(turns[0])
            yield

    async def others() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    async def main() -> None:
        beating = asyncio.create_task(others())
        await packs.run_until(lambda: len(recorded_segments(packs.run.journal)) <= 2)
        beating.cancel()

    monkeypatch.setattr(packing, "packing_steps", noted)
    asyncio.run(main())
    assert len(seen) >= 10
    assert len(set(seen)) == len(seen), "others had a turn after every block"
    assert packs.record.metrics.query("loss")["step"].tolist() == list(range(1, 200_001))


def test_a_segment_that_cannot_be_read_holds_nothing_up_and_the_index_ends_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = Packs(tmp_path, envelopes=2000)
    monkeypatch.setattr(packing, "_AGAIN_S", 0.05)
    real, sick = frames._open, [True]

    def failing(directory: Path, number: int) -> object:
        if number == 3 and sick:
            raise OSError(5, "Input/output error")
        return real(directory, number)

    monkeypatch.setattr(frames, "_open", failing)
    asyncio.run(packs.run_until(lambda: packed_file(packs.run.journal, 5).exists()))
    assert recorded_segments(packs.run.journal)[0] == 3
    asyncio.run(packs.packing._save_index(1.0))
    saved = read_index(packs.run.journal)
    assert saved is not None
    assert [number for number, _ in saved.segments] == [1, 2]
    sick.clear()
    asyncio.run(packs.run_until(lambda: 3 not in recorded_segments(packs.run.journal)))
    assert load_record(tmp_path).metrics.query("loss")["step"].tolist() == list(range(1, 200_001))


def test_an_index_is_saved_only_when_the_journal_holds_what_it_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = Packs(tmp_path, envelopes=600)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.JournalWriter, "_write", full)
    packs.keeper.append(b"x", "metrics", 601, 601, 1)
    asyncio.run(packs.packing._save_index(1.0))
    assert read_index(packs.run.journal) is None
    monkeypatch.undo()
    assert packs.keeper.retry()
    asyncio.run(packs.packing._save_index(1.0))
    assert read_index(packs.run.journal) is not None


def test_a_hub_that_was_superseded_leaves_its_successors_segment_alone(tmp_path: Path) -> None:
    packs = Packs(tmp_path, envelopes=600)
    successor = JournalKeeper(packs.run.journal, JournalIndex(packs.run.journal))
    packs.keeper.close()
    mine = segments(packs.run.journal)[-1]
    asyncio.run(packs.packing.finish())
    assert recorded_segments(packs.run.journal) == [mine], "the successor's journal is at its beginning"
    packs.run.allocate("epoch")
    successor.append(b"x", "metrics", 601)
    assert not successor.deleted()
    successor.close()
    asyncio.run(packs.packing.finish())
    assert recorded_segments(packs.run.journal) == [mine]
