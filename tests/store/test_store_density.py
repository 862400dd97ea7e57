"""A metric that comes rarely: a chart of it reads few blocks, and what stays in memory of it is little."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from trainctl.store.chunks import BlockReader
from trainctl.store.density import BASE, base_of, stays
from trainctl.store.frames import recorded_segments, segments
from trainctl.store.journal import JournalWriter
from trainctl.store.packing import CELLS_LIMIT, ROWS_LIMIT, pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record
from trainctl.store.saved import packed_sizes, write_index
from trainctl.wire import codec
from trainctl.wire.messages import Column, Envelope, HistoryRequest, Rows, RunInfo
from trainctl.wire.rundir import RunDir

STEPS = 200_000
AT_ONCE = 1000


def run_with(directory: Path, every: int, *, alone_after: int = STEPS) -> RunRecord:
    """`loss` at every step and `val_loss` at every so-manyth, or at each behind `alone_after`; both are their step."""
    run = RunDir(directory)
    run.create()
    info = RunInfo(run="m", id="m", dir=str(directory), host="h", created=0, started=0, world_size=1)
    run.info_file.write_bytes(msgspec.json.encode(info))
    writer, record, seq = JournalWriter(run.journal, segment_bytes=1 << 19), RunRecord(info), 0
    for first in range(0, STEPS, AT_ONCE):
        steps = np.arange(first + 1, first + AT_ONCE + 1)
        chosen = steps if first >= alone_after else steps[steps % every == 0]
        for name, those in [("loss", steps), ("val_loss", chosen)][: 1 + bool(len(chosen))]:
            seq += 1
            column = Column(name=name, dtype="f4", data=those.astype("<f4").tobytes())
            times = (1e9 + those).tolist()
            body = Rows(attempt=1, incarnation=1, steps=those.tolist(), times=times, columns=[column])
            envelope = Envelope(source="m", epoch=1, stream="metrics", seq=seq, time=1e9, body=body, attempt=1)
            writer.append(codec.encode(envelope), "metrics", seq)
            record.apply(envelope)
    writer.close()
    for number in recorded_segments(run.journal):
        record.seal(pack_segment(run.journal, number))
    write_index(run.journal, record.save(packed_sizes(run.journal, segments(run.journal)), {"metrics": seq}))
    return record


@pytest.mark.parametrize("every", [16, 400])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_first_chart_of_a_metric_that_comes_rarely_reads_few_blocks(
    tmp_path: Path, every: int, indexed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lived = run_with(tmp_path, every)
    if not indexed:
        (RunDir(tmp_path).journal / "index").unlink()
    opened, looked = load_record(tmp_path), set[tuple[int, int]]()
    real = BlockReader.metric

    def noted(self: BlockReader, segment: int, offset: int, name: str) -> object:
        looked.add((segment, offset))
        return real(self, segment, offset, name)

    monkeypatch.setattr(BlockReader, "metric", noted)
    asked = HistoryRequest(req=1, metrics=["val_loss"], points=STEPS // every // 20)
    chart = opened.history(asked)
    assert len(looked) <= 2
    assert np.frombuffer(chart.series[0].columns["count"], "<i8").sum() == STEPS // every
    assert chart == lived.history(asked)
    for record in (lived, opened):
        found = record.metrics.query("val_loss")
        assert found["step"].tolist() == list(range(every, STEPS + 1, every))
        assert np.array_equal(found["value"], found["step"].astype("f8"))
    assert opened.metrics.in_memory <= 2 * BASE + STEPS // 400


def test_a_metric_that_began_to_come_with_every_step_is_read_from_its_blocks_again(tmp_path: Path) -> None:
    lived = run_with(tmp_path, 1000, alone_after=STEPS // 2)
    expected = [*range(1000, STEPS // 2 + 1, 1000), *range(STEPS // 2 + 1, STEPS + 1)]
    for record in (lived, load_record(tmp_path)):
        assert record.metrics.query("val_loss")["step"].tolist() == expected
        assert record.metrics.in_memory <= 2 * BASE + STEPS // 2 // 1000


def test_a_first_block_that_is_short_says_nothing_of_those_that_follow() -> None:
    assert base_of(ROWS_LIMIT // 4, ROWS_LIMIT, 1) == 128
    assert base_of(3, 3, 2) == BASE
    assert base_of(1, 50, 2) == 16
    assert base_of(ROWS_LIMIT, ROWS_LIMIT, 1) == BASE


def test_of_many_tasks_that_come_in_turn_each_is_rolled_up_finely_though_none_comes_more_often() -> None:
    """Eight of fifty at each step: a sixth of a full block's 2621 rows is 419 values."""
    assert base_of(160, 1000, 50) == 32


def test_of_a_run_with_thousands_of_metrics_not_all_stays_in_memory() -> None:
    rows = CELLS_LIMIT // 4000
    assert not stays(rows, rows)
    assert stays(rows // 16, rows)
