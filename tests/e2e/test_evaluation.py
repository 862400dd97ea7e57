"""An evaluation is no time in which nobody can act: between two of its batches a run is paused, steered and stopped."""

import json
from pathlib import Path
from typing import Any

import pytest

from acting import act, events, status, trains_on
from jobs import Job, job, trainctl, trainctl_json
from waiting import until

pytestmark = pytest.mark.ranks


def evaluated(running: Job, rank: int, step: int) -> list[int]:
    """The batches that a rank has evaluated behind a step."""
    path = running.output / f"eval-{rank}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line["batch"] for line in lines if line["step"] == step]


def test_a_run_is_paused_steered_and_stopped_between_two_batches_of_an_evaluation(tmp_path: Path) -> None:
    with job("steered.py", 2, tmp_path, ["--long-evaluation", "--eval-every", "10", "--sleep", "0.02"]) as running:
        running.until_step(1)
        run = ["-r", str(running.directory)]

        def act(*words: str, code: int = 0) -> dict[str, Any]:
            done = trainctl(*words, *run, "--json", check=False)
            assert done.returncode == code, done.stdout + done.stderr
            return dict(json.loads(done.stdout))

        until(lambda: trainctl_json("status", *run)["state"] == "evaluating", 30, what="an evaluation")
        paused = act("pause")
        step = paused["step"]
        assert (paused["state"], paused["after"], paused["ranks"], step % 10) == ("applied", "paused", 2, 0)
        held = [evaluated(running, rank, step) for rank in (0, 1)]
        assert held[0] == held[1], "all ranks stand behind the same batch"
        assert held[0]
        assert act("set", "x", "7")["step"] == step, "commands work while paused, here too"
        refused = act("checkpoint", "save", code=4)
        assert f"paused inside an evaluation, after {len(held[0])} of its batches" in refused["reason"]
        assert [evaluated(running, rank, step) for rank in (0, 1)] == held

        assert act("resume")["state"] == "applied"
        until(lambda: len(evaluated(running, 1, step)) > len(held[1]), 20, what="the next batch")
        enough = tmp_path / "enough"
        enough.touch()
        running.until_step(step + 1)
        enough.unlink()
        seen = sum(len(evaluated(running, rank, step)) for rank in (0, 1))
        until(lambda: trainctl_json("history", "val_loss", *run)["val_loss"], 20, what="the evaluation's outcome")
        assert trainctl_json("history", "val_loss", *run)["val_loss"][-1][:3:2] == [step, seen]

        until(lambda: trainctl_json("status", *run)["state"] == "evaluating", 30, what="the next evaluation")
        stopped = act("stop", "--yes")
        assert stopped["state"] == "applied"
        assert running.wait(60) == 0, running.log()
        last = [evaluated(running, rank, stopped["step"]) for rank in (0, 1)]
        assert last[0] == last[1]
        values = trainctl_json("history", "val_loss", *run)["val_loss"]
        assert values[-1][0] == step, "what a part of the batches gave is no val_loss"
        (saved,) = trainctl_json("checkpoint", "ls", *run)["checkpoints"]
        assert saved["step"] == stopped["step"], "saved when the evaluation was over"


@pytest.mark.thorough
def test_an_evaluation_that_was_asked_for_lets_others_act_meanwhile(tmp_path: Path) -> None:
    with job("steered.py", 2, tmp_path, ["--long-evaluation", "--sleep", "0.02"]) as running:
        running.until_step(5)
        run = ["-r", str(running.directory)]
        held = trainctl_json("pause", *run)["step"]
        asked = trainctl("eval", *run, "--command-id", "look", "--timeout", "0.1s", "--json", check=False)
        assert json.loads(asked.stdout)["state"] == "unknown", "it takes seconds"
        until(lambda: trainctl_json("status", *run)["state"] == "evaluating", 30, what="the evaluation")
        within = trainctl_json("set", "x", "3", *run)
        assert (within["state"], within["step"]) == ("applied", held)
        assert trainctl_json("status", *run)["state"] == "evaluating"
        (tmp_path / "enough").touch()
        done = trainctl_json("eval", *run, "--command-id", "look")
        assert (done["state"], done["step"]) == ("applied", held)
        assert trainctl_json("status", *run)["state"] == "paused", "as it was before"
        trainctl_json("resume", *run)
        running.until_step(held + 3)


@pytest.mark.thorough
def test_where_rank_0_evaluates_for_all_a_command_is_for_the_next_step_and_so_is_what_comes_behind_it(
    tmp_path: Path,
) -> None:
    options = ["--long-evaluation", "--rank-0-evaluates", "--eval-every", "40", "--sleep", "0.02"]
    with job("steered.py", 2, tmp_path, options) as running:
        running.until_step(1)
        run = ["-r", str(running.directory)]
        until(lambda: status(running)["state"] == "evaluating", 30, what="an evaluation")
        step = status(running)["step"]
        sent = trainctl("set", "x", "5", *run, "--command-id", "x5", "--timeout", "0.1s", "--json", check=False)
        assert json.loads(sent.stdout)["state"] == "unknown", "rank 1 is behind its part"
        assert not (tmp_path / "eval-1.jsonl").exists()
        (tmp_path / "enough").touch()
        done = trainctl_json("set", "x", "5", *run, "--command-id", "x5")
        assert done["state"] == "applied"
        assert done["step"] > step
        assert act(running, "pause")["state"] == "applied", "what comes behind it works"
        assert act(running, "resume")["state"] == "applied"
        trains_on(running)


@pytest.mark.parametrize(
    ("ranks", "raising", "words"),
    [
        pytest.param(1, "0", "on_eval raised ValueError: a bad batch on rank 0", marks=pytest.mark.thorough),
        (2, "1", "rank 1: on_eval raised ValueError: a bad batch on rank 1"),
        pytest.param(2, "01", "rank 0: on_eval raised ValueError: a bad batch on rank 0", marks=pytest.mark.thorough),
    ],
)
def test_an_evaluation_that_raises_when_it_is_asked_for_costs_itself_and_not_the_job(
    ranks: int, raising: str, words: str, tmp_path: Path
) -> None:
    with job("faulty.py", ranks, tmp_path, arguments_before=["eval-raises", raising]) as running:
        running.until_step(5)
        failed = act(running, "eval", code=1)
        assert (failed["state"], failed["reason"]) == ("failed", words)
        trains_on(running)
        assert not (tmp_path / "trains-in-eval-mode").exists()
        assert act(running, "set", "x", "3")["state"] == "applied", "what comes behind it works"
        paused = act(running, "pause")["step"]
        assert act(running, "eval", code=1)["reason"] == words
        held = status(running)
        assert (held["state"], held["step"]) == ("paused", paused), "held where it was"
        assert act(running, "resume")["state"] == "applied"
        trains_on(running)


@pytest.mark.thorough
def test_where_a_rank_raises_before_a_collective_that_others_wait_in_the_job_ends_with_the_reason(
    tmp_path: Path,
) -> None:
    with job("faulty.py", 2, tmp_path, arguments_before=["eval-splits"]) as running:
        running.until_step(5)
        failed = act(running, "eval", code=None)
        assert running.wait(60) != 0
        assert "ValueError: a bad batch on rank 1" in running.log()
        told = [line for line in events(running, "command") if line["id"] == failed["id"]]
        assert told[-1]["state"] in {"failed", "unknown"}, "the operator hears of it while there is time"
        if told[-1]["state"] == "failed":
            assert "rank 1: on_eval raised ValueError" in told[-1]["reason"]
            assert "have not made the same collectives" in told[-1]["reason"]
