"""The data of a rollback are opened before anything is touched: where that fails, or another rank cannot, training goes
on with the very micro-batches and random numbers that it would have had."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from trainctl.trainer.checkpoint import Loaded
from trainctl.trainer.checkpoint.rng import capture_rng, restore_rng
from trainctl.trainer.checkpoint.tree import encode, keep_inline
from trainctl.trainer.data_place import DataUnreadable, move_back, move_data
from trainctl.trainer.feed import Feed

pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital.*")  # torchdata 0.11 at its first iterator

BATCHES = 5  # of an epoch
SAVED, LIVE = 3, 7  # micro-batches: in the middle of the first epoch and of the second
GONE = 4  # the first epoch that cannot be read


class Numbers(Dataset[int]):
    def __init__(self) -> None:
        self.gone: int | None = None

    def __len__(self) -> int:
        return 2 * BATCHES

    def __getitem__(self, index: int) -> int:
        if index == self.gone:
            raise OSError(f"sample {index} is not there")
        return index


class Shuffled(RandomSampler):
    """By the number of the epoch, or by a generator of its own; from an epoch on there is nothing to read."""

    def __init__(self, data: Dataset[int], generator: torch.Generator | None = None) -> None:
        super().__init__(data, generator=generator)  # type: ignore[arg-type]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.epoch >= GONE:
            raise OSError(f"epoch {self.epoch} is not there")
        return super().__iter__()


def of_torch(**given: Any) -> Any:
    data = Numbers()
    return DataLoader(data, batch_size=2, sampler=Shuffled(data), **given)


def of_a_generator(**given: Any) -> Any:
    data, generator = Numbers(), torch.Generator().manual_seed(9)
    sampler = Shuffled(data, generator)
    return DataLoader(data, batch_size=2, sampler=sampler, generator=generator, **given)


def of_torchdata(**given: Any) -> Any:
    return StatefulDataLoader(Numbers(), batch_size=2, shuffle=True, **given)


class Training:
    """Takes micro-batches and draws random numbers, as a script does."""

    def __init__(self, make: Callable[[], Any]) -> None:
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(5)
        self.loader = make()
        self.feed = Feed(self.loader, capture_rng=capture_rng, restore_rng=restore_rng)

    def take(self, batches: int) -> list[tuple[int, int, list[int], float]]:
        return [
            (self.feed.epoch, self.feed.index, self.feed.next().tolist(), float(torch.rand(1)) + random.random())
            for _ in range(batches)
        ]

    def save(self) -> Loaded:
        parts = {"loader": self.feed.state_dict(), "rng": capture_rng()}
        own = {name: encode(part, name, keep_inline) for name, part in parts.items()}
        return Loaded(id="step-1", step=1, incarnation=1, attempt=1, world_size=1, metrics={}, note=None, own=own)


LOADERS = {
    "plain": of_torch,
    "workers": lambda: of_torch(num_workers=2),
    "persistent workers": lambda: of_torch(num_workers=2, persistent_workers=True),
    "a generator": of_a_generator,
    "a generator and persistent workers": lambda: of_a_generator(num_workers=2, persistent_workers=True),
    "its own state": of_torchdata,
}


@pytest.mark.parametrize("live", [SAVED + 1, LIVE, 2 * BATCHES], ids=["in the first epoch", "in another", "at its end"])
@pytest.mark.parametrize("name", LOADERS)
def test_where_another_rank_cannot_the_data_and_the_random_numbers_go_on_as_if_nobody_had_asked(
    name: str, live: int
) -> None:
    undisturbed = Training(LOADERS[name])
    expected = undisturbed.take(live + 2 * BATCHES)
    training = Training(LOADERS[name])
    training.take(SAVED)
    saved = training.save()
    training.take(live - SAVED)
    for skip in (0, BATCHES):
        place = move_data(training.feed, saved, skip=skip)
        assert training.feed.index == SAVED + skip
        move_back(training.feed, place)
    assert training.take(2 * BATCHES) == expected[live:]


@pytest.mark.parametrize("name", [name for name in LOADERS if name != "its own state"])
def test_a_loader_that_cannot_read_what_is_to_be_skipped_says_so_and_goes_on_where_it_was(name: str) -> None:
    expected = Training(LOADERS[name]).take(LIVE + BATCHES)
    training = Training(LOADERS[name])
    training.take(SAVED)
    saved = training.save()
    training.take(LIVE - SAVED)
    with pytest.raises(DataUnreadable, match=r"step-1 and 20 micro-batches on: OSError: epoch 4 is not there.*Nothing"):
        move_data(training.feed, saved, skip=4 * BATCHES)
    assert training.take(BATCHES) == expected[LIVE:]


@pytest.mark.parametrize("name", ["plain", "its own state"])
def test_a_sample_that_is_gone_from_what_was_read_already_is_no_reason_to_stop_either(name: str) -> None:
    expected = Training(LOADERS[name]).take(2 * BATCHES)
    training = Training(LOADERS[name])
    training.take(1)
    saved = training.save()
    training.take(BATCHES - 1)
    training.loader.dataset.gone = expected[2][2][0]
    with pytest.raises(DataUnreadable, match="is not there"):
        move_data(training.feed, saved, skip=3)
    training.loader.dataset.gone = None
    assert training.take(BATCHES) == expected[BATCHES:]


def test_a_loader_that_reads_nothing_again_ends_training_with_a_sentence() -> None:
    class Once:
        def __init__(self) -> None:
            self.broken = False

        def __iter__(self) -> Iterator[torch.Tensor]:
            if self.broken:
                raise OSError("the storage is away")
            return iter(torch.arange(BATCHES))

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.broken = True

    training = Training(Once)
    training.take(1)
    saved = training.save()
    with pytest.raises(RuntimeError, match="did not read again what it had given: OSError: the storage is away"):
        move_data(training.feed, saved, skip=0)
