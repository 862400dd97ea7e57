"""What decays, goes missing or is written twice: told, never wrong, and never the end of what comes after."""

import errno
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainctl.store import frames
from trainctl.store.frames import packed_file, segment_file, segments
from trainctl.store.journal import JournalIndex, JournalWriter
from trainctl.store.packed import Packed, PackedEnvelopes, PackedRows, decode_packed, envelopes_of
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record, replay_journal
from trainctl.store.saved import packed_sizes, write_index
from trainctl.wire import codec
from trainctl.wire.messages import Anomaly, Body, Column, Envelope, Note, Rows, RunInfo, Stream
from trainctl.wire.rundir import RunDir

ROWS = 100


class Recording:
    """A run of one metric whose value is its step, written as a hub would."""

    def __init__(self, directory: Path, *, epoch: int = 1, after: int = 0) -> None:
        self.run = RunDir(directory)
        self.run.create()
        self.info = RunInfo(run="m", id="m", dir=str(directory), host="h", created=0, started=0, world_size=1)
        self.run.info_file.write_bytes(msgspec.json.encode(self.info))
        self.record = RunRecord(self.info)
        self.index = JournalIndex(self.run.journal)
        replay_journal(self.record, self.index, self.run.journal)
        self.writer = JournalWriter(self.run.journal, segment_bytes=20_000, index=self.index, after=after)
        self.epoch = epoch

    def take(self, body: Body, stream: Stream, *, link: int = 0, journal: bool = True) -> None:
        seq = self.record.heads[stream] + 1
        envelope = Envelope(
            source="m", epoch=self.epoch, stream=stream, seq=seq, time=1e9, body=body, attempt=1, link=link
        )
        if journal:
            self.writer.append(codec.encode(envelope), stream, seq)
        self.record.apply(envelope)

    def train(self, first: int, last: int, **more: bool) -> None:
        """Batches `first` to `last`, exclusive, of a hundred steps each."""
        for number in range(first, last):
            steps = list(range(number * ROWS + 1, (number + 1) * ROWS + 1))
            column = Column(name="loss", dtype="f4", data=np.array(steps, "<f4").tobytes())
            rows = Rows(attempt=1, incarnation=1, steps=steps, times=[1e9 + step for step in steps], columns=[column])
            self.take(rows, "metrics", link=number + 1, **more)

    def pack(self, *, all_of_it: bool = False) -> None:
        full = [number for number in frames.recorded_segments(self.run.journal) if number != self.writer.segment]
        if all_of_it:
            self.writer.close()
            full = frames.recorded_segments(self.run.journal)
        for number in full:
            self.record.seal(pack_segment(self.run.journal, number))
            self.index.forget(number)

    def save_index(self) -> None:
        packed = [number for number in segments(self.run.journal) if packed_file(self.run.journal, number).exists()]
        write_index(self.run.journal, self.record.save(packed_sizes(self.run.journal, packed), self.index.gone))


def steps_of(record: RunRecord) -> list[int]:
    found = record.metrics.query("loss")
    assert np.array_equal(found["value"], found["step"].astype("f8")), "never a wrong value"
    steps: list[int] = found["step"].tolist()
    return steps


def said(record: RunRecord) -> str:
    return " ".join(event.text for event in record.events if isinstance(event, Anomaly))


def test_a_segment_that_cannot_be_read_today_costs_itself_and_nothing_that_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Recording(tmp_path)
    before.train(0, 60)
    before.writer.close()
    real = frames._open

    def failing(directory: Path, number: int) -> object:
        if number == 2:
            raise OSError(errno.EIO, "Input/output error")
        return real(directory, number)

    monkeypatch.setattr(frames, "_open", failing)
    record = load_record(tmp_path)
    assert 0 < len(steps_of(record)) < 6000
    assert "cannot be read (Input/output error)" in said(record)
    again = Recording(tmp_path, epoch=2)
    again.train(60, 80)
    again.writer.close()
    monkeypatch.undo()
    assert steps_of(load_record(tmp_path)) == list(range(1, 8001)), "on a disk that is well again everything is there"


def test_what_a_hub_wrote_while_it_was_superseded_hides_nothing_of_the_next_and_counts_once(tmp_path: Path) -> None:
    old = Recording(tmp_path)
    old.train(0, 5)
    new = Recording(tmp_path, epoch=2)
    old.train(5, 8)  # rank 0 sent it to the old one, and, not hearing of it, to the new one again
    old.take(Note(time=1.0, step=0, incarnation=1, actor="a", text="late"), "events")
    new.train(5, 20)
    new.take(Note(time=1.0, step=0, incarnation=1, actor="a", text="mine"), "events")
    old.writer.close()
    new.writer.close()
    assert steps_of(load_record(tmp_path)) == list(range(1, 2001))
    for number in segments(RunDir(tmp_path).journal):
        pack_segment(RunDir(tmp_path).journal, number)
    record = load_record(tmp_path)
    assert steps_of(record) == list(range(1, 2001))
    assert [event.text for event in record.events if isinstance(event, Note)] == ["late", "mine"]


def test_a_journal_that_was_deleted_is_never_mistaken_for_the_one_that_follows(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    recording.train(0, 60)
    recording.pack()
    last = recording.writer.segment
    for path in recording.run.journal.iterdir():
        path.unlink()
    recording.writer.close()
    recording.writer = JournalWriter(recording.run.journal, segment_bytes=20_000, index=recording.index, after=last)
    recording.train(60, 120)
    recording.pack(all_of_it=True)
    steps = steps_of(recording.record)
    assert sorted(set(steps)) == steps
    assert recording.record.metrics.query("loss", from_step=1, to_step=1000)["step"].max(initial=0) <= 1000
    recording.save_index()
    reopened = load_record(tmp_path)
    assert steps_of(reopened)[-6000:] == list(range(6001, 12001))
    assert "is missing" in said(reopened)


@settings(max_examples=40, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), low=st.integers(1, 6000), indexed=st.booleans())
def test_a_decayed_block_is_told_and_ranges_beside_it_hold_what_was_asked_for(
    at: float, flip: int, low: int, indexed: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        recording = Recording(Path(name))
        recording.train(0, 60)
        recording.pack(all_of_it=True)
        if indexed:
            recording.save_index()
        victim = packed_file(recording.run.journal, segments(recording.run.journal)[1])
        data = bytearray(victim.read_bytes())
        data[int(at * len(data))] ^= flip
        victim.write_bytes(data)
        record = load_record(recording.run.path)
        found = steps_of(record)
        assert len(found) < 6000 or int(at * len(data)) < 8, "only the file's own head may change without a loss"
        assert len(found) == 6000 or said(record) or record.metrics.unreadable
        part = record.metrics.query("loss", from_step=low, to_step=low + 300)["step"].tolist()
        assert part == [step for step in found if low <= step <= low + 300]
        rolled = record.metrics.query("loss", from_step=low, to_step=low + 300, points=10)
        assert rolled["step"].tolist() == sorted(rolled["step"].tolist())
        assert all(low <= step <= low + 300 for step in rolled["step"].tolist())


def test_a_batch_without_a_usable_column_hides_no_other(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    recording.train(0, 3)
    broken = Column(name="loss", dtype="f4", data=b"\0\0")
    recording.take(Rows(attempt=1, incarnation=1, steps=[9], times=[1e9], columns=[broken]), "metrics")
    recording.train(3, 6)
    recording.pack(all_of_it=True)
    assert steps_of(load_record(tmp_path)) == list(range(1, 601))


def test_what_a_newer_version_wrote_is_kept_as_it_is(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    recording.train(0, 2)
    unknown = msgspec.msgpack.encode({"source": "m", "epoch": 1, "stream": "events", "seq": 1, "body": {"type": "new"}})
    recording.writer.append(unknown, "events", 1)
    recording.take(Note(time=1.0, step=0, incarnation=1, actor="a", text="known"), "events")
    recording.pack(all_of_it=True)
    assert unknown in b"".join(
        payload
        for found in frames.read_frames(recording.run.journal)
        if isinstance(packed := decode_packed(found.payload), PackedEnvelopes)
        for payload in envelopes_of(packed)
    )
    record = load_record(tmp_path)
    assert steps_of(record) == list(range(1, 201))
    assert [event.text for event in record.events if isinstance(event, Note)] == ["known"]
    assert "cannot read" in said(record)


def test_messages_that_the_journal_missed_stay_in_memory_and_memory_is_given_back_again_after_them(
    tmp_path: Path,
) -> None:
    recording = Recording(tmp_path)
    recording.train(0, 30)
    recording.train(30, 33, journal=False)  # the disk was full for longer than the backlog holds
    recording.train(33, 400)
    recording.pack()
    assert steps_of(recording.record) == list(range(1, 40_001))
    recording.save_index()
    hot = load_record(tmp_path).metrics.in_memory
    assert hot < 15_000, "what is packed is given back, but for the stretch that the journal lacks"
    recording.train(400, 800)
    recording.pack()
    assert recording.record.metrics.in_memory < 15_000
    assert steps_of(recording.record) == list(range(1, 80_001))


def test_a_torn_tail_is_no_news_and_decay_in_the_last_record_is(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    recording.train(0, 5)
    recording.writer.close()
    last = segment_file(recording.run.journal, recording.writer.segment)
    data = last.read_bytes()
    last.write_bytes(data[:-7])
    assert not said(load_record(tmp_path))
    last.write_bytes(data[:-7] + b"\xff" + data[-6:])
    assert "is damaged" in said(load_record(tmp_path))


def test_a_full_disk_that_still_makes_files_gives_out_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    run.create()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trainctl.wire.rundir.json.dump", full)
    assert [run.allocate("epoch"), run.allocate("epoch")] == [1, 2], "the name is the number"


@pytest.mark.parametrize("field", ["seqs", "links", "steps", "times", "envelopes", "rows", "data", "count", "others"])
def test_a_block_that_claims_to_be_gigabytes_is_told_and_never_inflated(tmp_path: Path, field: str) -> None:
    recording = Recording(tmp_path)
    recording.train(0, 5)
    recording.pack(all_of_it=True)
    bomb = zlib.compress(bytes(64 * 1024 * 1024), 9)
    integers = b"q" + bytes(8) + bomb
    victim = packed_file(recording.run.journal, 1)
    good = next(frames.segment_frames(recording.run.journal, 1)).payload
    block = decode_packed(good)
    assert isinstance(block, PackedRows)
    made: Packed
    match field:
        case "others":
            made = PackedEnvelopes(data=bomb)
        case "data":
            made = msgspec.structs.replace(
                block, columns=[msgspec.structs.replace(block.columns[0], data=bomb, deflated=True)]
            )
        case "rows":
            made = msgspec.structs.replace(block, columns=[msgspec.structs.replace(block.columns[0], rows=integers)])
        case "count":
            made = msgspec.structs.replace(block, count=2**40, steps=integers)
        case _:
            made = msgspec.structs.replace(block, **{field: b"t" + integers if field == "times" else integers})
    payload = msgspec.msgpack.encode(made)
    assert len(payload) < frames.FRAME_LIMIT
    victim.write_bytes(frames.PACKED_HEADER + frames.frame(payload) + frames.frame(good))
    tracemalloc.start()
    try:
        record = load_record(tmp_path)
        found = steps_of(record)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * 1024 * 1024
    assert found == list(range(1, 501)), "the block behind it is read"
    assert "cannot read" in said(record)
