"""A file system that does not answer silences nobody, and nothing is acknowledged that is not on it."""

import asyncio
import contextlib
import errno
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_double import (
    Heard,
    Rank,
    first_reply,
    following,
    hub_running,
    info,
    peer_of,
    rank_linked,
    request,
    rows,
    snapshot,
)
from test_hub_alerts import Pager

from trainctl.hub import patient_keeper
from trainctl.hub.disk import Disk, DiskHangs
from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.ownership import Ownership
from trainctl.hub.patient_keeper import PatientKeeper
from trainctl.hub.requests import Requests
from trainctl.hub.sinks.access import Access
from trainctl.store import journal
from trainctl.store.journal import JournalIndex, read_journal
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record
from trainctl.wire.commands import AddNote
from trainctl.wire.messages import Anomaly, Beat, Envelope, History, HistoryRequest, LinkAck, Rows
from trainctl.wire.rundir import RunDir
from trainctl.wire.server import Refusal
from waiting import until

HANGING = str(Path(__file__).with_name("hanging_disk.py"))


def is_told(item: object, severity: str) -> bool:
    body = item.body if isinstance(item, Envelope) else None
    return isinstance(body, Anomaly) and (body.what, body.severity) == ("disk-hangs", severity)


def has_step(item: object, step: int) -> bool:
    return isinstance(item, Envelope) and isinstance(item.body, Rows) and step in item.body.steps


def acknowledged(rank: Rank, link: int) -> None:
    until(lambda: rank.hear(LinkAck, 20).link >= link, 20)


def acknowledgements(rank: Rank) -> list[int]:
    """What was acknowledged since the last look."""
    found = []
    with contextlib.suppress(BlockingIOError, TimeoutError):
        while True:
            found.append(rank.hear(LinkAck, 0.01).link)
    return found


async def beats(heard: Heard, count: int) -> None:
    """So many heartbeats, from now on."""
    newest = max((item.time for item in heard.items if isinstance(item, Beat)), default=0.0)
    for _ in range(count):
        beat = await heard.until(lambda item, after=newest: isinstance(item, Beat) and item.time > after, 20)
        assert isinstance(beat, Beat)
        newest = beat.time


def test_while_the_disk_hangs_heartbeats_go_on_and_it_is_told_to_followers_and_to_the_alert_command(
    tmp_path: Path,
) -> None:
    pager, run_dir, flag = Pager(), tmp_path / "run", tmp_path / "hangs"

    async def scenario(rank: Rank, heard: Heard, card: object) -> None:
        rank.record(rows(1, 2, 3))
        await asyncio.to_thread(acknowledged, rank, 1)
        flag.touch()
        rank.record(rows(4))
        await heard.until(lambda item: has_step(item, 4), 20)
        rank.record(rows(5))
        rank.step(5)
        await heard.until(lambda item: has_step(item, 5), 20)
        await heard.until(lambda item: is_told(item, "error"), 20)
        alert = await asyncio.to_thread(pager.until, lambda alert: alert.get("what") == "disk-hangs")
        assert "has not answered for" in alert["text"]
        await beats(heard, 3)
        async with peer_of(card) as late:  # type: ignore[arg-type]
            assert (await snapshot(late)).metrics["loss"].step == 5, "whoever joins now sees the run"
        assert all(link <= 1 for link in acknowledgements(rank)), "rank 0 keeps what is on no disk"
        assert recorded(run_dir) == [1, 2, 3]

        flag.unlink()
        await asyncio.to_thread(acknowledged, rank, rank.sent)
        await heard.until(lambda item: is_told(item, "good"), 20)
        assert recorded(run_dir) == [1, 2, 3, 4, 5]
        async with peer_of(card) as peer:  # type: ignore[arg-type]
            assert (await first_reply(peer, request(AddNote(text="well again"), "n1"))).state == "accepted"
        until(lambda: told(run_dir) == ["error", "good"])

    async def connected(rank: Rank, card: object) -> None:
        async with peer_of(card) as peer, following(peer) as heard:  # type: ignore[arg-type]
            await scenario(rank, heard, card)

    with hub_running(run_dir, program=(HANGING, str(flag))) as hub, rank_linked(run_dir) as rank:
        try:
            asyncio.run(connected(rank, hub.card()))
        finally:
            flag.unlink(missing_ok=True)
        assert hub.process.poll() is None


def told(run_dir: Path) -> list[str]:
    """Of the hanging disk, in the journal."""
    events = load_record(run_dir).events
    return [event.severity for event in events if isinstance(event, Anomaly) and event.what == "disk-hangs"]


def recorded(run_dir: Path) -> list[int]:
    return load_record(run_dir).metrics.query("loss")["step"].tolist()


def test_the_log_hangs_alone_when_it_lies_on_the_disk_that_hangs() -> None:
    script = (
        "import logging, os, sys\n"
        "from trainctl.hub.log_thread import log_aside\n"
        "log_aside()\n"
        "for _ in range(10_000): logging.warning('x' * 100)\n"
        "os.write(1, b'went on')\n"
        "sys.stdin.read(1)\n"
    )
    command = [sys.executable, "-c", script]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:  # nobody reads its stderr
        assert process.stdout is not None
        try:
            assert select.select([process.stdout], [], [], 30)[0], "it waits for its log"
            assert os.read(process.stdout.fileno(), 100) == b"went on"
        finally:
            process.kill()


# --- the keeper


class Gate:
    """Lets nobody through `JournalWriter._write` while it is shut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        real = journal.JournalWriter._write

        def gated(writer: journal.JournalWriter, framed: bytes) -> None:
            assert self.open.wait(30)
            real(writer, framed)

        monkeypatch.setattr(journal.JournalWriter, "_write", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


@pytest.fixture
def keeper(tmp_path: Path) -> PatientKeeper:
    made = PatientKeeper(tmp_path, JournalIndex(tmp_path), Disk(patience_s=0.05), lambda settle: settle())
    made.begin_attempt(1)
    return made


def settled(keeper: PatientKeeper) -> bool:
    keeper.settle()
    return keeper.safe_to_index


def test_what_waits_for_the_disk_counts_as_written_only_when_it_is_and_keeps_its_order(
    keeper: PatientKeeper, gate: Gate, tmp_path: Path
) -> None:
    keeper.append(b"\x00", "metrics", 1, 1, 1)
    until(keeper.sync)
    gate.open.clear()
    for number in range(2, 6):
        keeper.append(bytes([number]), "metrics", number, number, 1)
    assert (keeper.written_link, keeper.unwritten_link(), keeper.safe_to_index) == (1, 2, False)
    assert not keeper.deleted()
    with pytest.raises(DiskHangs):
        keeper.full_segments()
    gate.open.set()
    until(lambda: settled(keeper))
    assert (keeper.written_link, keeper.unwritten_link()) == (5, 2), "written, and not synced"
    assert keeper.sync()
    assert (keeper.synced_link, keeper.unwritten_link(), keeper.lost) == (5, None, 0)
    assert list(read_journal(tmp_path)) == [b"\x00", *(bytes([number]) for number in range(2, 6))]
    keeper.close()


def test_an_attempt_that_begins_while_the_disk_hangs_inherits_no_acknowledgement(
    keeper: PatientKeeper, gate: Gate
) -> None:
    keeper.append(b"x", "metrics", 1, 499, 1)
    until(keeper.sync)
    assert (keeper.written_link, keeper.synced_link) == (499, 499)
    gate.open.clear()
    keeper.append(b"x", "metrics", 2, 500, 1)
    keeper.begin_attempt(2)
    assert (keeper.written_link, keeper.synced_link, keeper.unwritten_link()) == (0, 0, None)
    keeper.append(b"x", "metrics", 3, 1, 2)
    assert (keeper.written_link, keeper.unwritten_link()) == (0, 1)
    gate.open.set()
    until(lambda: settled(keeper))
    assert keeper.written_link == 1
    keeper.close()


def test_what_waits_is_bounded_and_what_is_given_up_is_counted(
    keeper: PatientKeeper, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient_keeper, "BACKLOG_BYTES", 1000)
    gate.open.clear()
    for number in range(1, 101):
        keeper.append(b"x" * 100, "metrics", number)
    assert keeper.lost == 89, "one is with the disk, ten wait"
    gate.open.set()
    keeper.close()


def test_closing_waits_for_the_disk_and_writes_all(keeper: PatientKeeper, gate: Gate, tmp_path: Path) -> None:
    gate.open.clear()
    for number in range(1, 4):
        keeper.append(bytes([number]), "metrics", number)
    threading.Timer(0.2, gate.open.set).start()
    keeper.close()
    assert list(read_journal(tmp_path)) == [b"\x01", b"\x02", b"\x03"]


def test_events_are_written_at_once_and_all_else_in_one_go_before_the_next_turn(tmp_path: Path) -> None:
    turn: list[Callable[[], None]] = []
    keeper = PatientKeeper(tmp_path, JournalIndex(tmp_path), Disk(), turn.append)
    keeper.append(b"a", "metrics", 1)
    keeper.append(b"b", "metrics", 2)
    assert (list(read_journal(tmp_path)), len(turn)) == ([], 1)
    turn.pop()()
    assert list(read_journal(tmp_path)) == [b"a", b"b"]
    keeper.append(b"c", "metrics", 3)
    keeper.append(b"d", "events", 1)
    assert list(read_journal(tmp_path)) == [b"a", b"b", b"c", b"d"]
    keeper.append(b"e", "nodes", 1)
    assert keeper.safe_to_index, "an index has all that was recorded, and so has the journal"
    assert list(read_journal(tmp_path))[-1] == b"e"
    keeper.close()


def test_what_waits_when_another_hub_took_over_is_not_written(
    keeper: PatientKeeper, gate: Gate, tmp_path: Path
) -> None:
    gate.open.clear()
    keeper.append(b"before", "metrics", 1)
    keeper.append(b"meanwhile", "metrics", 2)
    keeper.give_up()
    gate.open.set()
    keeper.close()
    assert list(read_journal(tmp_path)) == [b"before"]


@pytest.mark.parametrize(("number", "gone"), [(errno.ESTALE, True), (errno.EIO, False), (errno.ETIMEDOUT, False)])
def test_a_file_server_that_forgot_the_journal_or_fails_ends_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, gone: bool
) -> None:
    keeper = JournalKeeper(tmp_path, JournalIndex(tmp_path))

    def fails(_handle: int) -> os.stat_result:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(journal.os, "fstat", fails)
    assert keeper.deleted() is gone
    monkeypatch.undo()
    assert (keeper.problem is not None) is gone
    assert keeper.retry()
    keeper.append(b"x", "metrics", 1)
    keeper.close()


class Hanging:
    """A keeper's word that the disk hangs, with a journal of which a part is packed."""

    hangs = True
    index = JournalIndex(Path())


def test_charts_of_what_only_the_disk_has_are_refused_with_the_reason_and_nobody_waits(tmp_path: Path) -> None:
    keeper: Any = Hanging()
    recorder: Any = type("Recorder", (), {"record": RunRecord(info(tmp_path))})()
    nobody: Any = None
    requests = Requests(
        recorder=recorder, keeper=keeper, audit=nobody, run_dir=RunDir(tmp_path), desk=nobody, server=nobody
    )

    async def scenario() -> None:
        ask = HistoryRequest(req=1, metrics=["loss"])
        assert isinstance(await requests.handle(ask, nobody), History), "all of it is in memory"
        keeper.index.skip("metrics", 7)
        with pytest.raises(Refusal, match="does not answer") as refused:
            await requests.handle(ask, nobody)
        assert refused.value.code == "disk_hangs"
        assert requests.recorded("metrics", 8, 9) is None
        with pytest.raises(DiskHangs):
            await asyncio.to_thread(Access(recorder=recorder, keeper=keeper).missed, 8, 9)

    asyncio.run(scenario())


# --- who may write


def test_a_hub_whose_disk_hangs_stays_the_owner_but_does_nothing_that_cannot_be_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    ownership = Ownership(run_dir, Disk(patience_s=0.05))
    answer, real = threading.Event(), RunDir.newest

    def hanging(self: RunDir, kind: str) -> int:
        assert answer.wait(30)
        return real(self, kind)  # type: ignore[arg-type]

    assert ownership.held(look=True)
    monkeypatch.setattr(RunDir, "newest", hanging)
    assert not ownership.held(look=True)
    assert ownership.held()
    answer.set()
    until(lambda: ownership.held(look=True))
    run_dir.allocate("epoch")
    until(lambda: not ownership.held())


# --- the disk's thread


def test_what_fails_at_the_disk_is_raised_to_who_asked_and_what_hangs_holds_up_one_call() -> None:
    disk, answer = Disk(patience_s=0.05), threading.Event()
    assert disk.do(lambda: 7) == 7
    with pytest.raises(FileNotFoundError):
        disk.do(lambda: Path("/nonexistent/x").stat())
    with pytest.raises(DiskHangs):
        disk.do(lambda: answer.wait(30))
    assert disk.busy
    order: list[int] = []
    with pytest.raises(DiskHangs):
        disk.do(lambda: order.append(0))
    disk.post(lambda: order.append(1))
    answer.set()
    disk.do_however_long(lambda: order.append(2))
    assert order == [1, 2], "what was refused is never done"


def test_a_fault_in_what_nobody_waits_for_any_more_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    disk, answer = Disk(patience_s=0.01), threading.Event()

    def faulty() -> None:
        assert answer.wait(30)
        raise ValueError("a fault of ours")

    with caplog.at_level(logging.ERROR):
        with pytest.raises(DiskHangs):
            disk.do(faulty)
        answer.set()
        until(lambda: not disk.busy)
    assert "a fault of ours" in caplog.text
