"""A restart from a checkpoint of a branch that was left: charts and history stand on that branch again."""

from pathlib import Path

import pytest

from jobs import Job, job, trainctl_json
from waiting import until

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]

SLOWLY = ["--steps", "100000", "--sleep", "0.03", "--checkpoint-every", "10"]


def last_of(running: Job, incarnation: int) -> int:
    assert not running.ended(), running.log()
    return max((line["step"] for line in running.lines() if line["incarnation"] == incarnation), default=0)


def test_after_a_restart_from_an_abandoned_checkpoint_the_history_is_that_of_its_branch(tmp_path: Path) -> None:
    with job("regression.py", 1, tmp_path / "first", SLOWLY) as first:
        run = ["-r", str(first.directory)]

        def saved() -> dict[int, str]:
            listed = trainctl_json("checkpoint", "ls", *run)["checkpoints"]
            return {info["step"]: info["id"] for info in listed if info["where"] != "memory"}

        first.until_step(25)
        known = until(lambda: found if {10, 20} <= (found := saved()).keys() else None, 30, what="two checkpoints")
        trainctl_json("rollback", known[10], "--yes", *run)
        until(lambda: last_of(first, 2) > 25, 60, what="steps of the second branch")
    asked = {"TRAINCTL_RESUME": known[20], "TRAINCTL_RUN_DIR": str(first.directory)}
    with job("regression.py", 1, tmp_path / "again", SLOWLY, **asked) as second:
        until(lambda: last_of(second, 3) > 22, 60, what="steps of the restart")

        def shown() -> dict[int, int]:
            found = trainctl_json("history", "loss", "--from-step", "1", "--to-step", "22", *run)
            return {int(step): int(incarnation) for step, _, _, incarnation in found["loss"]}

        until(lambda: 22 in shown(), 20, what="the newest steps in the history")
        assert shown() == dict.fromkeys(range(1, 21), 1) | {21: 3, 22: 3}
