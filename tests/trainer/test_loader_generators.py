"""Generators that a loader was given go on from epoch to epoch: a rollback and a restart bring them back, too."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from trainctl.trainer.checkpoint import Loaded
from trainctl.trainer.checkpoint.rng import capture_rng, restore_rng
from trainctl.trainer.checkpoint.tree import encode, keep_inline
from trainctl.trainer.data_place import move_data, open_data
from trainctl.trainer.feed import Feed

pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital.*")  # torchdata 0.11 at its first iterator

BATCHES = 5  # of an epoch
DATA: Any = list(range(2 * BATCHES))


def by_torchs_recipe(**given: Any) -> Any:
    return DataLoader(DATA, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(9), **given)


def by_a_sampler() -> Any:
    sampler = WeightedRandomSampler([1.0] * len(DATA), len(DATA), generator=torch.Generator().manual_seed(9))
    return DataLoader(DATA, batch_size=2, sampler=sampler)


def by_a_batch_sampler() -> Any:
    sampler = RandomSampler(DATA, replacement=True, generator=torch.Generator().manual_seed(9))
    return DataLoader(DATA, batch_sampler=BatchSampler(sampler, batch_size=2, drop_last=True))


def by_torchdata() -> Any:
    return StatefulDataLoader(DATA, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(9))


LOADERS: dict[str, Callable[[], Any]] = {
    "torch's recipe": by_torchs_recipe,
    "and workers": lambda: by_torchs_recipe(num_workers=2),
    "and persistent workers": lambda: by_torchs_recipe(num_workers=2, persistent_workers=True),
    "persistent workers, torch's generator": lambda: DataLoader(
        DATA, batch_size=2, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "a sampler's": by_a_sampler,
    "a batch sampler's": by_a_batch_sampler,
    "torchdata": by_torchdata,
}


class Training:
    """Takes micro-batches and draws from torch's generator, as dropout does."""

    def __init__(self, make: Callable[[], Any]) -> None:
        torch.manual_seed(5)
        random.seed(5)
        self.feed = Feed(make(), capture_rng=capture_rng, restore_rng=restore_rng)

    def take(self, batches: int) -> list[tuple[int, list[int], float]]:
        return [(self.feed.index, self.feed.next().tolist(), float(torch.rand(1))) for _ in range(batches)]

    def save(self) -> Loaded:
        parts = {"loader": self.feed.state_dict(), "rng": capture_rng()}
        own = {name: encode(part, name, keep_inline) for name, part in parts.items()}
        return Loaded(id="step-1", step=1, incarnation=1, attempt=1, world_size=1, metrics={}, note=None, own=own)

    def roll_back(self, saved: Loaded, skip: int = 0) -> None:
        self.feed.take(move_data(self.feed, saved, skip=skip).after)
        saved.restore_rng()

    def resume(self, saved: Loaded) -> None:
        self.feed.load_state_dict(saved.value("loader"))
        open_data(self.feed, saved)


IN_THE_FIRST, AT_ITS_END, IN_ANOTHER = 2, BATCHES, 2 * BATCHES - 1
PLACES = [(name, seen) for name in LOADERS if "workers" not in name for seen in (AT_ITS_END, IN_ANOTHER)]
PLACES += [("and workers", IN_ANOTHER), ("and persistent workers", IN_ANOTHER)]
PLACES += [(name, IN_THE_FIRST) for name in LOADERS if name != "and workers"]


@pytest.mark.parametrize(("name", "seen"), PLACES)
def test_the_order_is_the_same_after_two_rollbacks_and_in_a_fresh_process_from_what_that_saved(
    name: str, seen: int
) -> None:
    training = Training(LOADERS[name])
    training.take(seen)
    saved = training.save()
    expected = training.take(3 * BATCHES)
    for _ in range(2):
        training.roll_back(saved)
        assert training.take(3 * BATCHES) == expected

    for steps in (1, BATCHES, BATCHES):  # one restart after another, each in another epoch
        fresh = Training(LOADERS[name])
        fresh.take(1)  # as a script may that looks at a batch
        fresh.resume(saved)
        assert fresh.take(steps) == expected[:steps]
        saved, expected = fresh.save(), expected[steps:]


def test_with_batches_skipped_each_keeps_its_number_over_the_end_of_an_epoch() -> None:
    training = Training(by_torchs_recipe)
    training.take(2)
    saved = training.save()
    expected = training.take(3 * BATCHES)
    training.roll_back(saved, skip=BATCHES)
    assert [taken[:2] for taken in training.take(BATCHES)] == [taken[:2] for taken in expected[BATCHES : 2 * BATCHES]]
