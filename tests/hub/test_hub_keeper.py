"""What the hub says to have on disk is on disk, while the disk is full, while attempts change, while it is deleted."""

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from trainctl.hub import keeper as keeper_module
from trainctl.hub.disk import Disk
from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.patient_keeper import PatientKeeper
from trainctl.store import journal
from trainctl.store.journal import JournalIndex
from trainctl.store.record import RunRecord
from trainctl.store.replay import replay_journal
from trainctl.wire import codec
from trainctl.wire.messages import Envelope, Note, RunInfo


def patient(directory: Path, index: JournalIndex) -> JournalKeeper:
    """The one that a hub has, whose disk may hang."""
    return PatientKeeper(directory, index, Disk(patience_s=30), lambda settle: settle())


Make = Callable[[Path, JournalIndex], JournalKeeper]


@pytest.fixture(params=[JournalKeeper, patient], ids=["plain", "patient"])
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


@pytest.fixture
def keeper(tmp_path: Path, make: Make) -> JournalKeeper:
    return make(tmp_path, JournalIndex(tmp_path))


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
    assert keeper.unwritten_link() == 7, "written, and gone if the machine goes"
    assert keeper.sync()
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


class Pages:
    """A file system that tells once that it could not write back, drops what it had, and goes on (so does Linux)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = os.fsync
        self._synced: dict[str, int] = {}
        self.dropped: slice | None = None  # of the bytes since the last good sync, at the next one
        monkeypatch.setattr(journal.os, "fsync", self._fsync)

    def _fsync(self, handle: int) -> None:
        path = str(Path(f"/proc/self/fd/{handle}").readlink())
        if self.dropped is not None and path.endswith(".seg"):
            data = bytearray(Path(path).read_bytes())
            unsynced = data[self._synced.get(path, 8) :]
            unsynced[self.dropped] = bytes(len(unsynced[self.dropped]))
            data[self._synced.get(path, 8) :] = unsynced
            Path(path).write_bytes(data)
            self.dropped = None
            raise OSError(errno.ENOSPC, "No space left on device")
        self._real(handle)
        self._synced[path] = Path(path).stat().st_size


def notes(keeper: JournalKeeper, first: int, last: int) -> None:
    for seq in range(first, last + 1):
        note = Note(time=1.0, step=seq, incarnation=1, actor="a", text=f"{seq}")
        made = Envelope(source="r", epoch=1, stream="events", seq=seq, time=1.0, body=note, attempt=1, link=seq)
        keeper.append(codec.encode(made), "events", seq, seq, 1)


def recorded(directory: Path) -> list[int]:
    """The steps of what a reader takes of the journal."""
    info = RunInfo(run="r", id="r", dir=str(directory.parent), host="h", created=0, started=0, world_size=1)
    record = RunRecord(info)
    replay_journal(record, JournalIndex(directory), directory)
    assert not record.damage
    return [event.step for event in record.events]


@pytest.mark.parametrize("dropped", [slice(None), slice(50, 300), slice(0, 0)])
@pytest.mark.parametrize("segments_of", [journal.SEGMENT_BYTES, 500])
def test_what_a_failed_sync_dropped_is_appended_again_before_more_is_acknowledged(
    tmp_path: Path, make: Make, dropped: slice, segments_of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = Pages(monkeypatch)
    monkeypatch.setattr(keeper_module, "JournalWriter", partial(journal.JournalWriter, segment_bytes=segments_of))
    keeper = make(tmp_path / "journal", JournalIndex(tmp_path / "journal"))
    keeper.begin_attempt(1)
    notes(keeper, 1, 10)
    assert keeper.sync()
    assert (keeper.synced_link, keeper.unwritten_link()) == (10, None)
    notes(keeper, 11, 20)
    pages.dropped = dropped
    assert not keeper.sync()
    assert keeper.problem == "No space left on device"
    assert not keeper.sync(), "the system says yes the second time, and the pages are gone"
    notes(keeper, 21, 30)
    assert (keeper.synced_link, keeper.unwritten_link()) == (10, 11), "rank 0 keeps what may be nowhere else"
    assert not keeper.safe_to_index
    assert not keeper.retry(), "all is appended again, and not proved"
    assert keeper.synced_link == 10
    assert keeper.sync()
    assert keeper.synced_link == 30
    assert keeper.retry()
    assert (keeper.problem, keeper.lost, keeper.unwritten_link()) == (None, 0, None)
    assert recorded(tmp_path / "journal") == list(range(1, 31)), "each once, behind no hole"
    assert [codec.envelope_decoder()(each).seq for each in keeper.index.read("events", 8, 25)] == list(range(8, 26))
    keeper.close()
    assert keeper.safe_to_index


def test_of_two_syncs_at_once_none_succeeds_behind_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = journal.JournalWriter(tmp_path)
    pages = Pages(monkeypatch)
    writer.append(b"x", "events", 1)
    pages.dropped = slice(None)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            writer.sync()
    with pytest.raises(OSError, match="No space"):
        writer.close()


def test_what_the_sync_of_a_hub_that_was_killed_never_proved_is_proved_or_appended_again_by_the_next(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "journal"
    killed = make(directory, JournalIndex(directory))
    notes(killed, 1, 10)
    pages = Pages(monkeypatch)
    pages.dropped = slice(0, 0)  # not yet: it gives them once more
    following = make(directory, JournalIndex(directory))
    following.begin_attempt(1)
    assert pages.dropped is None, "the segment of the hub before was synced"
    assert following.unwritten_link() == 1
    notes(following, 11, 12)
    assert following.sync()
    assert (directory / "00000001.seg").stat().st_size == len(journal.HEADER)
    assert recorded(directory) == list(range(1, 13))
    assert following.retry()
    following.close()
    killed.close()


def test_a_sync_that_fails_at_the_end_is_made_up_for(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = Pages(monkeypatch)
    keeper = make(tmp_path / "journal", JournalIndex(tmp_path / "journal"))
    notes(keeper, 1, 10)
    pages.dropped = slice(None)
    keeper.close()
    assert (keeper.problem, keeper.safe_to_index) == (None, True)
    assert recorded(tmp_path / "journal") == list(range(1, 11))


def open_files(directory: Path) -> list[str]:
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since the directory was read
            target = str(handle.readlink())
            if target.startswith(str(directory)):
                found.append(target)
    return found
