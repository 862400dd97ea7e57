"""What goes wrong with a rank is named: which one, on which node, at which step, in which phase."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import Job, job, trainctl, trainctl_json
from waiting import until

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]
# A rendezvous that torchrun can hold again, with a store of its own for each attempt (pytorch 135712).
RESTARTED_ONCE = {
    "PET_MAX_RESTARTS": "1",
    "PET_RDZV_BACKEND": "c10d",
    "PET_RDZV_ENDPOINT": "127.0.0.1:0",
    "PET_LOCAL_ADDR": "127.0.0.1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def events(running: Job, kind: str) -> list[dict[str, Any]]:
    words = ["log", "-r", str(running.directory), "-n", "2000", "--kind", kind, "--json"]
    return [json.loads(line) for line in trainctl(*words, check=False).stdout.splitlines()]


def ranks(running: Job) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = trainctl_json("status", "-r", str(running.directory))["ranks"]
    return found


def told(running: Job, rank: int, state: str, timeout_s: float = 40.0) -> dict[str, Any]:
    """The first event that tells of a rank's state."""

    def find() -> dict[str, Any] | None:
        found = (line for line in events(running, "rank") if (line["rank"], line["state"]) == (rank, state))
        return next(found, None)

    event = until(find, timeout_s, what=f"rank {rank} is told to be {state}\n{running.log()}")
    assert event is not None
    return event


def watched(running: Job) -> list[int]:
    """The pids of all ranks, once figures and the agent's reading of each are there."""
    run = ["-r", str(running.directory)]
    until(lambda: (nodes := trainctl_json("status", *run)["nodes"]) and len(nodes[0]["processes"]) == 2, 30)
    until(lambda: all(rank["state"] == "running" for rank in ranks(running)), 30)
    return [rank["pid"] for rank in ranks(running)]


def test_a_killed_rank_is_named_at_once_and_torchruns_restart_is_the_same_run(tmp_path: Path) -> None:
    with job("collectives.py", 2, tmp_path / "out", **RESTARTED_ONCE) as running:
        running.until_step(12)
        run = ["-r", str(running.directory)]
        run_id = trainctl_json("status", *run)["id"]
        pids = watched(running)
        killed_at = time.time()
        os.kill(pids[1], signal.SIGKILL)
        event = told(running, 1, "dead")
        print(f"killed rank told after {event['time'] - killed_at:.2f} s")
        assert event["time"] - killed_at < 9.0, "by its end, not by its silence"
        assert f"pid {pids[1]} killed by SIGKILL" in event["text"]
        assert (event["node"], event["severity"]) == (os.uname().nodename, "error")
        assert event["step"] >= 12
        status = until(
            lambda: (found := trainctl_json("status", *run))["attempt"] == 2 and found["state"] == "running" and found,
            60,
            what="torchrun starts the next attempt",
        )
        assert status["id"] == run_id
        second = until(lambda: [line for line in running.lines() if line["attempt"] == 2], 20)
        assert second[0]["step"] > 5, "resumed, not begun anew"
        until(lambda: [rank["state"] for rank in ranks(running)] == ["running", "running"], 20)


def test_the_ranks_that_a_dead_one_leaves_of_a_paused_run_make_way_for_the_next_attempt(tmp_path: Path) -> None:
    with job("collectives.py", 2, tmp_path / "out", **RESTARTED_ONCE) as running:
        running.until_step(12)
        run = ["-r", str(running.directory)]
        pids = watched(running)
        trainctl_json("pause", *run)
        os.kill(pids[1], signal.SIGKILL)
        killed_at = time.monotonic()
        until(
            lambda: (found := trainctl_json("status", *run))["attempt"] == 2 and found["state"] == "running",
            60,
            what="torchrun starts the next attempt",
        )
        print(f"the next attempt runs {time.monotonic() - killed_at:.1f} s after a rank of a paused run was killed")
        assert "forcefully" not in running.log(), "torchrun's SIGTERM was taken for the machine's end"


def test_a_rank_that_raises_is_named_and_not_only_the_ones_that_lose_it(tmp_path: Path) -> None:
    with job("collectives.py", 2, tmp_path / "out") as running:
        running.until_step(12)
        watched(running)
        (tmp_path / "out" / "raise").touch()
        event = told(running, 1, "dead")
        assert "exited with 1" in event["text"]
        assert running.wait(60) != 0


def test_a_stopped_rank_is_named_with_its_step_and_phase_and_so_is_the_one_that_waits_for_it(tmp_path: Path) -> None:
    with job("collectives.py", 2, tmp_path / "out") as running:
        running.until_step(12)
        pids = watched(running)
        os.kill(pids[1], signal.SIGSTOP)
        stopped_at = time.time()
        stopped, waiting = told(running, 1, "stuck"), told(running, 0, "stuck")
        print(f"stopped rank told after {stopped['time'] - stopped_at:.1f} s, the waiting one "
              f"after {waiting['time'] - stopped_at:.1f} s")  # fmt: skip
        assert "nothing was heard of it for" in stopped["text"]
        assert "after step" in stopped["text"]
        for event in (stopped, waiting):  # by the hub's own clock, which a busy machine does not stretch
            assert int(re.findall(r"for (\d+) s", event["text"])[0]) <= 10
        assert "in backward for" in waiting["text"]
        assert {stopped["severity"], waiting["severity"]} == {"warning"}
        assert [rank["state"] for rank in ranks(running)] == ["stuck", "stuck"]
        os.kill(pids[1], signal.SIGCONT)
        goes_on = until(lambda: [line for line in events(running, "rank") if line["severity"] == "good"], 40)
        assert {line["rank"] for line in goes_on} <= {0, 1}, "its state is what it does then: training or a checkpoint"
        until(lambda: [rank["state"] for rank in ranks(running)] == ["running", "running"], 20)


def test_a_rank_that_hangs_in_a_first_step_which_the_other_has_behind_it_is_named(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "left-behind").touch()
    with job("collectives.py", 2, output) as running:
        running.until_step(1)
        done_at = time.time()
        event = told(running, 1, "stuck")
        print(f"a hang in the first step is told {event['time'] - done_at:.1f} s after the other rank ended its own")
        words = r"in communication for \d+ s, in its first step after step 0, and rank 0 is at step 1"
        assert re.search(words, event["text"])


def test_a_rank_that_hangs_between_two_batches_of_a_first_evaluation_is_named(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "alone-in-batch").touch()
    with job("collectives.py", 2, output, ["--eval-every", "10", "--batches", "20"]) as running:
        until((output / "evaluating").exists, 60)
        event = told(running, 1, "stuck")
        assert re.search(r"no batch for \d+ s after batch 4 of the evaluation at step 10, usually 0\.", event["text"])
        assert int(re.findall(r"for (\d+) s", event["text"])[0]) <= 10


def test_a_store_that_is_gone_is_told_and_training_goes_on(tmp_path: Path) -> None:
    with job("collectives.py", 2, tmp_path / "out") as running:
        running.until_step(12)
        pids = watched(running)
        try:
            running.process.kill()  # torchrun holds the store; its ranks live on
            anomaly = until(
                lambda: next((line for line in events(running, "anomaly") if line["what"] == "store"), None), 40
            )
            assert anomaly is not None
            assert "control is unavailable" in anomaly["text"]
            assert anomaly["severity"] == "error"
            before = running.step()
            until(lambda: running.step() > before + 5, 20, what="training goes on")
            assert not [line for line in events(running, "rank") if line["severity"] != "good"], "no rank is blamed"
            run = ["-r", str(running.directory)]
            assert trainctl_json("abort", "--now", "--yes", *run)["ranks"] == 2
        finally:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
