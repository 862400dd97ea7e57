"""A real training run whose rank 0 is killed: somebody is told."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs import job, trainctl_json
from waiting import until

pytestmark = pytest.mark.ranks


def test_kill_9_of_rank_0_of_a_real_run_wakes_somebody(tmp_path: Path) -> None:
    config = Path(os.environ["TRAINCTL_CONFIG"])
    config.mkdir(parents=True)
    script = config / "page.sh"
    script.write_text('#!/bin/sh\necho "$TRAINCTL_RUN_NAME $TRAINCTL_ALERT_SEVERITY" > environment\ncat >> heard\n')
    script.chmod(0o700)
    (config / "config.toml").write_text('[alerts]\ncommand = ["./page.sh"]\n')
    with job("regression.py", 1, tmp_path, ["--steps", "5000", "--sleep", "0.05"]) as running:
        running.until_step(5)
        pid = trainctl_json("status", "-r", str(running.directory))["ranks"][0]["pid"]
        os.kill(running.process.pid, signal.SIGSTOP)  # torchrun would restart or report; a node's OOM killer takes both
        os.kill(pid, signal.SIGKILL)
        until(lambda: pages(config / "heard"), 20)
        os.kill(running.process.pid, signal.SIGCONT)
    alerts = pages(config / "heard")
    assert [alert["summary"].partition(" at step")[0] for alert in alerts] == [
        f"regression on {os.uname().nodename}: lost"
    ]
    alert = alerts[0]
    assert (alert["kind"], alert["state"], alert["run"]) == ("state", "lost", "regression")
    assert alert["step"] >= 5
    assert alert["dir"] == str(tmp_path / "run")
    assert (config / "environment").read_text().endswith(" error\n")


def pages(heard: Path) -> list[dict[str, Any]]:
    """What somebody was woken for, whole lines only; but not that the disk of this very machine is nearly full."""
    lines = heard.read_text().splitlines(keepends=True) if heard.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [page for page in found if not str(page.get("what")).startswith("disk-")]
