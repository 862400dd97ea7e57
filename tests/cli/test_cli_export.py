"""`trainctl export`: all values of all incarnations, from a live run or from its directory, whole or not at all."""

import asyncio
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from client.scripted_hub import ScriptedHub, hub, make_info, rows, write_journal
from hub.sink_reading import curves
from trainctl.cli.main import cli
from trainctl.client import export_formats
from trainctl.client.export import walk
from trainctl.client.recorded import RecordedSession
from trainctl.store.record import RunRecord
from trainctl.store.windows import step_windows
from trainctl.wire.messages import Envelope, RolledBack, stream_of


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli, ["export", *words])


def rolled_back(to_step: int, from_incarnation: int, incarnation: int) -> RolledBack:
    return RolledBack(
        time=1.0,
        step=to_step,
        incarnation=incarnation,
        from_step=9,
        from_incarnation=from_incarnation,
        checkpoint="none",
    )


def branched(running: ScriptedHub) -> None:
    """Steps 1 to 6; back to 3; 4 to 5. One value is NaN, and one metric is logged now and then."""
    running.publish(rows(1, 6, loss=1.0, lr=2.0))
    running.publish(rows(5, 5, val=math.nan))
    running.publish(rolled_back(3, 1, 2))
    running.publish(rows(4, 5, incarnation=2, loss=7.0, lr=2.0))


def table(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("recorded", [False, True])
def test_csv_has_every_value_with_its_incarnation_and_branch(tmp_path: Path, recorded: bool) -> None:
    target = tmp_path / "out"
    with hub() as running:
        branched(running)
        if not recorded:
            result = invoke("--to", "csv", str(target), "--json")
        write_journal(running)
    if recorded:
        result = invoke("--to", "csv", str(target), "-r", running.info.dir, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["schema"], summary["run"], summary["to"]) == (1, "gpt", "csv")
    assert (summary["metrics"], summary["values"], summary["live_values"]) == (3, 17, 10)
    assert summary["files"] == ["metrics.csv"]
    assert json.loads((target / "export.json").read_text()) == summary
    found = [(row["metric"], row["step"], row["value"], row["incarnation"], row["live"]) for row in table(target)]
    loss = [row[1:] for row in found if row[0] == "loss"]
    assert loss == [
        (str(step), repr(1.0 + step / 1000), "1", "true" if step < 4 else "false") for step in range(1, 7)
    ] + [(str(step), repr(7.0 + step / 1000), "2", "true") for step in (4, 5)]
    assert [row for row in found if row[0] == "val"] == [("val", "5", "nan", "1", "false")]


def test_parquet_has_the_same_rows_in_typed_columns(tmp_path: Path) -> None:
    with hub() as running:
        branched(running)
        assert invoke("--to", "parquet", str(tmp_path / "p")).exit_code == 0
        assert invoke("--to", "csv", str(tmp_path / "c")).exit_code == 0
    found = pq.read_table(tmp_path / "p" / "metrics.parquet").to_pylist()
    as_text = [{name: _text(value) for name, value in row.items()} for row in found]
    assert as_text == table(tmp_path / "c")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_tensorboard_gets_a_clean_live_curve_and_each_abandoned_piece_apart(tmp_path: Path) -> None:
    with hub() as running:
        branched(running)
        result = invoke("--to", "tensorboard", str(tmp_path / "tb"), "loss")
    assert result.exit_code == 0, result.output
    live, abandoned = curves(tmp_path / "tb" / "live"), curves(tmp_path / "tb" / "abandoned-1")
    assert [step for step, _ in live["loss"]] == [1, 2, 3, 4, 5]
    assert [round(value) for _, value in live["loss"]] == [1, 1, 1, 7, 7]
    assert [step for step, _ in abandoned["loss"]] == [4, 5, 6]
    assert set(live) == {"loss"}, "only what was named"


def test_what_is_in_the_way_stays_and_force_replaces_an_export_only(tmp_path: Path) -> None:
    target, mine = tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    (tmp_path / "empty").mkdir()
    with hub() as running:
        running.publish(rows(1, 3))
        assert invoke("--to", "csv", str(tmp_path / "empty")).exit_code == 0, "an empty directory is no obstacle"
        assert invoke("--to", "csv", str(target)).exit_code == 0
        again = invoke("--to", "csv", str(target))
        assert again.exit_code == 2
        assert "is not empty; nothing was written" in again.stderr
        running.publish(rows(4, 4))
        assert invoke("--to", "csv", str(target), "--force").exit_code == 0
        assert {row["step"] for row in table(target)} == {"1", "2", "3", "4"}
        foreign = invoke("--to", "csv", str(mine), "--force")
        assert foreign.exit_code == 2
        assert "--force does not delete that" in foreign.stderr
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "out"

    def full(self: export_formats.CsvWriter, part: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_formats.CsvWriter, "write", full)
    with hub() as running:
        running.publish(rows(1, 3))
        result = invoke("--to", "csv", str(target), "--json")
    assert result.exit_code == 1
    assert "No space left on device; nothing was left at" in json.loads(result.stdout)["error"]["message"]
    assert list(target.parent.iterdir()) == []


def test_a_missing_library_and_an_unknown_metric_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub() as running:
        running.publish(rows(1, 3))
        unknown = invoke("--to", "csv", str(tmp_path / "out"), "lss")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        missing = invoke("--to", "parquet", str(tmp_path / "out"))
    assert unknown.exit_code == 2
    assert "has no metric 'lss'" in unknown.stderr
    assert missing.exit_code == 1
    assert 'pip install "trainctl-cockpit[parquet]"' in missing.stderr
    assert list(tmp_path.iterdir()) == []


@given(
    counts=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=30),
    size=st.integers(1, 30),
)
def test_windows_hold_every_step_once(counts: list[tuple[int, int]], size: int) -> None:
    rollup = {"step": np.array([step for step, _ in counts], "i8"), "count": np.array([n for _, n in counts], "i8")}
    windows = step_windows([rollup], size)
    for step, _ in counts:
        assert sum(first <= step <= last for first, last in windows) == 1
    assert all(first <= last for first, last in windows)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=5))
def test_what_is_live_is_what_the_last_incarnation_stands_on(pieces: list[tuple[int, int]]) -> None:
    record = RunRecord(make_info("run-1", "gpt"))
    seqs = dict.fromkeys(("metrics", "events", "ranks", "nodes"), 0)

    def tell(body: Any) -> None:
        stream = stream_of(body)
        seqs[stream] += 1
        record.apply(Envelope(source="run-1", epoch=1, stream=stream, seq=seqs[stream], time=1.0, body=body))

    live: list[tuple[int, int]] = []
    everything: list[tuple[int, int]] = []
    step = 0
    for incarnation, (more, back) in enumerate(pieces, 1):
        if incarnation > 1:
            step = max(0, step - back)
            tell(rolled_back(step, incarnation - 1, incarnation))
            live = [value for value in live if value[0] <= step]
        tell(rows(step + 1, step + more, incarnation=incarnation, loss=1.0))
        new = [(number, incarnation) for number in range(step + 1, step + more + 1)]
        live, everything, step = live + new, everything + new, step + more

    async def exported() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        session = RecordedSession(Path(record.info.dir), record)
        parts = [part async for part in walk(session, ["loss"])]
        found = [
            (number, part.incarnation, on) for part in parts for number, on in zip(part.steps, part.live, strict=True)
        ]
        return [(n, i) for n, i, _ in found], [(n, i) for n, i, on in found if on]

    assert asyncio.run(exported()) == (everything, live)
