"""A rollback is as never having left, with everything at once: a GradScaler whose scale moves, fp16 autocast, dropout,
shuffling, loader workers, accumulation over the end of an epoch, an average of the weights and early stopping.

tests/scripts/exact.py writes for each step a hash of parameters, optimizer, scaler, tracked objects and generators.
"""

import json
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jobs import Job, job, trainctl, trainctl_json
from waiting import until

pytestmark = pytest.mark.ranks

Line = dict[str, Any]
STEPS = 40
MIDDLE, END, EARLIER = 20, 15, 10  # of an epoch, at the end of one, in the middle of the one before

_OF_ITS_OWN = frozenset({"incarnation", "data"})


def of_incarnation(running: Job, rank: int, incarnation: int) -> list[Line]:
    return [line for line in running.lines(rank) if line["incarnation"] == incarnation]


def until_in(running: Job, incarnation: int, step: int) -> None:
    """Wait until rank 0 has trained that far in an incarnation."""

    def there() -> bool:
        assert not running.ended(), running.log()
        return any(line["step"] >= step for line in of_incarnation(running, 0, incarnation))

    until(there, 90, what=f"step {step} of incarnation {incarnation}")
    until((running.directory / "run.json").exists, 30, what="the hub")


def roll_back(running: Job, to: int, *words: str) -> None:
    """To a checkpoint of the live branch, while it trains."""
    run = ["-r", str(running.directory)]

    def saved() -> bool:
        found = trainctl_json("checkpoint", "ls", *run)["checkpoints"]
        return any(info["step"] == to and not info["abandoned"] for info in found)

    until(saved, 60, what=f"the checkpoint of step {to} of the live branch")
    done = trainctl_json("rollback", str(to), *words, "--yes", *run)
    assert (done["state"], done["after"], done["ranks"]) == ("applied", to, running.ranks), done


def fail_to_roll_back(running: Job, to: int, *words: str) -> str:
    """The reason."""
    told = trainctl("rollback", str(to), *words, "--yes", "--json", "-r", str(running.directory), check=False)
    done = json.loads(told.stdout)
    assert (told.returncode, done["state"]) == (1, "failed"), done
    return str(done["reason"])


def trained(running: Job) -> list[dict[int, Line]]:
    """Of each rank the lines of a run that nobody disturbed, by step; and that it went through what it should."""
    assert running.wait(120) == 0, running.log()
    straight = [{line["step"]: line for line in running.lines(rank)} for rank in range(running.ranks)]
    scales = [straight[0][step]["scale"] for step in range(1, STEPS + 1)]
    moves = {after > before for before, after in pairwise(scales) if after != before}
    assert moves == {True, False}, "the scale grows and falls"
    for rank in range(running.ranks):
        epoch = [index for step in range(1, 9) for index in straight[rank][step]["indices"]][:60]
        assert len(set(epoch)) == 60
        assert epoch != sorted(epoch), "it is shuffled"
    return straight


def assert_same(
    running: Job, straight: list[dict[int, Line]], begins: dict[int, int], skipping: Collection[int] = ()
) -> None:
    """Every step of every rank is as it was `straight`, if that went so far, but in incarnations that are `skipping`
    data; `begins` are the first steps of all."""
    for rank in range(running.ranks):
        firsts: dict[int, int] = {}
        for line in running.lines(rank):
            firsts.setdefault(line["incarnation"], line["step"])
            expected = {} if line["incarnation"] in skipping else straight[rank].get(line["step"], {})
            differing = [name for name in expected if name not in _OF_ITS_OWN and line[name] != expected[name]]
            assert not differing, (rank, line["incarnation"], line["step"], differing)
        assert firsts == begins


@pytest.mark.thorough
def test_on_two_ranks_rollbacks_are_exact_and_leave_out_exactly_the_micro_batches_that_were_asked_for(
    tmp_path: Path,
) -> None:
    far, epochs = 27, 40
    slowly = ["--steps", "100000", "--sleep", "0.03", "--readable", str(epochs)]
    with job("exact.py", 2, tmp_path, slowly) as running:
        until_in(running, 1, MIDDLE + 1)
        # One rank cannot read what is to be skipped: the steps after that are the same as those of incarnation 3.
        reason = fail_to_roll_back(running, MIDDLE, "--skip-batches", str(15 * epochs))
        assert f"epoch {epochs} is not there" in reason
        assert "rank 1" in reason
        failed_at = running.lines(0)[-1]["step"]
        until_in(running, 1, max(far, failed_at + 3))
        # After which step each incarnation begins, and with which micro-batch: two make a step, 15 an epoch.
        begins = {1: (0, 0)}
        incarnation = 2  # would have been that of the rollback that failed
        for to, skip, index in [
            (MIDDLE, 0, 40),
            (END, 0, 30),
            (END, 1, 31),  # from the end of an epoch
            (EARLIER, 3, 23),  # in the middle of one; what was left out before is there again
            (EARLIER, 13, 33),  # over the end of one
            (END, 1, 33 + 10 + 1),  # that branch's own step 15 had read up to 33 + 10
        ]:
            roll_back(running, to, "--skip-batches", str(skip))
            incarnation += 1
            begins[incarnation] = (to, index)
            until_in(running, incarnation, failed_at + 3 if incarnation == 3 else to + 6)
        first = [{line["step"]: line for line in of_incarnation(running, rank, 1)} for rank in range(2)]
        assert_same(running, first, {number: step + 1 for number, (step, _) in begins.items()}, skipping={5, 6, 7, 8})
        for rank in range(2):
            order = [index for line in first[rank].values() for index in line["indices"]]
            assert len(order) >= 8 * far
            for incarnation, (_, index) in begins.items():
                lines = of_incarnation(running, rank, incarnation)
                read = [one for line in lines for one in line["indices"]]
                known = order[4 * index :]  # four samples to a micro-batch
                assert len(known) > 20
                assert read[: len(known)] == known[: len(read)], (rank, incarnation)
                for at, line in enumerate(lines[:-1]):
                    assert line["data"] == [index + 2 * at, index + 2 * at + 1], "indices stay absolute"


@pytest.mark.timeout(400)  # three starts of four ranks with eight workers
@pytest.mark.parametrize(
    "order",
    [
        pytest.param([], marks=pytest.mark.thorough, id="by a sampler"),
        pytest.param(["--drawn"], marks=pytest.mark.exhaustive, id="drawn"),
    ],
)
def test_rollbacks_before_and_after_a_resume_on_four_ranks(order: list[str], tmp_path: Path) -> None:
    with job("exact.py", 4, tmp_path / "straight", ["--steps", str(STEPS), *order]) as running:
        straight = trained(running)
    slowly = ["--steps", "100000", "--sleep", "0.1", *order]
    with job("exact.py", 4, tmp_path / "rolled", slowly) as running:
        until_in(running, 1, MIDDLE + 3)
        roll_back(running, MIDDLE)
        until_in(running, 2, MIDDLE + 3)
        roll_back(running, END)
        until_in(running, 3, END + 2)
        directory = running.directory
    assert_same(running, straight, {1: 1, 2: MIDDLE + 1, 3: END + 1})  # and then all of it was killed
    again = {"TRAINCTL_RESUME": "1", "TRAINCTL_RUN_DIR": str(directory)}
    with job("exact.py", 4, tmp_path / "resumed", slowly, **again) as running:
        running.directory = directory
        until_in(running, 4, END + 3)
        roll_back(running, EARLIER)
        until_in(running, 5, MIDDLE + 1)
        roll_back(running, END)
        until_in(running, 6, STEPS)
        roll_back(running, END, "--skip-batches", "1")  # the next epoch begins among what is skipped
        until_in(running, 7, END + 6)
        resumed = of_incarnation(running, 0, 4)[0]["step"]
        assert resumed > END, "on the live branch"
        assert (resumed - 1) % 5 == 0
        assert_same(running, straight, {4: resumed, 5: EARLIER + 1, 6: END + 1, 7: END + 1}, skipping={7})
        for rank in range(4):
            order = [index for line in straight[rank].values() for index in line["indices"]]
            read = [index for line in of_incarnation(running, rank, 7) for index in line["indices"]]
            assert read[:48] == order[4 * 31 :][:48]
