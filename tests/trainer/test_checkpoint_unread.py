"""A disk that gives an error says nothing about a checkpoint: that is told as such, nothing is remembered as damaged,
and nothing older is deleted meanwhile."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Self

import pytest
from torch import nn

from trainctl.trainer.checkpoint import Checkpointer, CheckpointError, State
from trainctl.trainer.checkpoint.retention import Retention, prune
from trainctl.wire import manifest
from trainctl.wire.checking import check
from trainctl.wire.manifest import MANIFEST, list_checkpoints
from trainctl.wire.removal import NotRemoved, remove_unless_kept

WORDS = "could not be read: Input/output error"


class Failing:
    """A file whose content the disk does not give."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, _size: int = -1) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`disk(name)`: from now on it fails for files of that name; `disk()`: for none."""
    intact: Any = manifest.open_ours  # type: ignore[attr-defined]

    def fails(*names: str) -> None:
        def opened(directory: Path, name: str) -> Any:
            file = intact(directory, name)
            return Failing(file) if name in names else file

        monkeypatch.setattr(manifest, "open_ours", opened)

    return fails


def saved(directory: Path, *names: str) -> Checkpointer:
    made = Checkpointer(
        directory=directory,
        run_id="test",
        rank=0,
        world_size=1,
        group=None,
        state=State(models=[nn.Linear(2, 2)], optimizers=[]),
        memory_checkpoints=0,
    )
    for step, name in enumerate(names):
        result = made.begin_save(id=name, step=step, incarnation=1, attempt=1, metrics={}).result()
        assert result.error is None
    made.drain()
    return made


def verified(directory: Path) -> list[bool | None]:
    return [info.verified for info in list_checkpoints(directory)]


@pytest.mark.parametrize("file", [MANIFEST, "rank-00000.pt", "__0_0.distcp"])
def test_a_load_says_that_it_could_not_be_read_and_the_next_try_finds_it_good(
    file: str, tmp_path: Path, disk: Callable[..., None]
) -> None:
    checkpointer = saved(tmp_path, "a", "b")
    disk(file)
    with pytest.raises(CheckpointError, match=rf"b.* {WORDS}; nothing was changed; it may be whole: try again"):
        checkpointer.load("b")
    disk()
    assert verified(tmp_path) == [None, None]
    assert checkpointer.load("b").id == "b"
    assert verified(tmp_path) == [None, True]


def test_what_was_found_good_or_damaged_before_stays_so(tmp_path: Path, disk: Callable[..., None]) -> None:
    saved(tmp_path, "a", "b")
    assert check(tmp_path / "a").ok
    (tmp_path / "b" / "rank-00000.pt").write_bytes(b"")
    assert not check(tmp_path / "b").ok
    disk("__0_0.distcp", "rank-00000.pt")
    for name in ("a", "b"):
        found = check(tmp_path / name)
        assert (found.ok, found.readable) == (False, False)
        assert WORDS in found.text
    assert verified(tmp_path) == [True, False]


def test_nothing_is_deleted_while_the_last_good_one_cannot_be_read(tmp_path: Path, disk: Callable[..., None]) -> None:
    saved(tmp_path, "a", "b", "c")
    disk("__0_0.distcp")
    with pytest.raises(CheckpointError, match=rf"c/__0_0.distcp {WORDS}; no older checkpoint was deleted"):
        prune(tmp_path, Retention(last=1, best=0))
    for name in ("a", "b"):
        with pytest.raises(NotRemoved, match=rf"c/__0_0.distcp {WORDS}.*nothing was deleted: try again"):
            remove_unless_kept(tmp_path, name)
    assert verified(tmp_path) == [None, None, None]
    disk()
    assert [info.id for info in prune(tmp_path, Retention(last=1, best=0))] == ["a", "b"]
    assert verified(tmp_path) == [True]
