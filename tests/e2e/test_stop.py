"""`stop` promises a checkpoint: where none can be made it is `failed`, and the run goes on or stays paused."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import job, trainctl, trainctl_json
from waiting import until

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]


def test_a_run_that_cannot_be_saved_is_not_stopped_and_one_that_can_is_saved_first(tmp_path: Path) -> None:
    with job("steered.py", 2, tmp_path, ["--long-evaluation", "--eval-every", "60", "--sleep", "0.02"]) as running:
        enough = tmp_path / "enough"
        enough.touch()  # evaluations have no batch
        running.until_step(1)
        run = ["-r", str(running.directory)]

        def act(*words: str, code: int = 0) -> dict[str, Any]:
            done = trainctl(*words, *run, "--json", check=False)
            assert done.returncode == code, done.stdout + done.stderr
            return dict(json.loads(done.stdout))

        def state() -> str:
            return str(trainctl_json("status", *run)["state"])

        checkpoints = running.directory / "checkpoints"
        if checkpoints.exists():
            checkpoints.rmdir()
        checkpoints.write_text("no directory: nothing can be saved here\n")
        failed = act("stop", "--yes", code=1)
        assert failed["state"] == "failed"
        assert "nothing was saved, so the run is not stopped: rank 0:" in failed["reason"]
        running.until_step(failed["step"] + 3)

        paused = act("pause")
        assert act("stop", "--yes", code=1)["step"] == paused["step"]
        assert state() == "paused"
        act("resume")
        running.until_step(paused["step"] + 3)

        enough.unlink()
        until(lambda: state() == "evaluating", 60, what="an evaluation")
        held = act("pause")
        inside = act("stop", "--yes", code=1)
        assert inside["step"] == held["step"]
        assert "nothing was saved" in inside["reason"]
        assert state() == "paused"
        assert act("set", "x", "7")["step"] == held["step"], "held behind the step whose evaluation is over"
        enough.touch()
        act("resume")
        running.until_step(held["step"] + 3)

        checkpoints.unlink()
        stopped = act("stop", "--yes")
        assert (stopped["state"], stopped["after"], stopped["ranks"]) == ("applied", "stopped", 2)
        (saved,) = trainctl_json("checkpoint", "ls", *run)["checkpoints"]
        assert saved["step"] == stopped["step"]
        assert saved["note"].startswith("stopped by ")
        assert running.wait(60) == 0, running.log()
