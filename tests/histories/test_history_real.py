"""Some dozens of real histories: ranks under torchrun, hubs killed, ranks and hubs stopped, a line that is cut.

`make soak` plays many more, from other seeds.
"""

from pathlib import Path

import pytest
from real_history import run_job

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(240)]


@pytest.mark.parametrize(("ranks", "seed", "episodes"), [(2, 11, 16), (4, 13, 10)])
def test_what_ranks_audit_and_operators_say_agrees(ranks: int, seed: int, episodes: int, tmp_path: Path) -> None:
    found = run_job(seed, ranks, tmp_path, episodes)
    assert not found, "\n".join(found)
