"""What rank 0 numbered is taken once and never skipped, whatever became of the index and of the order on disk."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from trainctl.store import frames
from trainctl.store.blocks import Block
from trainctl.store.frames import recorded_segments, segments
from trainctl.store.journal import JournalIndex, JournalWriter
from trainctl.store.packed import PackedEnvelopes, PackedRows, decode_packed, envelopes_of
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record, replay_journal
from trainctl.store.saved import index_file, packed_sizes, read_index, write_index
from trainctl.wire import codec
from trainctl.wire.messages import (
    Body,
    Column,
    CommandUpdate,
    Envelope,
    Note,
    RankFigures,
    Ranks,
    Rows,
    RunInfo,
    StateChanged,
    stream_of,
)
from trainctl.wire.rundir import RunDir


class Told:
    """A hub's record and journal, fed as rank 0 feeds it: rows, figures and events in turn, each with its number."""

    def __init__(self, directory: Path, *, epoch: int = 1, segment_bytes: int = 4000) -> None:
        self.run = RunDir(directory)
        self.run.create()
        self.info = RunInfo(run="m", id="m", dir=str(directory), host="h", created=0, started=0, world_size=1)
        self.run.info_file.write_bytes(msgspec.json.encode(self.info))
        self.record, self.index, self.epoch = RunRecord(self.info), JournalIndex(self.run.journal), epoch
        replay_journal(self.record, self.index, self.run.journal)
        self.writer = JournalWriter(self.run.journal, segment_bytes=segment_bytes, index=self.index)

    def take(self, body: Body, link: int = 0, attempt: int = 1) -> None:
        """As the hub does: a number that it has is not taken again."""
        if link and link <= self.record.link_have(attempt):
            return
        stream = stream_of(body)
        seq = self.record.heads[stream] + 1
        envelope = Envelope(
            source="m", epoch=self.epoch, stream=stream, seq=seq, time=1e9, body=body, attempt=attempt, link=link
        )
        self.writer.append(codec.encode(envelope), stream, seq)
        self.record.apply(envelope)

    def pack(self, count: int | None = None) -> None:
        full = [number for number in recorded_segments(self.run.journal) if number != self.writer.segment]
        for number in full[:count]:
            self.record.seal(pack_segment(self.run.journal, number))
            self.index.forget(number)

    def save_index(self) -> None:
        packed = [n for n in segments(self.run.journal) if n not in recorded_segments(self.run.journal)]
        write_index(self.run.journal, self.record.save(packed_sizes(self.run.journal, packed), self.index.gone))


def bodies(attempt: int, incarnation: int, steps: int, first: int = 1) -> list[Body]:
    """What rank 0 sends of these steps, in its order: its numbers are the places in the list, from 1."""
    made: list[Body] = []
    for step in range(first, first + steps):
        column = Column(name="loss", dtype="f8", data=np.array([step + attempt / 10], "<f8").tobytes())
        made.append(Rows(attempt=attempt, incarnation=incarnation, steps=[step], times=[1e9 + step], columns=[column]))
        if step % 3 == 0:
            figures = RankFigures(rank=0, node="n", pid=1, state="running", step=step, time=1.0)
            made.append(Ranks(incarnation=incarnation, ranks=[figures]))
        if step % 7 == 0:
            made.append(Note(time=1.0, step=step, incarnation=incarnation, actor="a", text=f"{attempt}/{step}"))
        if step % 11 == 0:
            made.append(
                CommandUpdate(
                    time=1.0,
                    step=step,
                    incarnation=incarnation,
                    id=f"c{step}",
                    command="lr",
                    args={},
                    actor="a",
                    state="applied",
                )
            )
    return made


def texts(record: RunRecord) -> list[str]:
    return [event.text for event in record.events if isinstance(event, Note)]


def same(record: RunRecord, expected: RunRecord) -> None:
    for branch in expected.metrics.branches:
        found = record.metrics.query("loss", incarnation=branch.incarnation)
        wanted = expected.metrics.query("loss", incarnation=branch.incarnation)
        assert {name: column.tolist() for name, column in found.items()} == {
            name: column.tolist() for name, column in wanted.items()
        }
    assert texts(record) == texts(expected)
    assert record.heads == expected.heads
    assert [record.link_have(attempt) for attempt in (1, 2)] == [expected.link_have(attempt) for attempt in (1, 2)]


def two_attempts(directory: Path) -> Told:
    """Two attempts, the second with a hub of its own; everything of both is on disk as it was recorded."""
    told = Told(directory)
    for link, body in enumerate(bodies(1, 1, 150), 1):
        told.take(body, link)
    told.writer.close()
    told = Told(directory, epoch=2)
    told.take(StateChanged(time=1.0, step=120, incarnation=2, state="starting", attempt=2))
    for link, body in enumerate(bodies(2, 2, 150, first=121), 1):
        told.take(body, link, attempt=2)
    return told


def test_without_its_index_a_packed_journal_says_what_the_recorded_one_said(tmp_path: Path) -> None:
    told = two_attempts(tmp_path)
    told.writer.close()
    expected = load_record(tmp_path)
    assert len(expected.metrics.query("loss", incarnation=1)["step"]) == 150
    for number in segments(told.run.journal):
        pack_segment(told.run.journal, number)
    same(load_record(tmp_path), expected)


def test_a_hub_that_was_killed_between_packing_and_saving_loses_nothing(tmp_path: Path) -> None:
    told = two_attempts(tmp_path)
    told.pack(4)
    told.save_index()
    told.pack(4)
    told.writer.sync()
    assert read_index(told.run.journal) is not None
    same(load_record(tmp_path), told.record)
    again = Told(tmp_path, epoch=3)
    for link, body in enumerate(bodies(2, 2, 180, first=121), 1):
        again.take(body, link, attempt=2)  # rank 0 sends all of it again, and then more
    again.pack()
    again.save_index()
    again.writer.close()
    found = again.record.metrics.query("loss", incarnation=2)["step"].tolist()
    assert found == list(range(121, 301))
    same(load_record(tmp_path), again.record)
    index_file(told.run.journal).unlink()
    same(load_record(tmp_path), again.record)


def test_a_killed_hub_that_left_both_files_of_a_segment_counts_them_once(tmp_path: Path) -> None:
    told = two_attempts(tmp_path)
    victim = frames.segment_file(told.run.journal, 2)
    recorded = victim.read_bytes()
    told.pack(3)
    victim.write_bytes(recorded)
    told.writer.sync()
    same(load_record(tmp_path), told.record)


def test_an_index_of_the_version_that_lost_rows_is_passed_over(tmp_path: Path) -> None:
    told = two_attempts(tmp_path)
    told.pack()
    told.save_index()
    told.writer.close()
    data = bytearray(index_file(told.run.journal).read_bytes())
    data[4] = 1
    index_file(told.run.journal).write_bytes(data)
    assert read_index(told.run.journal) is None
    same(load_record(tmp_path), told.record)


def test_a_segment_that_the_file_system_does_not_give_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = two_attempts(tmp_path)
    real = frames._open

    def failing(directory: Path, number: int) -> object:
        if number == 2:
            raise OSError(5, "Input/output error")
        return real(directory, number)

    monkeypatch.setattr(frames, "_open", failing)
    with pytest.raises(OSError, match="segment 00000002 cannot be read"):
        pack_segment(told.run.journal, 2)
    assert list(told.run.journal.glob("*.tmp")) == []
    monkeypatch.undo()
    told.pack()
    told.writer.close()
    same(load_record(tmp_path), told.record)


def test_rows_before_what_only_a_newer_version_reads_stay_before_it(tmp_path: Path) -> None:
    told = Told(tmp_path, segment_bytes=1 << 20)
    newer = {"source": "m", "epoch": 1, "stream": "metrics", "seq": 2, "body": {"type": "new"}}
    unknown = msgspec.msgpack.encode(newer)
    first, second = [body for body in bodies(1, 1, 2) if isinstance(body, Rows)]
    told.take(first, 1)
    told.writer.append(unknown, "metrics", 2)
    told.record.heads["metrics"] = 2
    told.take(second, 3)
    told.writer.close()
    pack_segment(told.run.journal, 1)
    order: list[object] = []
    for found in frames.read_frames(told.run.journal):
        packed = decode_packed(found.payload)
        if isinstance(packed, PackedRows):
            order += Block(packed).seqs.tolist()
        elif isinstance(packed, PackedEnvelopes):
            order += envelopes_of(packed)
    assert order == [1, unknown, 3]
