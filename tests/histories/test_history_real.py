"""Some dozens of real histories: ranks under torchrun, killed, stopped and started again, hubs killed, a line cut.

`make soak` plays many more, from other seeds.
"""

from pathlib import Path

import pytest
from real_history import run_job
from restarted_history import run_restarted

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(240)]


@pytest.mark.parametrize(
    ("ranks", "seed", "episodes", "kill"),
    [
        pytest.param(2, 11, 16, False, marks=pytest.mark.thorough),
        pytest.param(4, 13, 10, False, marks=pytest.mark.thorough),
        (2, 17, 1, True),
        pytest.param(2, 18, 1, True, marks=pytest.mark.thorough),
    ],
)
def test_what_ranks_audit_and_operators_say_agrees(
    ranks: int, seed: int, episodes: int, kill: bool, tmp_path: Path
) -> None:
    print(f"real history, seed {seed}")
    found = run_job(seed, ranks, tmp_path, episodes, kill=kill)
    assert not found, "\n".join(found)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [21, 22])
def test_a_rank_that_is_cut_from_the_store_now_and_then_does_nothing_alone(seed: int, tmp_path: Path) -> None:
    """Its line blocks for up to seconds and does not fail, as where the network between two nodes is gone."""
    print(f"real history, seed {seed}")
    found = run_job(seed, 2, tmp_path, 8, store_line=True)
    assert not found, "\n".join(found)


@pytest.mark.thorough
def test_a_run_whose_ranks_are_killed_restarted_and_aborted_amid_commands_stays_one_history(tmp_path: Path) -> None:
    """Under `trainctl run`: torchrun starts the ranks again, or an operator has them started, from any checkpoint."""
    print("real history, seed 31")
    found = run_restarted(31, 2, tmp_path)
    assert not found, "\n".join(found)
