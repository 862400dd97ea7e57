"""Training ends while the hub does not run: how, and the last rows, are in the run's directory, and taken once."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from hub_double import (
    RUN,
    Rank,
    hub_running,
    info,
    peer_of,
    progress,
    rank_linked,
    rows,
    snapshot,
    snapshot_when,
)

from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record
from trainctl.trainer import link as rank_link
from trainctl.trainer.leaving import leave_behind
from trainctl.trainer.link import Link
from trainctl.wire import codec
from trainctl.wire.left_behind import Head, leave
from trainctl.wire.messages import Anomaly, LinkBye, LinkHello, LinkRecord, RunInfo, StateChanged
from trainctl.wire.rundir import RunDir
from waiting import until

WIDE = {f"metric_{number}": 0.5 for number in range(300)}
FINISHED = LinkBye(state="finished", step=200)


@pytest.fixture
def training() -> Iterator[subprocess.Popen[bytes]]:
    """A process to be taken for rank 0's."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait(10)


class NoHub(rank_link.HubProcess):
    """Somebody else's business."""

    def __init__(self) -> None:
        pass

    def ensure(self, now: float) -> None:
        pass

    def settled(self) -> None:
        pass

    def reap(self) -> None:
        pass


def link_of(run_dir: Path, pid: int, *, keep_s: float = 60.0) -> Link:
    def hello() -> LinkHello:
        return LinkHello(info=info(run_dir), incarnation=1, step=0, pid=pid)

    return Link(run_id=RUN, hub=NoHub(), hello=hello, keep_s=keep_s)


def train(link: Link, first: int, last: int) -> None:
    for step in range(first, last + 1):
        link.record(rows(step, **{name: [value] for name, value in WIDE.items()}), time.monotonic())
        link.tick(time.monotonic())


def drained(link: Link) -> bool:
    link.tick(time.monotonic())
    return link.drained()


def steps_of(record: RunRecord) -> list[int]:
    return [int(step) for step in record.metrics.query("metric_7")["step"]]


def states_of(record: RunRecord) -> list[tuple[int, str]]:
    return [(event.attempt, event.state) for event in record.events if isinstance(event, StateChanged)]


def left_files(run_dir: Path) -> list[str]:
    return [path.name for path in run_dir.iterdir() if "left-" in path.name]


def head(run_dir: Path, *, step: int = 200, doubtful: Sequence[tuple[int, int]] = ()) -> Head:
    hello = LinkHello(info=info(run_dir), incarnation=1, step=0, pid=1)
    run = progress(step, dropped={"link": 3})
    return Head(hello=hello, run=run, bye=LinkBye(state="finished", step=step), time=5000.0, doubtful=list(doubtful))


def recorded(*steps: int) -> list[bytes]:
    return [codec.encode(LinkRecord(link=step, body=rows(step, metric_7=[1.0]))) for step in steps]


def write_info(run_dir: Path, made: RunInfo) -> None:
    RunDir(run_dir).create()
    RunDir(run_dir).info_file.write_bytes(msgspec.json.encode(made))


def test_a_run_that_finished_while_its_hub_was_frozen_is_finished_and_has_every_step(
    tmp_path: Path, training: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank_link, "_SEND_BUFFER", 64 * 1024)  # what Linux allows by default is 212992
    run_dir = tmp_path / "run"
    with hub_running(run_dir) as hub:
        link = link_of(run_dir, training.pid)
        until(lambda: link.tick(time.monotonic()) or link.connected, what="the link")
        train(link, 1, 20)
        until(lambda: drained(link), what="twenty steps on disk")
        hub.process.send_signal(signal.SIGSTOP)
        train(link, 21, 200)
        assert link.waiting() == 180
        leave_behind(link, run_dir, run=progress(200), bye=FINISHED)
        assert "did not take the last 180 rows" in caplog.text
        link.close()
        training.kill()
        training.wait(10)
        seen = load_record(run_dir)
        assert (seen.state.state, seen.state.step, steps_of(seen)) == ("finished", 200, list(range(1, 201)))
        assert left_files(run_dir) == ["left-000001"], "who only looks leaves it there"

        hub.process.send_signal(signal.SIGCONT)

        async def told() -> list[str]:
            async with peer_of(hub.card()) as peer:
                found = await snapshot_when(peer, lambda now: now.state.state in {"finished", "lost"})
                return [event.state for event in found.events if isinstance(event, StateChanged)]

        assert asyncio.run(told())[-1] == "finished"
        until(lambda: not left_files(run_dir), what="the file is deleted when the journal has it")
        hub.kill()
    assert steps_of(load_record(run_dir)) == list(range(1, 201)), "and every step once"
    assert states_of(load_record(run_dir))[-1] == (1, "finished")


def test_the_next_attempt_waits_for_all_that_the_one_before_said_to_a_hub_that_was_frozen(
    tmp_path: Path, training: subprocess.Popen[bytes]
) -> None:
    run_dir = tmp_path / "run"
    with hub_running(run_dir) as hub, rank_linked(run_dir, pid=training.pid) as rank:
        hub.process.send_signal(signal.SIGSTOP)
        rank.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * 1024 * 1024)
        rank.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while rank.sent < 2000:
                rank.record(rows(rank.sent + 1, metric_7=[1.0]))
        last = rank.sent + 50
        leave(run_dir, head(run_dir, step=last), recorded(*range(rank.sent - 20, last + 1)))
        rank.close()
        training.kill()
        training.wait(10)
        dialing = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        dialing.connect(str(rank_link.link_socket(RUN)))
        hello = LinkHello(info=info(run_dir, attempt=2), incarnation=2, step=last, pid=os.getpid(), parent=1)
        dialing.send(codec.encode(hello))
        hub.process.send_signal(signal.SIGCONT)

        async def scenario() -> None:
            async with peer_of(hub.card()) as peer:
                await snapshot_when(peer, lambda now: now.state.attempt == 2)

        asyncio.run(scenario())
        until(lambda: not left_files(run_dir))
        dialing.close()
    record = load_record(run_dir)
    assert states_of(record)[:3] == [(1, "starting"), (1, "finished"), (2, "starting")]
    assert steps_of(record) == list(range(1, last + 1)), "what the link took, and what it did not"


def test_a_hub_that_was_killed_while_frozen_costs_the_next_ones_history_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_info(run_dir, info(run_dir))
    leave(run_dir, head(run_dir, doubtful=[(1, 4)]), recorded(*range(2, 31)))
    with hub_running(run_dir) as hub, Linked(run_dir, attempt=2) as rank:
        assert rank.have == 0, "another attempt has numbers of its own"

        async def scenario() -> None:
            async with peer_of(hub.card()) as peer:
                found = await snapshot(peer)
                (told,) = [event for event in found.events if isinstance(event, Anomaly)]
                assert "4 rows and events of the run's end are missing" in told.text

        asyncio.run(scenario())
        until(lambda: not left_files(run_dir))
    record = load_record(run_dir)
    assert states_of(record)[:3] == [(1, "starting"), (1, "finished"), (2, "starting")]
    assert steps_of(record) == list(range(2, 31))


class Linked:
    """A later attempt's rank 0."""

    def __init__(self, run_dir: Path, attempt: int) -> None:
        self._rank = Rank(run_dir, attempt=attempt)

    def __enter__(self) -> Rank:
        self._rank.connect(step=200, incarnation=2, parent=1)
        return self._rank

    def __exit__(self, *_: object) -> None:
        self._rank.close()


def test_a_run_whose_hub_only_started_when_it_was_over_is_not_lost(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    RunDir(run_dir).create()
    leave(run_dir, head(run_dir), recorded(*range(1, 11)))
    with hub_running(run_dir) as hub:

        async def scenario() -> None:
            async with peer_of(hub.card()) as peer:
                found = await snapshot_when(peer, lambda now: now.state.state == "finished")
                assert (found.info.run, found.state.step, found.metrics["metric_7"].step) == ("demo", 200, 10)

        asyncio.run(scenario())


def test_what_is_missing_at_the_end_is_counted(tmp_path: Path) -> None:
    write_info(tmp_path, info(tmp_path))
    leave(tmp_path, head(tmp_path, doubtful=[(1, 4), (2, 7)]), recorded(3))
    assert load_record(tmp_path).state.dropped == {"link": 3 + 4 + 7}
    assert steps_of(load_record(tmp_path)) == [3]


def test_a_disk_without_room_for_the_rows_has_the_ending_and_their_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_info(tmp_path, info(tmp_path))
    link = link_of(tmp_path, os.getpid())
    train(link, 1, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        leave_behind(link, tmp_path, run=progress(10), bye=FINISHED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    record = load_record(tmp_path)
    assert (record.state.state, record.state.dropped) == ("finished", {"link": 10})
    assert "cannot be kept" in caplog.text
    assert left_files(tmp_path) == ["left-000001"], "and nothing half written"


def test_what_is_newer_than_the_file_stands(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with hub_running(run_dir), Linked(run_dir, attempt=2) as rank:
        rank.bye("stopped")
        until(lambda: load_record(run_dir).state.state == "stopped")
    leave(run_dir, head(run_dir), recorded(1))
    record = load_record(run_dir)
    assert (record.state.attempt, record.state.state, steps_of(record)) == (2, "stopped", [1])


def test_what_another_run_left_is_not_taken(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_info(run_dir, info(run_dir))
    mine = head(run_dir)
    other = msgspec.structs.replace(mine.hello, info=msgspec.structs.replace(mine.hello.info, id="another"))
    leave(run_dir, msgspec.structs.replace(mine, hello=other), recorded(1))
    assert (load_record(run_dir).state.state, steps_of(load_record(run_dir))) == ("lost", [])
    with hub_running(run_dir) as hub:

        async def scenario() -> None:
            async with peer_of(hub.card()) as peer:
                assert (await snapshot(peer)).heads["metrics"] == 0

        asyncio.run(scenario())
    assert left_files(run_dir) == ["left-000001"]


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "noise", "pipe", "link"])
def test_a_file_that_decayed_or_is_none_is_read_as_far_as_it_goes(tmp_path: Path, damage: str) -> None:
    run_dir = tmp_path / "run"
    write_info(run_dir, info(run_dir))
    path = leave(run_dir, head(run_dir), recorded(*range(1, 11)))
    whole = path.read_bytes()
    damaged = {"torn": whole[:-5], "flipped": whole[:-5] + b"\xff" + whole[-4:], "noise": b"\x10\0\0\0" * 99}
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(whole)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes(damaged.get(damage, b""))
    record = load_record(run_dir)
    if damage in {"torn", "flipped"}:
        assert (record.state.state, steps_of(record)) == ("finished", list(range(1, 10)))
    else:
        assert (record.state.state, steps_of(record)) == ("lost", [])
    with hub_running(run_dir) as hub:
        assert hub.process.poll() is None, "it came up"
