"""A rollback is exact: from the checkpoint on, the same losses to the bit as if the run had never left."""

from pathlib import Path

import pytest

from jobs import job, trainctl_json

pytestmark = pytest.mark.ranks

STEPS = "160"  # so that the run is far from its end when the pause arrives on a busy machine


def losses(lines: list[dict[str, object]], incarnation: int) -> dict[object, object]:
    return {line["step"]: line["loss"] for line in lines if line["incarnation"] == incarnation}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_trained_to_40_rolled_back_to_20_and_trained_on_is_as_never_having_left(ranks: int, tmp_path: Path) -> None:
    with job("regression.py", ranks, tmp_path / "straight", ["--steps", STEPS]) as straight:
        assert straight.wait(120) == 0, straight.log()
        never_left = [losses(straight.lines(rank), 1) for rank in range(ranks)]

    with job("regression.py", ranks, tmp_path / "rolled", ["--steps", STEPS, "--sleep", "0.03"]) as rolled:
        rolled.until_step(40)
        run = ["-r", str(rolled.directory)]
        held = trainctl_json("pause", *run)["step"]
        done = trainctl_json("rollback", "20", "--yes", *run)
        assert (done["state"], done["before"], done["after"], done["ranks"]) == ("applied", held, 20, ranks)
        assert done["incarnation"] == 2
        trainctl_json("resume", *run)
        assert rolled.wait(120) == 0, rolled.log()
        for rank in range(ranks):
            first, second = (losses(rolled.lines(rank), incarnation) for incarnation in (1, 2))
            assert min(second) == 21
            assert max(second) == int(STEPS)
            assert len(first.keys() & second.keys()) >= 20, "steps 21 to 40 were trained twice"
            assert {step: first[step] for step in first.keys() & second.keys()} == {
                step: second[step] for step in first.keys() & second.keys()
            }
            assert first | second == never_left[rank]
