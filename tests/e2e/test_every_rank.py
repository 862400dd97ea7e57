"""Real gloo ranks, of one to eight, starved, or paused for long: each did what was told, where it was told."""

from pathlib import Path

import pytest

from acting import act, agreed, applied, status, trains_on
from jobs import job
from waiting import until

pytestmark = pytest.mark.ranks
THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize(
    "ranks", [1, pytest.param(2, marks=THOROUGH), pytest.param(4, marks=THOROUGH), pytest.param(8, marks=THOROUGH)]
)
def test_every_ranks_own_record_is_what_the_operator_was_told(ranks: int, tmp_path: Path) -> None:
    with job("steered.py", ranks, tmp_path) as running:
        running.until_step(5, 120)
        words = ["set x 1", "set x 2 --if step>=0", "lr scale 0.5", "pause", "set x 3", "resume", "set x 4"]
        told = [agreed(running, *line.split()) for line in words]
        assert act(running, "set", "x", "9", "--if", "step<0", code=4)["state"] == "rejected"
        assert {outcome["ranks"] for outcome in told} == {ranks}
        records = applied(running)
        assert len(records) == ranks
        for record in records:
            assert record == [(outcome["id"], outcome["step"], outcome["after"]) for outcome in told]
        trains_on(running)


@pytest.mark.thorough
def test_a_rank_whose_control_thread_is_starved_delays_commands_and_splits_none(tmp_path: Path) -> None:
    with job("faulty.py", 2, tmp_path, arguments_before=["starve"]) as running:
        running.until_step(5)
        told = [agreed(running, "set", "x", str(value)) for value in range(1, 7)]
        told += [agreed(running, "set", "x", "7", "--if", "step>=0")]
        for record in applied(running):
            assert record == [(outcome["id"], outcome["step"], outcome["after"]) for outcome in told]


@pytest.mark.thorough
def test_a_pause_outlasts_the_timeouts_of_gloo_and_of_the_store_takes_commands_and_ends_by_itself(
    tmp_path: Path,
) -> None:
    timeout_s, pause_s = 5, 12
    with job("steered.py", 2, tmp_path, ["--timeout", str(timeout_s)]) as running:
        running.until_step(5)
        told = [agreed(running, "pause", "--for", f"{pause_s}s")]
        held = told[0]["step"]

        def still_held() -> bool:
            told.append(agreed(running, "set", "x", str(len(told))))
            return status(running)["state"] == "paused"

        until(lambda: not still_held(), 60, what="it resumes by itself")
        trains_on(running)
        assert [outcome["step"] for outcome in told[:-1]] == [held] * (len(told) - 1)
        mine, other = applied(running)
        assert mine == other
        assert [line for line in mine if line[0] in {outcome["id"] for outcome in told}] == [
            (outcome["id"], outcome["step"], outcome["after"]) for outcome in told
        ]
        # The line of a step is written behind its boundary.
        rows = [line for line in running.lines() if line["step"] in {held - 1, held}]
        assert rows[1]["time"] - rows[0]["time"] > 2 * timeout_s, "it was held for longer than either"
