"""Lost, stalled, come back: the run's state when rank 0 does not say it."""

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_double import Rank, hub_running, info, peer_of, progress, rank_linked, rows, snapshot, snapshot_when

from trainctl.hub.life import RunLife, change
from trainctl.hub.link import RankLink
from trainctl.hub.stalled import StallDetector
from trainctl.store.replay import load_record
from trainctl.wire import codec
from trainctl.wire.messages import LinkAck, LinkBye, LinkHello, LinkProgress, RunState, StateChanged


@pytest.fixture
def training() -> Iterator[subprocess.Popen[bytes]]:
    """A process to be taken for rank 0's."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait(10)


def test_a_killed_rank_0_is_lost_at_once_though_a_worker_keeps_its_socket_open(
    tmp_path: Path, training: subprocess.Popen[bytes]
) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run", pid=training.pid) as rank:
            rank.step(5)
            async with peer_of(hub.card()) as peer:
                await snapshot_when(peer, lambda found: found.state.state == "running")
                training.send_signal(signal.SIGKILL)
                killed = time.monotonic()
                rank.record(rows(6))  # what was sent last still counts
                found = await snapshot_when(peer, lambda found: found.state.state == "lost", timeout_s=9.0)
                assert time.monotonic() - killed < 10.0, "by its end, not by its silence"
                assert "died without a word" in str(found.state.reason)
                event = found.events[-1]
                assert isinstance(event, StateChanged)
                assert (event.state, event.before) == ("lost", "running")
                assert found.heads["metrics"] == 1

    asyncio.run(scenario())
    assert load_record(tmp_path / "run").state.state == "lost"


def test_a_link_that_is_closed_without_a_goodbye_is_lost_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub:
            async with peer_of(hub.card()) as peer:
                with rank_linked(tmp_path / "run") as rank:
                    rank.step(5)
                    await snapshot_when(peer, lambda found: found.state.state == "running")
                found = await snapshot_when(peer, lambda found: found.state.state == "lost", timeout_s=9.0)
                assert "did not come back" in str(found.state.reason)

    asyncio.run(scenario())


def test_a_rank_0_that_links_again_at_once_was_never_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub:
            async with peer_of(hub.card()) as peer:
                with rank_linked(tmp_path / "run") as rank:
                    rank.step(5)
                    await snapshot_when(peer, lambda found: found.state.state == "running")
                with rank_linked(tmp_path / "run") as again:
                    again.step(6, "paused")
                    found = await snapshot_when(peer, lambda found: found.state.state == "paused")
                    told = [event.state for event in found.events if isinstance(event, StateChanged)]
                    assert told == ["starting", "running", "paused"]

    asyncio.run(scenario())


def test_a_restarted_run_begins_a_new_attempt_at_the_same_hub(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub:
            async with peer_of(hub.card()) as peer:
                with rank_linked(tmp_path / "run") as first:
                    first.record(rows(1, 2, 3, 4, 5))
                    first.step(5)
                    first.bye("failed", 5)
                await snapshot_when(peer, lambda found: found.state.state == "failed")
                second = Rank(tmp_path / "run", attempt=2)
                assert second.connect(step=3, incarnation=2).have == 0
                second.record(rows(4, incarnation=2, loss=[9.0]))
                second.step(4, attempt=2, incarnation=2)
                found = await snapshot_when(peer, lambda found: found.state.state == "running")
                assert (found.state.attempt, found.info.attempt, found.metrics["loss"].value) == (2, 2, 9.0)
                second.close()

    asyncio.run(scenario())
    live = load_record(tmp_path / "run").metrics.query("loss")
    assert live["step"].tolist() == [1, 2, 3, 4]
    assert live["incarnation"].tolist() == [1, 1, 1, 2]


def test_a_goodbye_is_final_even_when_it_is_the_last_thing_in_a_link_that_breaks(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub:
            async with peer_of(hub.card()) as peer:
                with rank_linked(tmp_path / "run") as rank:
                    for step in range(1, 200):
                        rank.record(rows(step))
                    rank.bye("finished", 199)  # and closes with the hub's acknowledgements unread
                found = await snapshot_when(peer, lambda found: found.state.state == "finished")
                assert found.heads["metrics"] == 199
                assert (await snapshot(peer)).state.step == 199

    asyncio.run(scenario())


# --- the rules, without a process


def test_stalled_is_no_step_for_longer_than_ten_seconds_and_five_median_steps() -> None:
    detector = StallDetector()
    for step in range(20):
        detector.observe(progress(step), now=float(step * 4))
    assert detector.limit_s() == 20.0
    for second in range(77, 96):
        detector.observe(progress(19), now=float(second))
    assert detector.verdict(now=95.9) is None
    detector.observe(progress(19), now=97.0)
    verdict = detector.verdict(now=97.0)
    assert verdict is not None
    assert verdict[0].startswith("no step for 21 s, usually 4 s")


@pytest.mark.parametrize("state", ["paused", "evaluating", "checkpointing", "starting"])
def test_a_run_that_says_what_it_is_busy_with_is_not_stalled(state: str) -> None:
    detector = StallDetector()
    for second in range(100):
        detector.observe(progress(5, state), now=float(second))
        assert detector.verdict(now=float(second)) is None
    detector.observe(progress(5), now=100.0)
    detector.observe(progress(5), now=109.0)
    assert detector.verdict(now=109.0) is None, "the clock begins when the hold ends"


def test_a_rank_0_that_says_nothing_is_stalled_whatever_it_said_last() -> None:
    detector = StallDetector()
    detector.observe(progress(5, "paused"), now=0.0)
    assert [detector.verdict(now=float(second)) for second in range(1, 11)] == [None] * 10
    verdict = detector.verdict(now=11.0)
    assert verdict is not None
    assert "has not reported for 11 s" in verdict[0]


def test_time_in_which_the_hub_itself_was_frozen_is_no_stall() -> None:
    detector = StallDetector()
    for step in range(20):
        detector.observe(progress(step), now=float(step))
    assert detector.verdict(now=80.0) is None, "nobody looked for a minute"
    assert [detector.verdict(now=80.0 + second) for second in range(1, 10)] == [None] * 9
    verdict = detector.verdict(now=92.0)
    assert verdict is not None
    assert "has not reported for 12 s" in verdict[0], "from when the hub looked again"


def test_a_stalled_run_that_steps_again_is_running_again(tmp_path: Path) -> None:
    life = RunLife(RunState(state="starting", since=0.0, step=0, step_time=0.0))
    life.hello(LinkHello(info=info(tmp_path), incarnation=1, step=0, pid=1), wall=0.0)
    running = life.progress(progress(1), wall=1.0, now=1.0)
    stalled = [life.tick(wall=float(second), now=float(second)) for second in range(2, 21)][-1]
    assert (stalled.state, stalled.step) == ("stalled", 1)
    event = change(running, stalled, wall=20.0)
    assert event is not None
    assert (event.state, event.before) == ("stalled", "running")
    assert life.tick(wall=30.0, now=30.0).since == stalled.since
    assert life.progress(progress(2), wall=31.0, now=31.0).state == "running"


def test_nothing_follows_a_goodbye(tmp_path: Path) -> None:
    life = RunLife(RunState(state="starting", since=0.0, step=0, step_time=0.0))
    life.hello(LinkHello(info=info(tmp_path), incarnation=1, step=0, pid=1), wall=0.0)
    life.progress(progress(7, steps_per_s=3.0), wall=1.0, now=1.0)
    ended = life.bye(LinkBye(state="finished", step=8), wall=2.0)
    assert (ended.state, ended.step, ended.steps_per_s) == ("finished", 8, None)
    assert life.progress(progress(9), wall=3.0, now=3.0).state == "finished"
    assert life.lost("gone", wall=4.0).state == "finished"
    assert life.bye(LinkBye(state="running", step=8), wall=2.0).state == "failed"


def test_what_a_rank_sent_before_it_died_is_read_though_it_left_our_packets_unread(tmp_path: Path) -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link = RankLink(ours)
        link.send(LinkAck(link=1))
        for step in (1, 2):
            theirs.send(codec.encode(LinkProgress(run=progress(step))))
        theirs.send(b"\xc1 no message")
        theirs.send(codec.encode(LinkBye(state="finished", step=2)))
        theirs.close()  # with the acknowledgement unread, which makes our first read fail
        heard = [await link.receive() for _ in range(4)]
        assert [type(message).__name__ for message in heard] == ["LinkProgress", "LinkProgress", "LinkBye", "NoneType"]
        assert link.refused == 1
        link.close()

    asyncio.run(scenario())
