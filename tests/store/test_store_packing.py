"""Numbers as few bytes, packed segments that decay, and the index that stands for them."""

import tempfile
from collections.abc import Generator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainctl.store.frames import packed_file, segments
from trainctl.store.journal import JournalIndex, JournalWriter
from trainctl.store.numbers import (
    pack_integers,
    pack_times,
    unpack_integers,
    unpack_times,
)
from trainctl.store.packed import Sealed, places_of
from trainctl.store.packing import pack_segment, packing_steps
from trainctl.store.replay import load_record
from trainctl.store.saved import index_file, packed_sizes, read_index, write_index
from trainctl.wire import codec
from trainctl.wire.messages import Column, Envelope, Note, Rows, RunInfo
from trainctl.wire.rundir import RunDir


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50))
def test_integers_come_back(values: list[int]) -> None:
    given_values = np.array(values, "i8")
    assert np.array_equal(unpack_integers(pack_integers(given_values)), given_values)


@given(st.lists(st.one_of(st.floats(0, 4e9), st.floats(), st.just(-0.0)), max_size=50))
def test_times_come_back_to_the_bit(values: list[float]) -> None:
    given_values = np.array(values, "f8")
    found = unpack_times(pack_times(given_values))
    assert np.array_equal(found, given_values, equal_nan=True)


def test_times_of_the_clock_take_a_third_of_their_size() -> None:
    rng = np.random.default_rng(1)
    times = 1.79e9 + np.cumsum(rng.normal(0.05, 0.001, 4096))
    times = np.round(times * 2**22) / 2**22
    assert len(pack_times(times)) < 0.4 * times.nbytes


def filled(directory: Path, envelopes: int = 60, rows: int = 100, *, packed: bool = True) -> RunDir:
    """A recorded run of one metric, packed whole."""
    run = RunDir(directory)
    run.create()
    info = RunInfo(run="m", id="m", dir=str(directory), host="h", created=0, started=0, world_size=1)
    run.info_file.write_bytes(msgspec.json.encode(info))
    writer = JournalWriter(run.journal, segment_bytes=20_000)
    for number in range(envelopes):
        steps = list(range(number * rows + 1, (number + 1) * rows + 1))
        data = np.array(steps, "<f4").tobytes()
        body = Rows(
            attempt=1,
            incarnation=1,
            steps=steps,
            times=[1.7e9 + step for step in steps],
            columns=[Column(name="loss", dtype="f4", data=data)],
        )
        envelope = Envelope(source="m", epoch=1, stream="metrics", seq=number + 1, time=1.7e9, body=body, attempt=1)
        writer.append(codec.encode(envelope), "metrics", number + 1)
    writer.close()
    for number in segments(run.journal) if packed else []:
        pack_segment(run.journal, number)
    return run


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_in_a_packed_segment_costs_a_block_and_never_gives_a_wrong_value(at: float, flip: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        run = filled(Path(name))
        victim = packed_file(run.journal, segments(run.journal)[1])
        data = bytearray(victim.read_bytes())
        data[int(at * len(data))] ^= flip
        victim.write_bytes(data)
        record = load_record(run.path)
        found = record.metrics.query("loss")
        assert np.array_equal(found["value"], found["step"].astype("f8"))
        assert 0 < len(found["step"]) < 6000
        assert record.damage


def test_a_block_that_decays_after_it_was_indexed_leaves_a_gap_and_is_counted(tmp_path: Path) -> None:
    run = filled(tmp_path)
    record = load_record(run.path)
    packed_file(run.journal, segments(run.journal)[0]).write_bytes(b"")
    found = record.metrics.query("loss")
    assert 0 < len(found["step"]) < 6000
    assert np.array_equal(found["value"], found["step"].astype("f8"))
    assert record.metrics.unreadable == 1


@pytest.mark.parametrize("harm", [b"", b"nonsense", b"TCI\0\x01\0\0\0\0\0\0\0"])
def test_an_index_that_cannot_be_used_is_passed_over(tmp_path: Path, harm: bytes) -> None:
    run = filled(tmp_path)
    record = load_record(run.path)
    packed = segments(run.journal)
    write_index(run.journal, record.save(packed_sizes(run.journal, packed), {"metrics": 60}))
    assert read_index(run.journal) is not None
    assert len(load_record(run.path).metrics.query("loss")["step"]) == 6000
    index_file(run.journal).write_bytes(harm)
    assert read_index(run.journal) is None
    assert len(load_record(run.path).metrics.query("loss")["step"]) == 6000


def test_an_index_of_other_segments_is_passed_over(tmp_path: Path) -> None:
    run = filled(tmp_path)
    record = load_record(run.path)
    sizes = packed_sizes(run.journal, segments(run.journal))
    write_index(run.journal, record.save([(number, size + 1) for number, size in sizes], {}))
    assert read_index(run.journal) is None


def test_a_range_that_was_packed_is_gone_and_a_newer_one_is_not(tmp_path: Path) -> None:
    index = JournalIndex(tmp_path)
    writer = JournalWriter(tmp_path, segment_bytes=100, index=index)
    for seq in range(1, 21):
        envelope = Envelope(
            source="m",
            epoch=1,
            stream="events",
            seq=seq,
            time=0,
            body=Note(time=0, step=0, incarnation=1, actor="a", text="x" * 40),
        )
        writer.append(codec.encode(envelope), "events", seq)
    first = segments(tmp_path)[0]
    last_of_first = max(seq for seq in range(1, 21) if seq <= 2)
    pack_segment(tmp_path, first)
    index.forget(first)
    assert index.read("events", 1, last_of_first) == []
    assert len(index.read("events", 10, 20)) == 11
    writer.close()


def test_a_segment_that_is_packed_already_is_never_packed_over(tmp_path: Path) -> None:
    run = filled(tmp_path)
    number = segments(run.journal)[1]
    packed_once = packed_file(run.journal, number).read_bytes()
    again = pack_segment(run.journal, number)
    assert packed_file(run.journal, number).read_bytes() == packed_once
    assert again == places_of(run.journal, number)
    assert [place.segment for place in again] == [number]
    assert len(load_record(run.path).metrics.query("loss")["step"]) == 6000
    assert not list(run.journal.glob("*.tmp"))


def drained(steps: Generator[None, None, list[Sealed]]) -> list[Sealed]:
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return list(done.value)


@pytest.mark.parametrize("seen_by", [0, 1])
def test_of_two_hubs_that_pack_one_segment_the_second_leaves_it_as_the_first_made_it(
    tmp_path: Path, seen_by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = filled(tmp_path, packed=False)
    number = segments(run.journal)[1]
    late = packing_steps(run.journal, number)
    if seen_by == 0:  # it read the recorded segment before the other removed it
        next(late)
    else:  # it looked when there was no packed file, and reads when there is
        real = Path.exists
        monkeypatch.setattr(Path, "exists", lambda path: path.suffix != ".col" and real(path))
    first = pack_segment(run.journal, number)
    made = packed_file(run.journal, number).stat().st_ino
    assert drained(late) == first
    assert packed_file(run.journal, number).stat().st_ino == made
    assert not list(run.journal.glob("*.tmp"))
    assert len(load_record(run.path).metrics.query("loss")["step"]) == 6000
