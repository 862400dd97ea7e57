"""A long history in pages: each costs what is on it, and together they are the whole."""

import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest

from trainctl.store import chunks
from trainctl.store.chunks import BlockReader
from trainctl.store.frames import packed_file, segments
from trainctl.store.journal import JournalWriter
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record
from trainctl.wire import codec
from trainctl.wire.messages import Column, Envelope, HistoryRequest, Rows, RunInfo
from trainctl.wire.rundir import RunDir

STEPS = 400_000
AT_ONCE = 4000


def packed_run(directory: Path, *, back: int = 0) -> RunRecord:
    """Two metrics that are their step; after half of it the script goes `back` by some steps."""
    run = RunDir(directory)
    run.create()
    info = RunInfo(run="m", id="m", dir=str(directory), host="h", created=0, started=0, world_size=1)
    run.info_file.write_bytes(msgspec.json.encode(info))
    writer = JournalWriter(run.journal)
    for number in range(STEPS // AT_ONCE):
        first = number * AT_ONCE - (back if number >= STEPS // AT_ONCE // 2 else 0)
        steps = np.arange(first + 1, first + AT_ONCE + 1)
        data = steps.astype("<f4").tobytes()
        body = Rows(
            attempt=1,
            incarnation=1,
            steps=steps.tolist(),
            times=(1e9 + steps).tolist(),
            columns=[Column(name=name, dtype="f4", data=data) for name in ("loss", "lr")],
        )
        envelope = Envelope(source="m", epoch=1, stream="metrics", seq=number + 1, time=1e9, body=body, attempt=1)
        writer.append(codec.encode(envelope), "metrics", number + 1)
    writer.close()
    for number in segments(run.journal):
        pack_segment(run.journal, number)
    return load_record(directory)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """The blocks that were looked into."""
    places: set[tuple[int, int]] = set()
    real = BlockReader.metric

    def noted(self: BlockReader, segment: int, offset: int, name: str) -> object:
        places.add((segment, offset))
        return real(self, segment, offset, name)

    monkeypatch.setattr(BlockReader, "metric", noted)
    return places


@pytest.mark.parametrize("back", [0, 5, 150_000])
def test_a_page_reads_what_is_on_it_and_the_pages_are_the_whole(
    tmp_path: Path, read: set[tuple[int, int]], back: int
) -> None:
    record = packed_run(tmp_path, back=back)
    expected = record.metrics.query("loss")["value"]
    everything = len(read)
    pages: list[list[float]] = []
    from_step: int | None = None
    while True:
        read.clear()
        page = record.history(HistoryRequest(req=1, metrics=["loss", "lr"], from_step=from_step))
        assert len(read) < everything / 3, "not all that comes after it"
        assert len(codec.encode(page)) < codec.DATA_LIMIT
        pages.append(np.frombuffer(page.series[0].columns["value"], "<f8").tolist())
        assert page.series[1].columns["value"] == page.series[0].columns["value"]
        if page.next_step is None:
            break
        from_step = page.next_step
    assert len(pages) > STEPS // 20_000
    found = [value for page in pages for value in page]
    assert sorted(found) == sorted(expected.tolist())
    if not back:
        assert found == expected.tolist()


@pytest.mark.parametrize(("low", "high"), [(None, None), (1000, 390_000), (199_900, 200_100)])
def test_a_chart_of_steps_that_went_back_reads_no_more_than_its_ends(
    tmp_path: Path, read: set[tuple[int, int]], low: int | None, high: int | None
) -> None:
    record = packed_run(tmp_path, back=5)
    record.history(HistoryRequest(req=1, metrics=["loss"], from_step=low, to_step=high, points=400))
    assert len(read) <= 6, "of a hundred"


def test_a_chart_of_a_run_that_was_rolled_back_often_looks_up_each_end_once(
    tmp_path: Path, read: set[tuple[int, int]]
) -> None:
    record = packed_run(tmp_path)
    for incarnation in range(2, 12):
        steps = np.arange(100, 3000)
        column = Column(name="loss", dtype="f4", data=steps.astype("<f4").tobytes())
        record.metrics.begin(incarnation, after_step=1500 - incarnation)
        times = steps.astype("f8").tolist()
        rows = Rows(attempt=1, incarnation=incarnation, steps=steps.tolist(), times=times, columns=[column])
        record.metrics.add(rows)
    asked = HistoryRequest(req=1, metrics=["loss"], points=20)
    first = record.history(asked)
    assert read
    read.clear()
    again = record.history(asked)
    assert again == first
    assert not read, "what was looked up is remembered"
    saved = record.save([], {})
    read.clear()
    opened = RunRecord(record.info)
    opened.restore(saved)
    assert opened.history(asked) == first
    assert not read, "in the index too"


def test_a_branch_whose_rows_decayed_since_they_were_looked_up_is_a_gap_and_no_fault(tmp_path: Path) -> None:
    record = packed_run(tmp_path)
    asked = HistoryRequest(req=1, metrics=["loss"], from_step=100_001, to_step=100_010, points=400)
    assert np.frombuffer(record.history(asked).series[0].columns["count"], "<i8").sum() == 10
    opened = RunRecord(record.info)
    opened.restore(record.save([], {}))
    for number in segments(RunDir(tmp_path).journal):
        packed_file(RunDir(tmp_path).journal, number).write_bytes(b"")
    for points in (1, 3, 400):
        found = opened.history(msgspec.structs.replace(asked, points=points))
        assert found.series[0].columns["count"] == b""
    assert opened.metrics.unreadable


def test_blocks_that_were_read_take_no_more_memory_than_is_said_as_they_are_and_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    run.create()
    info = RunInfo(run="m", id="m", dir=str(tmp_path), host="h", created=0, started=0, world_size=1)
    run.info_file.write_bytes(msgspec.json.encode(info))
    writer, random = JournalWriter(run.journal), np.random.default_rng(1)
    for seq in range(1, 41):
        steps = list(range(seq * 4000 - 3999, seq * 4000 + 1))
        columns = [
            Column(name=f"m{number}", dtype="f8", data=random.normal(size=4000).astype("<f8").tobytes())
            for number in range(8)
        ]
        body = Rows(attempt=1, incarnation=1, steps=steps, times=[1.0 * step for step in steps], columns=columns)
        envelope = Envelope(source="m", epoch=1, stream="metrics", seq=seq, time=1e9, body=body, attempt=1)
        writer.append(codec.encode(envelope), "metrics", seq)
    writer.close()
    for number in segments(run.journal):
        pack_segment(run.journal, number)
    monkeypatch.setattr(chunks, "CACHED_BYTES", 3 * 2**20)
    record = load_record(tmp_path)
    tracemalloc.start()
    try:
        for number in range(8):
            assert len(record.metrics.query(f"m{number}")["value"]) == 160_000
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 3.5 * 2**20, "of ten"
