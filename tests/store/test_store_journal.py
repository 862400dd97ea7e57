"""The journal gives back what was written, in order, whatever happens to its bytes; and never an altered record."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainctl.store.journal import (
    Damage,
    JournalIndex,
    JournalWriter,
    read_frames,
    read_journal,
    segment_file,
    segments,
)
from trainctl.wire import codec
from trainctl.wire.messages import Envelope, Note, Stream


def envelope(seq: int, stream: Stream = "events", size: int = 10) -> bytes:
    body = Note(time=1.0, step=seq, incarnation=1, actor="ann", text="x" * size)
    return codec.encode(Envelope(source="r", epoch=1, stream=stream, seq=seq, time=1.0, body=body))


def write(directory: Path, count: int, *, segment_bytes: int = 1 << 20, size: int = 10) -> list[bytes]:
    writer = JournalWriter(directory, segment_bytes)
    payloads = [envelope(seq, size=size) for seq in range(1, count + 1)]
    for seq, payload in enumerate(payloads, start=1):
        writer.append(payload, "events", seq)
    writer.sync()
    writer.close()
    return payloads


def test_what_was_written_is_read_over_segments_and_openings(tmp_path: Path) -> None:
    first = write(tmp_path, 30, segment_bytes=500)
    assert len(segments(tmp_path)) > 3
    assert list(read_journal(tmp_path)) == first
    second = write(tmp_path, 5)
    assert list(read_journal(tmp_path)) == first + second


def test_a_journal_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert list(read_journal(tmp_path / "none")) == []


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 12), cut=st.integers(1, 400))
def test_a_torn_tail_costs_only_what_it_cut_into_and_writing_goes_on_behind_it(count: int, cut: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        payloads = write(directory, count)
        path = segment_file(directory, 1)
        data = path.read_bytes()
        path.write_bytes(data[: max(0, len(data) - cut)])
        damage: list[Damage] = []
        whole = list(read_journal(directory, damage))
        assert whole == payloads[: len(whole)]
        assert all(found.torn for found in damage)
        writer = JournalWriter(directory)
        assert (writer.cut_bytes > 0) == any(found.offset > 0 for found in damage)
        writer.append(b"next", "events", 99)
        writer.close()
        assert list(read_journal(directory)) == [*whole, b"next"]


@settings(max_examples=150, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), size=st.integers(0, 300))
def test_a_flipped_byte_costs_one_record_and_never_gives_a_wrong_one(at: float, flip: int, size: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        payloads = write(directory, 12, size=size)
        path = segment_file(directory, 1)
        data = bytearray(path.read_bytes())
        place = 8 + int(at * (len(data) - 8))  # the header itself is the next test's
        data[place] ^= flip
        path.write_bytes(bytes(data))
        damage: list[Damage] = []
        found = list(read_journal(directory, damage))
        assert len(found) == 11
        assert len(damage) == 1
        assert set(found) < set(payloads)
        assert found == sorted(found, key=payloads.index)


def test_a_segment_with_a_bad_header_is_told_of_and_the_next_is_read(tmp_path: Path) -> None:
    first = write(tmp_path, 3)
    second = write(tmp_path, 2)
    data = bytearray(segment_file(tmp_path, 1).read_bytes())
    data[0] ^= 1
    segment_file(tmp_path, 1).write_bytes(bytes(data))
    damage: list[Damage] = []
    assert list(read_journal(tmp_path, damage)) == second
    assert "00000001 is damaged at byte 0" in str(damage[0])
    assert first


@settings(max_examples=40, deadline=None)
@given(
    streams=st.lists(st.sampled_from(["metrics", "events", "nodes"]), min_size=1, max_size=400),
    segment_bytes=st.sampled_from([300, 2000, 1 << 20]),
    first=st.integers(1, 400),
    length=st.integers(0, 200),
)
def test_any_range_of_a_stream_is_found_while_writing_and_after_reading(
    streams: list[Stream], segment_bytes: int, first: int, length: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        writer = JournalWriter(directory, segment_bytes)
        written: dict[str, list[bytes]] = {}
        for stream in streams:
            of_stream = written.setdefault(stream, [])
            of_stream.append(envelope(len(of_stream) + 1, stream))
            writer.append(of_stream[-1], stream, len(of_stream))
        read = JournalIndex(directory)
        for frame in read_frames(directory):
            found = codec.envelope_decoder()(frame.payload)
            assert isinstance(found, Envelope)
            read.note(found.stream, found.seq, frame.segment, frame.offset)
        for stream, payloads in written.items():
            expected = payloads[first - 1 : first + length]
            assert writer.index.read(stream, first, first + length) == expected
            assert read.read(stream, first, first + length) == expected
        assert read.read("ranks", 1, 10) == []
        writer.close()


def test_a_full_disk_takes_back_the_half_written_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    writer = JournalWriter(tmp_path)
    writer.append(envelope(1), "events", 1)
    real, calls = os.write, []

    def full(handle: int, data: bytes) -> int:
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(handle, bytes(data)[:7])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        writer.append(envelope(2), "events", 2)
    monkeypatch.undo()
    writer.append(envelope(2), "events", 2)
    writer.close()
    assert list(read_journal(tmp_path)) == [envelope(1), envelope(2)]
