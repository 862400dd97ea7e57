"""What an operator sets in a live run: listed, alike on every rank, kept over restarts and rollbacks, counted down."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import Job, job, trainctl, trainctl_json
from waiting import until

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]

SLOWLY = ["--steps", "100000", "--sleep", "0.03"]


def acting(running: Job) -> Callable[..., dict[str, Any]]:
    def act(*words: str) -> dict[str, Any]:
        done: dict[str, Any] = trainctl_json(*words, "-r", str(running.directory))
        assert done["state"] == "applied", done
        return done

    return act


def status(running: Job) -> dict[str, Any]:
    found: dict[str, Any] = trainctl_json("status", "-r", str(running.directory))
    return found


def test_the_newest_settings_of_operators_survive_a_crash_and_the_checkpoints_come_back_when_asked(
    tmp_path: Path,
) -> None:
    with job("regression.py", 2, tmp_path, SLOWLY) as first:
        first.until_step(22)  # there is a checkpoint of step 20
        run, act = ["-r", str(first.directory)], acting(first)
        listed = {tunable["name"]: tunable for tunable in trainctl_json("tunables", *run)["tunables"]}
        assert listed.keys() >= {"clip", "eval_every", "checkpoint_every", "weight_decay", "beta1", "beta2"}
        assert (listed["beta1"]["value"], listed["beta1"]["kind"], listed["beta1"]["maximum"]) == (0.9, "float", 1.0)
        assert (listed["checkpoint_every"]["minimum"], listed["checkpoint_every"]["unit"]) == (0, "steps")

        decay = act("set", "weight_decay", "0.05")
        assert (decay["before"], decay["after"]) == (0.01, 0.05)
        assert trainctl_json("get", "weight_decay", *run)["value"] == 0.05
        assert act("set", "beta2", "0.95")["before"] == 0.999
        assert act("set", "beta2", "release")["after"] == 0.999
        refused = trainctl("set", "clip", "0.5", "--group", "1", *run, check=False)
        assert (refused.returncode, "no field of an optimizer" in refused.stdout) == (4, True)
        act("set", "clip", "0.5")
        act("set", "checkpoint_every", "0")
        trial = act("lr", "scale", "0.5", "--revert-after", "100000", "--unless", "loss < 0", "--command-id", "trial")
        assert trial["reason"] == f"on trial, undone at step {trial['step'] + 100000} unless loss < 0"
        left = status(first)
        assert left["overrides"] == {
            "lr": "× 0.5", "weight_decay": "= 0.05", "clip": "= 0.5", "checkpoint_every": "= 0"
        }  # fmt: skip
        assert 0 < left["revert_in"]["trial"] <= 100000
        assert "a change on trial: undone in " in trainctl("status", *run).stdout

    again_at = tmp_path / "again"
    with job(
        "regression.py", 2, again_at, SLOWLY, TRAINCTL_RESUME="1", TRAINCTL_RUN_DIR=str(first.directory)
    ) as second:
        second.directory = first.directory
        until(lambda: len(second.lines()) > 5, 60, what="steps of the second attempt")
        again = until(lambda: status(second) if status(second)["overrides"] else None, 20, what="its rank 0's word")
        assert again["attempt"] == 2
        assert again["overrides"] == left["overrides"], "what was set after the checkpoint is not lost with its steps"
        assert again["lr"]["effective"] == pytest.approx(again["lr"]["scheduled"] / 2)
        assert second.lines()[0]["clip"] == 0.5
        resumed = int(second.lines()[0]["step"]) - 1
        assert resumed < trial["step"]
        kept = json.loads((second.directory / "overrides.json").read_text())
        assert kept["trials"][0][2] == resumed, "its trial begins anew where the run does"
        assert 0 <= resumed + 100000 - again["revert_in"]["trial"] <= again["step"]

        run, act = ["-r", str(second.directory)], acting(second)
        stays = trainctl("rollback", "20", "--dry-run", *run).stdout
        assert "what operators have set stays: checkpoint_every = 0, clip = 0.5, lr × 0.5, weight_decay = 0.05" in stays
        goes = trainctl("rollback", "20", "--dry-run", "--restore-overrides", *run).stdout
        assert "what operators had set then comes back, and this goes: checkpoint_every = 0" in goes
        back = act("rollback", "20", "--restore-overrides", "--yes")
        after = until(lambda: status(second) if not status(second)["overrides"].get("lr") else None, 20)
        assert after["revert_in"] == {}
        assert after["incarnation"] == back["incarnation"]
        assert trainctl_json("get", "weight_decay", *run)["value"] == 0.01
        assert trainctl_json("get", "clip", *run)["value"] == 1.0
        act("stop", "--yes")
        assert second.wait(60) == 0, second.log()


def test_a_change_on_trial_ends_at_its_step_on_every_rank_whether_undone_or_kept(tmp_path: Path) -> None:
    with job("regression.py", 2, tmp_path, SLOWLY) as running:
        running.until_step(25)
        run, act = ["-r", str(running.directory)], acting(running)
        undone = act("set", "clip", "0.9", "--revert-after", "20", "--command-id", "u")
        kept = act("lr", "scale", "0.5", "--revert-after", "20", "--unless", "loss < 1e9", "--command-id", "k")
        until(lambda: running.step(1) > kept["step"] + 30, 30)
        for rank in (0, 1):
            clips = {line["step"]: line["clip"] for line in running.lines(rank)}
            changed = [step for step in sorted(clips) if clips[step] == 0.9]
            assert (changed[0], changed[-1]) == (undone["step"], undone["step"] + 19), "twenty steps, to the step"
        said = trainctl("log", *run).stdout
        assert "loss < 1e9 holds: the change of command k stays" in said
        now = status(running)
        assert (now["overrides"], now["revert_in"]) == ({"lr": "× 0.5"}, {})
        assert trainctl("audit", "--verify", *run).returncode == 0
