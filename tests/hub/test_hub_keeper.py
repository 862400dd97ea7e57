"""What the hub says to have on disk is on disk, while the disk is full, while attempts change, while it is deleted."""

import contextlib
import errno
import os
import threading
from pathlib import Path

import pytest

from trainctl.hub.keeper import JournalKeeper
from trainctl.store import journal
from trainctl.store.journal import JournalIndex


@pytest.fixture
def keeper(tmp_path: Path) -> JournalKeeper:
    return JournalKeeper(tmp_path, JournalIndex(tmp_path))


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_waits_of_one_attempt_acknowledges_nothing_of_the_next(
    keeper: JournalKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper.begin_attempt(1)
    monkeypatch.setattr(journal.JournalWriter, "_write", full)
    keeper.append(b"x", "metrics", 1, 500, 1)
    keeper.begin_attempt(2)
    monkeypatch.undo()
    assert keeper.retry()
    assert keeper.written_link == 0, "rank 0 would throw away what nobody has"
    keeper.append(b"x", "metrics", 2, 1, 2)
    assert keeper.written_link == 1


def test_rank_0_is_asked_again_for_what_is_only_in_memory_and_no_index_is_saved_meanwhile(
    keeper: JournalKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper.begin_attempt(1)
    keeper.append(b"x", "metrics", 1, 7, 1)
    assert (keeper.unwritten_link(), keeper.safe_to_index) == (None, True)
    monkeypatch.setattr(journal.JournalWriter, "_write", full)
    keeper.append(b"x", "events", 1)
    keeper.append(b"x", "metrics", 2, 8, 1)
    assert (keeper.unwritten_link(), keeper.safe_to_index) == (8, False)
    keeper.close()
    assert not keeper.safe_to_index, "what was never written is not told as recorded either"


def test_a_journal_that_is_deleted_in_the_middle_of_a_sync_keeps_its_descriptors_until_that_is_over(
    keeper: JournalKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper.append(b"x", "metrics", 1)
    asked, go = threading.Event(), threading.Event()
    real, over = os.fsync, threading.Event()

    def slow(handle: int) -> None:
        asked.set()
        assert go.wait(30)
        real(handle)

    def sync() -> None:
        keeper.sync()
        over.set()

    monkeypatch.setattr(journal.os, "fsync", slow)
    thread = threading.Thread(target=sync)
    thread.start()
    assert asked.wait(30)
    for path in tmp_path.iterdir():
        path.unlink()
    assert keeper.deleted(), "noticed at once, and the loop does not wait for the disk"
    assert open_files(tmp_path), "a thread is using them"
    go.set()
    thread.join(30)
    assert over.is_set(), "and it raised nothing"
    monkeypatch.undo()
    assert not keeper.sync(), "there is nothing to sync until there is a new journal"
    assert open_files(tmp_path) == []
    assert keeper.retry()
    assert keeper.sync()


def open_files(directory: Path) -> list[str]:
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since the directory was read
            target = str(handle.readlink())
            if target.startswith(str(directory)):
                found.append(target)
    return found
