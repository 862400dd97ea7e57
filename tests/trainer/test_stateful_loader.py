"""torchdata's `StatefulDataLoader` as the loader of a run: put back to any place in the data, also with workers."""

import copy
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from trainctl.trainer.checkpoint.rng import capture_rng, restore_rng
from trainctl.trainer.feed import Feed

pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital.*")  # torchdata 0.11 at its first iterator

BATCHES = 5  # of an epoch


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 2 * BATCHES

    def __getitem__(self, index: int) -> int:
        return index


class Training:
    """Takes micro-batches and draws from torch's generator, as dropout does."""

    def __init__(self, workers: int) -> None:
        torch.manual_seed(5)
        loader: Any = StatefulDataLoader(Numbers(), batch_size=2, shuffle=True, num_workers=workers)
        self.feed = Feed(loader, capture_rng=capture_rng, restore_rng=restore_rng)

    def take(self, batches: int) -> list[tuple[int, list[int], float]]:
        return [(self.feed.index, self.feed.next().tolist(), float(torch.rand(1))) for _ in range(batches)]

    def save(self) -> tuple[Any, Any]:
        return copy.deepcopy((self.feed.state_dict(), capture_rng()))

    def restore(self, saved: tuple[Any, Any], skip: int = 0) -> None:
        state, rng = copy.deepcopy(saved)
        self.feed.load_state_dict(state)
        self.feed.reopen()
        restore_rng(rng)
        self.feed.skip(skip)
        restore_rng(rng)


@pytest.mark.parametrize(("seen", "workers"), [(2, 0), (BATCHES, 0), (2 * BATCHES - 1, 0), (2, 2)])
def test_it_goes_on_to_the_bit_after_a_rollback_twice_over_and_in_a_fresh_process_twice_over(
    seen: int, workers: int
) -> None:
    training = Training(workers)
    training.take(seen)
    saved = training.save()
    expected = training.take(2 * BATCHES + 1)  # over the end of an epoch, or two
    order = [number for _, batch, _ in expected for number in batch]
    assert len(set(order)) == 2 * BATCHES
    for _ in range(2):
        training.restore(saved)
        assert training.take(2 * BATCHES + 1) == expected

    fresh = Training(workers)
    fresh.restore(saved)
    assert fresh.take(3) == expected[:3]
    saved = fresh.save()
    again = Training(workers)
    again.restore(saved)
    assert again.take(3) == expected[3:6], "resumed from what was saved after a resume"


@pytest.mark.parametrize("skip", [1, 4])
def test_what_is_skipped_is_left_out_by_its_absolute_index(skip: int) -> None:
    training = Training(0)
    training.take(2)
    saved = training.save()
    expected = training.take(2 * BATCHES)
    training.restore(saved, skip=skip)
    found = training.take(3)
    assert [(index, batch) for index, batch, _ in found] == [
        (index, batch) for index, batch, _ in expected[skip : skip + 3]
    ]
