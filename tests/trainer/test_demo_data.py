"""The demo's data: what is read, how it is split, and that a batch depends on its index alone."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainctl.trainer.demo.data import (
    Batch,
    Corpus,
    LoaderConfig,
    NoData,
    WindowLoader,
    is_validation,
    read_corpus,
    validation_batches,
    window_starts,
)

GOLDEN_STARTS = [947055, 442495, 848140, 601210, 631798, 680839]
TEXT = np.random.default_rng(0).integers(256, size=4096, dtype=np.uint8)


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


def write_texts(directory: Path, count: int) -> None:
    for number in range(count):
        path = directory / f"package{number % 3}" / f"module{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# this is file {number:03d}\n")


def test_the_standard_library_is_ten_megabytes_of_text_with_a_held_out_part() -> None:
    corpus = read_corpus()
    assert len(corpus.train) + len(corpus.validation) > 10_000_000
    assert 0.01 < len(corpus.validation) / len(corpus.train) < 0.15
    assert b"import" in corpus.train[:1_000_000].tobytes()


def test_each_file_is_on_one_side_of_the_split(tmp_path: Path) -> None:
    write_texts(tmp_path, 80)
    corpus = read_corpus(tmp_path)
    train, validation = corpus.train.tobytes(), corpus.validation.tobytes()
    for number in range(80):
        name = f"package{number % 3}/module{number}.py"
        mark = f"# this is file {number:03d}\n".encode() + b"\0"
        assert (mark in validation) is is_validation(name)
        assert (mark in train) is not is_validation(name)


def test_a_new_file_moves_no_other_across_the_split_and_order_is_by_name(tmp_path: Path) -> None:
    write_texts(tmp_path, 80)
    before = read_corpus(tmp_path)
    (tmp_path / "aaa.py").write_text("# new\n")
    after = read_corpus(tmp_path)
    assert not is_validation("aaa.py")
    assert after.train.tobytes() == b"# new\n\0" + before.train.tobytes()
    assert after.validation.tobytes() == before.validation.tobytes()


def test_installed_packages_and_binary_files_are_not_read(tmp_path: Path) -> None:
    write_texts(tmp_path, 80)
    before = read_corpus(tmp_path)
    for place in ("site-packages", "dist-packages", "__pycache__"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "other.py").write_text("# somebody else's\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read_corpus(tmp_path).train.tobytes() == before.train.tobytes()


@pytest.mark.parametrize("files", [0, 1])
def test_a_directory_without_enough_text_is_refused_with_what_to_do(tmp_path: Path, files: int) -> None:
    write_texts(tmp_path, files)
    with pytest.raises(NoData, match="--data DIR"):
        read_corpus(tmp_path)


def test_the_windows_of_a_seed_are_the_same_everywhere_and_for_ever() -> None:
    starts = window_starts(np.arange(6, dtype=np.uint64), seed=0, choices=1_000_000)
    assert starts.tolist() == GOLDEN_STARTS
    assert not np.array_equal(starts, window_starts(np.arange(6, dtype=np.uint64), seed=1, choices=1_000_000))


def test_targets_are_the_inputs_moved_by_one_byte() -> None:
    inputs, targets = next(iter(WindowLoader(TEXT, LoaderConfig(context=16, batch_size=3))))
    assert inputs.shape == targets.shape == (3, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bytes(inputs[0].tolist()) in TEXT.tobytes()


@settings(deadline=None, max_examples=40)
@given(batch_size=st.integers(1, 4), world_size=st.integers(1, 4), seed=st.integers(0, 2**63), epoch=st.integers(0, 9))
def test_ranks_share_out_the_batches_of_a_single_process(
    batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    alone = WindowLoader(TEXT, LoaderConfig(context=16, batch_size=batch_size * world_size, seed=seed))
    loaders = [
        WindowLoader(TEXT, LoaderConfig(context=16, batch_size=batch_size, seed=seed, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    for loader in (alone, *loaders):
        loader.set_epoch(epoch)
    for whole, *parts in islice(zip(alone, *loaders, strict=True), 3):
        assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))


@settings(deadline=None, max_examples=40)
@given(taken=st.integers(0, 40), context=st.sampled_from([16, 64, 200]), epoch=st.integers(0, 3))
def test_a_loader_goes_on_exactly_where_its_state_was_taken(taken: int, context: int, epoch: int) -> None:
    config = LoaderConfig(context=context, batch_size=2, seed=7)
    original, restored = WindowLoader(TEXT, config), WindowLoader(TEXT, config)
    original.set_epoch(epoch)
    iterator = iter(original)
    list(islice(iterator, taken))
    restored.load_state_dict(original.state_dict())
    restored.set_epoch(epoch)
    rest = list(restored)
    assert equal(list(iterator), rest)
    assert len(rest) == max(0, len(original) - taken)


def test_a_loaded_position_is_used_once_and_epochs_differ() -> None:
    loader = WindowLoader(TEXT, LoaderConfig(context=64, batch_size=2))
    first = list(loader)
    assert equal(list(loader), first)
    loader.load_state_dict({"epoch": 0, "batch": 5})
    assert equal(list(loader), first[5:])
    assert equal(list(loader), first)
    loader.set_epoch(1)
    assert not equal(list(loader), first)


def test_validation_batches_are_the_same_each_time_and_shared_out() -> None:
    alone = validation_batches(TEXT, LoaderConfig(context=16, batch_size=4), count=3)
    parts = [
        validation_batches(TEXT, LoaderConfig(context=16, batch_size=2, rank=rank, world_size=2), count=3)
        for rank in (0, 1)
    ]
    assert len(alone) == 3
    for whole, *shared in zip(alone, *parts, strict=True):
        assert torch.equal(whole[0], torch.cat([part[0] for part in shared]))


def test_text_shorter_than_a_window_is_refused() -> None:
    short = TEXT[:16]
    with pytest.raises(NoData, match="16 bytes"):
        WindowLoader(short, LoaderConfig(context=16, batch_size=1))
    with pytest.raises(NoData, match="give more text"):
        validation_batches(short, LoaderConfig(context=16, batch_size=1), count=1)
    with pytest.raises(NoData):
        Corpus(train=TEXT, validation=TEXT[:0], source="nowhere")


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"context": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}])
def test_a_loader_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LoaderConfig(**({"context": 8, "batch_size": 1} | wrong))
