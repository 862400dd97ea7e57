"""Rolling back to what the ranks have in memory, as an operator sees it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs import Job, job, trainctl, trainctl_json

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]


def losses(running: Job, rank: int, incarnation: int) -> dict[int, str]:
    return {line["step"]: line["loss"] for line in running.lines(rank) if line["incarnation"] == incarnation}


def test_what_is_gone_from_disk_is_listed_and_restored_from_memory_exactly(tmp_path: Path) -> None:
    given = ["--steps", "100000", "--sleep", "0.03", "--checkpoint-every", "10"]
    with job("regression.py", 2, tmp_path, given) as running:
        run = ["-r", str(running.directory)]

        def listed() -> dict[int, Any]:
            return {found["step"]: found for found in trainctl_json("checkpoint", "ls", *run)["checkpoints"]}

        running.until_step(45)
        held = trainctl_json("pause", *run)["step"]
        found = listed()
        in_memory = [step for step in found if found[step]["where"] == "both"]
        assert in_memory == sorted(found)[-3:], "the newest three"
        assert found[10]["where"] == "disk"
        ranks = trainctl_json("status", *run)["ranks"]
        assert all(rank["checkpoint_memory_bytes"] > 0 for rank in ranks)

        assert f"in memory: steps {', '.join(map(str, in_memory))};" in trainctl("status", *run).stdout

        target = in_memory[0]
        shutil.rmtree(running.directory / "checkpoints" / found[target]["id"])
        assert listed()[target]["where"] == "memory"
        assert trainctl("checkpoint", "pin", str(target), *run, check=False).returncode == 4, "there is nothing to pin"
        back = trainctl_json("rollback", str(target), "--yes", *run)
        assert (back["state"], back["after"], back["ranks"]) == ("applied", target, 2)
        assert "from memory" in trainctl("log", "--kind", "rollback", *run).stdout
        trainctl_json("resume", *run)
        running.until_step(held)
        for rank in range(2):
            first, second = losses(running, rank, 1), losses(running, rank, 2)
            again = [step for step in first if step > target and step in second]
            assert again
            assert {step: second[step] for step in again} == {step: first[step] for step in again}
        trainctl_json("stop", "--yes", *run)
        assert running.wait(60) == 0, running.log()
        assert all(info["where"] == "disk" for info in listed().values()), "memory ended with the ranks"
