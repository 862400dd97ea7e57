"""A run directory that somebody else made, or a disk that decayed: read as far as it goes, never a fault of ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from trainctl.store import frames
from trainctl.store.frames import HEADER, PACKED_HEADER, Damage, frame, recorded_segments, segment_frames, segments
from trainctl.store.journal import JournalWriter
from trainctl.store.numbers import pack_integers, unpack_integers
from trainctl.store.packed import PackedColumn, PackedRows
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record
from trainctl.store.saved import SavedColumn, SavedRun, packed_sizes, write_index
from trainctl.wire import codec
from trainctl.wire.messages import Column, Envelope, Rows, RunInfo
from trainctl.wire.rundir import RunDir

replace = msgspec.structs.replace


def made(directory: Path) -> RunDir:
    run = RunDir(directory)
    run.create()
    info = RunInfo(run="m", id="m", dir=str(directory), host="h", created=0, started=0, world_size=1)
    run.info_file.write_bytes(msgspec.json.encode(info))
    return run


def integers(*values: int) -> bytes:
    return pack_integers(np.array(values, "i8"))


def block(**changed: Any) -> PackedRows:
    values = np.array([1, 2], "<f4").tobytes()
    given: dict[str, Any] = {
        "seqs": integers(1, 2),
        "links": integers(1, 2),
        "epoch": 1,
        "attempt": 1,
        "incarnation": 1,
        "link": 2,
        "time": 1.0,
        "count": 2,
        "envelopes": integers(1, 1),
        "steps": integers(1, 2),
        "times": b"d" + np.array([1.0, 2.0]).tobytes(),
        "columns": [PackedColumn(name="loss", dtype="f4", data=values)],
    }
    return PackedRows(**given | changed)


@pytest.mark.parametrize("code", "OUSVxMmefdgFDG?cpP")
def test_integers_of_a_type_that_nobody_packs_are_refused(code: str) -> None:
    with pytest.raises(ValueError, match="type"):
        unpack_integers(code.encode() + integers(1, 2, 3)[1:])


@pytest.mark.parametrize("field", ["seqs", "links", "envelopes", "steps"])
@pytest.mark.parametrize("code", [b"O", b"x", b"M"])
def test_a_block_of_no_numbers_is_told_and_what_is_beside_it_is_read(tmp_path: Path, field: str, code: bytes) -> None:
    run = made(tmp_path)
    bad = block(**{field: code + integers(7, 8)[1:]})
    payload = PACKED_HEADER + frame(msgspec.msgpack.encode(bad)) + frame(msgspec.msgpack.encode(block()))
    (run.journal / "00000001.col").write_bytes(payload)
    record = load_record(tmp_path)
    assert record.metrics.query("loss")["value"].tolist() == [1, 2]
    assert record.damage


@pytest.mark.parametrize(
    "changed",
    [
        {"columns": [PackedColumn(name="loss", dtype="f4", data=bytes(4))]},
        {"columns": [PackedColumn(name="loss", dtype="f4", data=bytes(4), rows=integers(7))]},
        {"columns": [PackedColumn(name="loss", dtype="f4", like=9)]},
        {"steps": integers(1)},
    ],
)
def test_a_block_that_turns_out_to_be_nonsense_when_a_chart_reads_it_is_a_gap(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    run = made(tmp_path)
    path = run.journal / "00000001.col"
    path.write_bytes(PACKED_HEADER + frame(msgspec.msgpack.encode(block())))
    record = load_record(tmp_path)
    path.write_bytes(PACKED_HEADER + frame(msgspec.msgpack.encode(block(**changed))))
    track = record.metrics._metrics["loss"].tracks[1]
    reader = track._reader
    assert reader.metric(1, len(PACKED_HEADER), "loss") is None
    assert record.metrics.unreadable == 1


def test_bytes_that_look_like_frames_all_over_are_passed_over_in_one_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = [0]
    real = frames.zlib.crc32

    def counted(data: Any) -> int:
        checked[0] += len(data)
        return real(data)

    monkeypatch.setattr(frames.zlib, "crc32", counted)
    wanted = frame(b"wanted")
    for filling in (b"\xc1" * 2**20, b"\xc1\xc1" + (2**19).to_bytes(4, "little") + b"1234"):
        (tmp_path / "00000001.seg").write_bytes(HEADER + wanted + filling * (2**20 // len(filling)) + wanted)
        checked[0] = 0
        damage: list[Damage] = []
        found = [each.payload for each in segment_frames(tmp_path, 1, None, damage)]
        assert found[0] == b"wanted"
        assert checked[0] < 2**25, "and not each byte as often as there are marks"
        assert damage
    tiny = frame(b"x")
    (tmp_path / "00000001.seg").write_bytes(HEADER + (tiny + b"?") * 20_000)
    assert len(list(segment_frames(tmp_path, 1))) == 20_000, "a damage costs itself, however many there are"


def indexed(directory: Path) -> tuple[RunDir, SavedRun]:
    """A packed run of one metric that is its step, and its index."""
    run = made(directory)
    writer, record = JournalWriter(run.journal), RunRecord(load_record(directory).info)
    for step in range(1, 601):
        column = Column(name="loss", dtype="f4", data=np.array([step], "<f4").tobytes())
        body = Rows(attempt=1, incarnation=1, steps=[step], times=[1.0 * step], columns=[column])
        envelope = Envelope(source="m", epoch=1, stream="metrics", seq=step, time=1, body=body, attempt=1, link=step)
        writer.append(codec.encode(envelope), "metrics", step)
        record.apply(envelope)
    writer.close()
    for number in recorded_segments(run.journal):
        record.seal(pack_segment(run.journal, number))
    return run, record.save(packed_sizes(run.journal, segments(run.journal)), {"metrics": 600})


def tracks(saved: SavedRun, change: Callable[[Any], Any]) -> SavedRun:
    changed = [change(track) for track in saved.metrics.tracks]
    return replace(saved, metrics=replace(saved.metrics, tracks=changed))


def eight(value: int) -> SavedColumn:
    return SavedColumn(dtype="<i8", data=value.to_bytes(8, "little"))


NONSENSE: dict[str, Callable[[SavedRun], SavedRun]] = {
    "half a number": lambda saved: tracks(
        saved, lambda each: replace(each, hot=each.hot | {"step": SavedColumn(dtype="<i8", data=b"abc")})
    ),
    "no values": lambda saved: tracks(saved, lambda each: replace(each, hot={})),
    "no places": lambda saved: tracks(saved, lambda each: replace(each, chunks={})),
    "places of no length": lambda saved: tracks(
        saved,
        lambda each: replace(each, chunks=dict.fromkeys(each.chunks, SavedColumn(dtype="<i8", data=b""))),
    ),
    "a place among none that are kept": lambda saved: tracks(
        saved, lambda each: replace(each, chunks=each.chunks | {"segment": eight(0)})
    ),
    "ends that are uneven": lambda saved: tracks(
        saved, lambda each: replace(each, edges=each.edges | {"at": eight(0)})
    ),
    "values behind the end": lambda saved: tracks(saved, lambda each: replace(each, hot_start=2**40)),
    "buckets of nothing": lambda saved: tracks(saved, lambda each: replace(each, base=0)),
    "a metric without a name": lambda saved: replace(saved, metrics=replace(saved.metrics, names=[])),
    "a set of no metrics": lambda saved: replace(
        saved, metrics=replace(saved.metrics, kinds=[(1, (7,))], unsealed=[(1, 601, 1, 0)])
    ),
    "a metric in no incarnation": lambda saved: replace(
        saved, metrics=replace(saved.metrics, kinds=[(9, (0,))], unsealed=[(1, 601, 1, 0)])
    ),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_an_index_that_is_whole_and_says_nonsense_is_passed_over(tmp_path: Path, nonsense: str) -> None:
    run, saved = indexed(tmp_path)
    write_index(run.journal, NONSENSE[nonsense](saved))
    record = load_record(tmp_path)
    assert record.metrics.query("loss")["step"].tolist() == list(range(1, 601))
    assert record.metrics.query("loss", points=50)["count"].sum() == 600
    assert record.state.step == 600
    write_index(run.journal, saved)
    assert load_record(tmp_path).metrics.query("loss")["step"].tolist() == list(range(1, 601))
