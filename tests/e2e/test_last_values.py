"""The end of a run: what was logged last is in its history, or it is told how much is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import job
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record
from trainctl.trainer.sender import _BATCH
from trainctl.wire.messages import Anomaly

pytestmark = pytest.mark.ranks
STEPS = 11_000


def ended(output: Path, lag_s: float) -> tuple[RunRecord, dict[str, Any], str]:
    """What is on disk of a run whose device is so far behind, what its end was like, and its log."""
    with job("lagging.py", 1, output, ["--lag", str(lag_s)]) as running:
        assert running.wait(90) == 0, running.log()
        record = load_record(running.directory)
        return record, json.loads((output / "closing.json").read_text()), running.log()


def steps(record: RunRecord, metric: str) -> list[int]:
    return [int(step) for step in record.metrics.query(metric)["step"]]


def test_all_that_was_logged_before_the_end_is_in_the_history(tmp_path: Path) -> None:
    record, closing, _ = ended(tmp_path, lag_s=0.7)
    assert closing["waiting"] > _BATCH, "more than the sender takes at once"
    assert closing["left"] == 0
    assert steps(record, "loss")[-1] == STEPS
    assert steps(record, "norm") == list(range(1, 11)), "which the device computed after the last step"
    assert steps(record, "step_time_s") == list(range(1, STEPS + 1))
    assert steps(record, "test_accuracy") == [STEPS], "logged behind the last step"


@pytest.mark.thorough
def test_a_device_that_never_brings_the_last_values_holds_the_exit_up_for_seconds_and_it_is_told(
    tmp_path: Path,
) -> None:
    record, closing, said = ended(tmp_path, lag_s=3600.0)
    assert 3.0 <= closing["took_s"] < 20.0, "three, and some for a busy machine"
    assert steps(record, "step_time_s")[-1] == STEPS
    assert steps(record, "test_accuracy") == [STEPS]
    assert "norm" not in record.metrics.names
    (told,) = [event for event in record.events if isinstance(event, Anomaly) and event.what == "dropped"]
    assert told.text.startswith("10 values of the last steps are missing")
    assert told.text in said
