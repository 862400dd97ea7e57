"""A script's own checkpointer, and the life of its checkpoints: kept by a policy, rolled back to, deleted."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import Job, job, trainctl, trainctl_json
from trainctl.wire.manifest import read_manifest, verify
from waiting import until

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]


def listed(run: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = trainctl_json("checkpoint", "ls", *run)["checkpoints"]
    return found


def losses(running: Job, rank: int, incarnation: int) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in running.lines(rank) if line["incarnation"] == incarnation}


def refused(*words: str, code: int = 4) -> str:
    done = trainctl(*words, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_scripts_own_files_are_kept_by_policy_rolled_back_to_exactly_and_deleted(tmp_path: Path) -> None:
    with job("own_files.py", 2, tmp_path) as running:
        running.until_step(75)
        run = ["-r", str(running.directory)]
        held = trainctl_json("pause", *run)["step"]
        newest = held // 10 * 10

        def kept() -> bool:
            steps = [found["step"] for found in listed(run)]
            # The last two, the best by the script's own metric and mode, and each twentieth.
            wanted = {*range(20, newest + 1, 20), 30, newest, newest - 10}
            return set(steps) == wanted

        until(kept, 20, what="the policy's checkpoints, and no other")
        best = trainctl_json("rollback", "best", "--dry-run", *run)
        assert best["to_step"] == 30
        assert {event["by"] for event in _removals(run)} == {"retention"}

        target = next(found for found in listed(run) if found["step"] == 60)
        files = {file.name for file in read_manifest(running.directory / "checkpoints" / target["id"]).files}
        assert {"script/parts/0.pt", "script/parts/1.pt", "rank-00000.pt", "rank-00001.pt"} <= files
        done = trainctl_json("rollback", "60", "--yes", *run)
        assert (done["state"], done["after"], done["ranks"]) == ("applied", 60, 2)
        trainctl_json("resume", *run)
        until(lambda: (losses(running, 1, 2) or {0: 0.0}).keys() >= {held}, 30, what="step held again")
        for rank in (0, 1):
            before, after = losses(running, rank, 1), losses(running, rank, 2)
            again = {step: loss for step, loss in after.items() if step in before}
            assert min(again) == 61
            assert again == {step: before[step] for step in again}, "to the bit, dropout and shuffling included"

        held = trainctl_json("pause", *run)["step"]
        until(lambda: listed(run)[-1]["step"] == held // 10 * 10, 20, what="the save that was under way")
        by_step = {found["step"]: found for found in listed(run)}
        assert "last good" in refused("checkpoint", "rm", "last", "--yes", *run)
        trainctl("checkpoint", "pin", by_step[20]["id"], *run)
        assert "pinned" in refused("checkpoint", "rm", "20", "--yes", *run)
        assert "asks first" in refused("checkpoint", "rm", "40", *run, code=2)
        gone = trainctl_json("checkpoint", "rm", "40", "--yes", *run)
        assert (gone["state"], gone["command"]) == ("applied", "checkpoint rm")
        assert 40 not in {found["step"] for found in listed(run)}
        assert not (running.directory / "checkpoints" / by_step[40]["id"]).exists()
        audit = (running.directory / "audit.jsonl").read_text()
        assert [json.loads(line)["state"] for line in audit.splitlines() if gone["id"] in line] == [
            "accepted",
            "applied",
        ]
        assert "script's own save=" in refused("checkpoint", "export", "60", str(tmp_path / "x"), *run)
        able = trainctl_json("status", *run)["capabilities"]
        assert able["checkpoint rm"] is able["checkpoint verify"] is able["checkpoint export"] is True
        _a_load_that_raises_ends_the_job_and_the_last_good_checkpoint_stands(running, run)


def _removals(run: list[str]) -> list[dict[str, Any]]:
    lines = trainctl("log", "--json", "--kind", "checkpoint", "-n", "500", *run).stdout.splitlines()
    return [line for line in map(json.loads, lines) if "by" in line]


def _a_load_that_raises_ends_the_job_and_the_last_good_checkpoint_stands(running: Job, run: list[str]) -> None:
    (running.output / "break").touch()
    told = trainctl("rollback", "last", "--yes", *run, check=False)
    assert told.returncode in {1, 6}, told.stdout
    assert running.wait(60) != 0
    assert "the script cannot load today" in running.log()
    checkpoints = running.directory / "checkpoints"
    whole = [path for path in checkpoints.iterdir() if path.is_dir() and not path.name.startswith(".")]
    assert whole
    assert all(verify(path).world_size == 2 for path in whole)
