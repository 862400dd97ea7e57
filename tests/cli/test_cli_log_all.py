"""`trainctl log` shows every event that was recorded, or says what it cannot show."""

import json
from pathlib import Path

import pytest

from store.recorded_events import EventRun
from trainctl.cli.log import Wanted, print_log
from trainctl.store.frames import packed_file, segments

KEPT = 2100  # more than one answer holds


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EventRun:
    monkeypatch.setattr("trainctl.store.record.EVENTS_KEPT", KEPT)
    made = EventRun(tmp_path / "run", segment_bytes=50_000)
    made.tell(KEPT + 400, rows=False)
    made.pack(but=1)
    return made


def texts(run: EventRun, capsys: pytest.CaptureFixture[str], **wanted: object) -> tuple[list[str], str]:
    capsys.readouterr()
    assert print_log(str(run.path), None, Wanted(**wanted), as_json=True) == 0  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    return [line["text"] for line in map(json.loads, out.splitlines())], err


def test_every_event_is_printed(run: EventRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert texts(run, capsys) == (run.texts, "")
    assert texts(run, capsys, from_step=10)[0] == run.texts[9:]
    assert texts(run, capsys, kinds=frozenset({"note"}))[0] == run.texts[9::10]
    assert texts(run, capsys, lines=2050)[0] == run.texts[-2050:]


def test_what_is_not_in_the_journal_any_more_is_named(run: EventRun, capsys: pytest.CaptureFixture[str]) -> None:
    second = segments(run.journal)[1]
    packed_file(run.journal, second).unlink()
    found, _ = texts(run, capsys)
    assert 0 < len(found) < len(run.texts)
    (told,) = [text for text in found if not text.startswith("event ")]
    assert told.startswith(f"journal segment {second:08d} is missing: what it holds is not shown")
