"""The job's store is cut off, blocks, or rank 0 dies in the middle of an agreement: all of a command or nothing."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from acting import act, anomaly, applied, events, status, trains_on
from jobs import TRAINCTL, job
from waiting import until

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]


def test_a_connection_of_rank_0_that_is_reset_when_all_are_staged_costs_nothing(tmp_path: Path) -> None:
    with job("faulty.py", 2, tmp_path, arguments_before=["cut-before-commit"]) as running:
        running.until_step(5)
        told = act(running, "set", "x", "7", "--if", "step >= 0")
        assert told["state"] == "applied"
        mine, other = applied(running)
        assert mine == other
        assert mine == [(told["id"], told["step"], 7)]
        assert act(running, "set", "x", "8")["state"] == "applied"
        trains_on(running)


def test_while_the_store_cannot_be_reached_commands_are_refused_with_the_reason_and_work_again_afterwards(
    tmp_path: Path,
) -> None:
    with job("faulty.py", 2, tmp_path, arguments_before=["cut-when-told"]) as running:
        running.until_step(5)
        (tmp_path / "cut").touch()
        until((tmp_path / "is-cut").exists, 20)
        refused = act(running, "set", "x", "7", code=4)
        assert refused["state"] == "rejected"
        assert "the job's store does not answer rank 0" in refused["reason"]
        assert "Nothing was changed" in refused["reason"]
        assert "Connection refused" in anomaly(running, "control", "error")["text"]
        until(lambda: "does not answer" in str(status(running)["capabilities"]["set"]), 20, what="a capability off")
        trains_on(running)
        (tmp_path / "cut").unlink()
        anomaly(running, "control", "good")
        until(lambda: status(running)["capabilities"]["set"] is True, 20, what="a capability on again")
        told = act(running, "set", "x", "8")
        assert applied(running) == [[(told["id"], told["step"], 8)]] * 2


def test_when_rank_0_dies_between_ready_and_go_no_rank_applies_and_nobody_is_told_otherwise(tmp_path: Path) -> None:
    with job("faulty.py", 2, tmp_path, arguments_before=["die-before-go"]) as running:
        running.until_step(5)
        told = act(running, "set", "x", "7", code=None)
        assert told["state"] == "unknown"
        assert running.wait(60) != 0
        assert applied(running) == [[], []]


def test_a_store_that_falls_silent_between_ready_and_the_verdict_stops_every_rank_with_nothing_applied(
    tmp_path: Path,
) -> None:
    with job("faulty.py", 2, tmp_path, arguments_before=["silent-store"]) as running:
        running.until_step(5)
        words = ["set", "x", "7", "--if", "step >= 0", "--timeout", "60s", "-r", str(running.directory)]
        operator = subprocess.Popen([*TRAINCTL, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        doubts = [tmp_path / f"doubt-{rank}" for rank in (0, 1)]
        try:
            until(lambda: all(path.exists() and path.read_text() for path in doubts), 60, what="both ranks stop")
        finally:
            os.kill(running.process.pid, signal.SIGCONT)
        assert all("resume from the last good checkpoint" in path.read_text() for path in doubts)
        assert running.wait(60) != 0
        output, _ = operator.communicate(timeout=60)
        assert "unknown" in output
        assert applied(running) == [[], []]


def test_a_store_that_blocks_is_told_and_rank_0_is_heard_of_all_the_while(tmp_path: Path) -> None:
    with job("steered.py", 2, tmp_path) as running:
        running.until_step(5)
        until(lambda: len(status(running)["ranks"]) == 2, 20, what="figures")
        os.kill(running.process.pid, signal.SIGSTOP)  # torchrun holds the store
        try:
            assert "control is unavailable" in anomaly(running, "store", "error")["text"]
            first = status(running)
            until(lambda: status(running)["step"] > first["step"] + 20, 20, what="rank 0 tells of its steps")
            assert first["state"] == status(running)["state"] == "running"
            assert not [line for line in events(running, "rank") if line["severity"] != "good"], "no rank is blamed"
            assert act(running, "set", "x", "3", code=4)["state"] == "rejected"
        finally:
            os.kill(running.process.pid, signal.SIGCONT)
        anomaly(running, "store", "good")
        until(lambda: status(running)["capabilities"]["set"] is True, 20, what="a capability on again")
        told = act(running, "set", "x", "4")
        assert applied(running) == [[(told["id"], told["step"], 4)]] * 2


def test_a_pause_whose_time_ends_while_the_store_blocks_ends_when_it_answers(tmp_path: Path) -> None:
    with job("steered.py", 2, tmp_path) as running:
        running.until_step(5)
        assert act(running, "pause", "--for", "2s")["after"] == "paused"
        os.kill(running.process.pid, signal.SIGSTOP)
        try:
            anomaly(running, "store", "error")
            held = status(running)
            assert held["state"] == "paused", "held, and not stalled"
        finally:
            os.kill(running.process.pid, signal.SIGCONT)
        until(lambda: running.step() > held["step"] + 3, 30, what="it resumed by itself")
        resumed = [line for line in events(running, "command") if line["id"].startswith("auto-resume")]
        assert [line["state"] for line in resumed if line["state"] != "scheduled"] == ["applied"], "asked for once"


def test_a_tunables_callback_that_raises_on_one_rank_leaves_the_value_on_all_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    with job("faulty.py", 2, tmp_path, arguments_before=["refuse-13"]) as running:
        running.until_step(5)
        act(running, "set", "x", "7")
        failed = act(running, "set", "x", "13", code=1)
        assert failed["state"] == "failed"
        assert "rank 1: on_change of x raised ValueError: an unlucky number. The value is as it was" in failed["reason"]
        assert [rank[-1][2] for rank in applied(running)] == [7, 7]
        assert [(tmp_path / f"changed-{rank}").read_text().split()[-1] for rank in (0, 1)] == ["7.0", "7.0"]
        trains_on(running)
        assert {line["x"] for line in (running.lines(0)[-1], running.lines(1)[-1])} == {7.0}
