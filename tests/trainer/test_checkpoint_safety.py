"""What fails, fails in words and leaves everything else as it was."""

import json
import os
import pickle
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainctl.trainer.checkpoint import Checkpointer, CheckpointError, State
from trainctl.wire.manifest import MANIFEST, list_checkpoints, pin, read_manifest, verify
from trainctl.wire.removal import remove


class Small:
    """A model and its checkpoints."""

    def __init__(self, directory: Path, *, width: int = 64) -> None:
        torch.manual_seed(0)
        self.directory = directory
        self.model = nn.Linear(width, width)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.counters: dict[str, Any] = {"step": 0}
        self.checkpointer = Checkpointer(
            directory=directory,
            run_id="test",
            rank=0,
            world_size=1,
            group=None,
            state=State(models=[self.model], optimizers=[self.optimizer], counters=self.counters),
            memory_checkpoints=0,  # what is on disk is what is tested here
        )

    def step(self) -> None:
        self.model(torch.ones(1, self.model.in_features)).sum().backward()
        self.optimizer.step()
        self.counters["step"] += 1

    def save(self, checkpoint: str, **metrics: float) -> str | None:
        pending = self.checkpointer.begin_save(
            id=checkpoint, step=self.counters["step"], incarnation=1, attempt=1, metrics=metrics
        )
        return pending.result(30).error

    def bits(self) -> list[torch.Tensor]:
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return [tensor.detach().clone() for tensor in (*self.model.parameters(), *state)]

    def assert_untouched(self, before: list[torch.Tensor]) -> None:
        assert all(torch.equal(one, other) for one, other in zip(before, self.bits(), strict=True))


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return Small(tmp_path / "checkpoints")


FILES = [".metadata", "__0_0.distcp", "rank-00000.pt", MANIFEST]


def test_a_checkpoint_is_what_its_manifest_lists(small: Small) -> None:
    small.step()
    assert small.save("a", loss=2.0, broken=float("nan")) is None
    directory = small.directory / "a"
    assert sorted(path.name for path in directory.iterdir()) == sorted(FILES)
    manifest = verify(directory)
    assert (manifest.step, manifest.world_size, manifest.run, manifest.metrics) == (1, 1, "test", {"loss": 2.0})
    assert [info.id for info in list_checkpoints(small.directory)] == ["a"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.999])
def test_one_flipped_bit_in_any_file_is_found_and_nothing_is_touched(small: Small, name: str, where: float) -> None:
    small.step()
    assert small.save("a") is None
    small.step()
    before = small.bits()
    file = small.directory / "a" / name
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a.*nothing was changed"):
        small.checkpointer.load("a")
    small.assert_untouched(before)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "gone", "link"])
def test_a_file_cut_short_missing_or_replaced_by_a_link_is_named(small: Small, name: str, damage: str) -> None:
    assert small.save("a") is None
    file = small.directory / "a" / name
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.rename(small.directory / "elsewhere")
        if damage == "link":
            file.symlink_to(small.directory / "elsewhere")
    with pytest.raises(CheckpointError, match="(?i)manifest" if name == MANIFEST else name):
        small.checkpointer.load("a")


def test_every_value_in_the_manifest_is_vouched_for(small: Small) -> None:
    assert small.save("a", loss=2.0) is None
    file = small.directory / "a" / MANIFEST
    for name, value in {"step": 7, "incarnation": 9, "metrics": {"loss": 0.1}, "note": "x", "digest": ""}.items():
        content = file.read_bytes()
        file.write_bytes(json.dumps({**json.loads(content), name: value}).encode())
        with pytest.raises(CheckpointError, match="manifest of a is damaged"):
            small.checkpointer.load("a")
        file.write_bytes(content)
    small.checkpointer.load("a")


def test_a_pickle_that_no_manifest_vouches_for_is_never_opened(small: Small) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(small.directory / "hacked"),))

    assert small.save("a") is None
    for name in (".metadata", "rank-00000.pt"):
        (small.directory / "a" / name).write_bytes(pickle.dumps(Hostile()))
        with pytest.raises(CheckpointError):
            small.checkpointer.load("a")
    assert not (small.directory / "hacked").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", ".metadata", MANIFEST])
def test_a_checkpoint_that_belongs_to_somebody_else_is_not_read(small: Small, name: str) -> None:
    assert small.save("a") is None
    os.chown(small.directory / "a" / name, 12345, 12345)
    with pytest.raises(CheckpointError, match="belong"):
        small.checkpointer.load("a")


def test_a_renamed_checkpoint_is_noticed(small: Small) -> None:
    assert small.save("a") is None
    (small.directory / "a").rename(small.directory / "b")
    with pytest.raises(CheckpointError, match="b holds the checkpoint a"):
        small.checkpointer.load("b")


def test_what_does_not_exist_is_said(small: Small) -> None:
    with pytest.raises(CheckpointError, match="nowhere has no manifest"):
        small.checkpointer.load("nowhere")


def test_an_id_that_is_taken_is_kept(small: Small) -> None:
    assert small.save("a") is None
    before = read_manifest(small.directory / "a")
    assert "exists already" in str(small.save("a"))
    assert read_manifest(small.directory / "a") == before


@pytest.fixture
def no_file_over_64_kb() -> Iterator[None]:
    """The kernel refuses to write more, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way_leaves_no_trace(tmp_path: Path, no_file_over_64_kb: None) -> None:
    training = Small(tmp_path / "checkpoints", width=256)
    error = str(training.save("a"))
    assert error.startswith(f"writing to {training.directory} failed")
    assert list(training.directory.iterdir()) == []


def test_saving_works_again_after_a_failed_save(tmp_path: Path) -> None:
    training = Small(tmp_path / "checkpoints")
    tmp_path.joinpath("checkpoints").write_text("a file where the directory should be")
    assert "cannot be begun" in str(training.save("a"))
    tmp_path.joinpath("checkpoints").unlink()
    assert training.save("a") is None


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    tmp_path.joinpath("small").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(tmp_path / "small")], capture_output=True, timeout=10
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        training = Small(tmp_path / "small" / "checkpoints", width=512)
        assert "MB free and the checkpoint needs" in str(training.save("a"))
        assert list(training.directory.iterdir()) == []
        tiny = Small(tmp_path / "small" / "checkpoints", width=8)
        assert tiny.save("b") is None
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True, timeout=10)


def test_a_removed_checkpoint_takes_its_marks_with_it(small: Small) -> None:
    assert small.save("a") is None
    pin(small.directory / "a", pinned=True)
    remove(small.directory, "a")
    assert list(small.directory.iterdir()) == []
