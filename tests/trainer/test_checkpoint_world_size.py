"""A checkpoint of 2 ranks is read by 1, 2 and 4, and what cannot be as it was is said."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from trainctl.trainer.checkpoint.resized import not_exact
from trainctl.trainer.checkpoint.rng import capture_rng, restore_rng
from trainctl.trainer.feed import Feed, among

WORKER = Path(__file__).with_name("world_size_ranks.py")


@pytest.mark.ranks
@pytest.mark.thorough
def test_two_ranks_write_and_one_two_and_four_read_the_same_tensors_to_the_bit(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path), str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        told = [process.communicate(timeout=150) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * 4, "\n".join(error[-3000:] for _, error in told)
    assert all("all fine" in output for output, _ in told)


@pytest.mark.parametrize(
    ("count", "before", "now", "place", "exact"),
    [(9, 2, 1, 18, True), (9, 2, 2, 9, True), (9, 2, 4, 4, False), (8, 2, 4, 4, True), (7, 3, 2, 10, False)],
)
def test_what_all_ranks_saw_is_divided_among_those_of_now_and_nothing_is_left_out(
    count: int, before: int, now: int, place: int, exact: bool
) -> None:
    assert among(count, before, now) == (place, exact)
    assert 0 <= count * before - place * now < now


def test_a_checkpoint_says_how_much_is_seen_again() -> None:
    (_, data, step) = not_exact(before=2, now=4, loader={"index": 9})
    assert data.startswith(
        "the data goes on at micro-batch 4 of each of 4 ranks, after 9 of each of 2 ranks: 2 of all 18"
    )
    assert "seen again" not in not_exact(before=2, now=1, loader={"index": 9})[1]
    assert "a step is made of 4 micro-batches for 2 before" in step
    assert len(not_exact(before=2, now=1, loader=None)) == 1, "a script that owns its data is told nothing of it"


class Keeping:
    """A loader with a state of its own, as torchdata's; `loaded` is what it was given back."""

    def __init__(self) -> None:
        self.loaded: list[Any] = []

    def __iter__(self) -> Any:
        return iter(range(6))

    def state_dict(self) -> dict[str, Any]:
        return {"number": 4}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded.append(state)


def feed(loader: Any, world_size: int) -> Feed:
    return Feed(loader, capture_rng=capture_rng, restore_rng=restore_rng, world_size=world_size)


def test_a_loaders_own_state_is_of_no_use_to_another_number_of_ranks_so_the_epoch_is_replayed() -> None:
    source = feed(Keeping(), 2)
    for _ in range(4):
        source.next()
    alike, fewer = Keeping(), Keeping()
    for loader, ranks, index in ((alike, 2, 4), (fewer, 4, 2)):
        again = feed(loader, ranks)
        again.load_state_dict(source.state_dict())
        again.reopen()
        assert again.index == index
    assert (alike.loaded, fewer.loaded) == ([{"number": 4}], [])
    assert again.next() == 2


def test_an_epoch_that_became_shorter_goes_on_to_the_next_from_its_beginning() -> None:
    """Nine samples make five micro-batches for each of two ranks, for a sampler repeats one, and nine for one."""
    before = feed(DataLoader(torch.arange(5)), 2)  # type: ignore[arg-type]
    for _ in range(5):
        before.next()
    now = feed(DataLoader(torch.arange(9)), 1)  # type: ignore[arg-type]
    now.load_state_dict(before.state_dict())
    now.reopen()
    assert now.index == 10
    assert (now.next().item(), now.epoch, now.index) == (0, 1, 11)
