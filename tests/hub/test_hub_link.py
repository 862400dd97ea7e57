"""The way of the data: rank 0 → link → hub → journal and subscribers, across the hub's death."""

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path

from hub_double import HubProcess, Rank, following, hub_running, peer_of, rank_linked, rows, snapshot, snapshot_when

from trainctl.store.replay import load_record
from trainctl.wire.cards import read_cards
from trainctl.wire.messages import Anomaly, Beat, Envelope, LinkAck, StateChanged
from trainctl.wire.paths import link_socket
from waiting import until


def steps_of(items: Sequence[object]) -> list[int]:
    return [
        step for item in items if isinstance(item, Envelope) and item.stream == "metrics" for step in item.body.steps
    ]


def test_rows_reach_a_follower_in_order_and_a_latecomer_finds_them_in_the_snapshot(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            async with peer_of(hub.card()) as peer:
                async with following(peer) as heard:
                    for step in range(1, 41):
                        rank.record(rows(step))
                    await heard.until(lambda item: steps_of([item]) == [40])
                    assert steps_of(heard.items) == list(range(1, 41))
                late = await snapshot(peer)
                assert late.heads["metrics"] == 40
                assert (late.metrics["loss"].step, late.metrics["loss"].value) == (40, 1 / 40)

    asyncio.run(scenario())


def test_what_is_on_disk_is_acknowledged_and_what_is_sent_twice_is_recorded_once(tmp_path: Path) -> None:
    with hub_running(tmp_path / "run"), rank_linked(tmp_path / "run") as rank:
        assert rank.have == 0
        for step in (1, 2, 3):
            rank.record(rows(step))
        rank.record(rows(2), link=2)
        until(lambda: rank.hear(LinkAck).link == 3, what="the acknowledgement of the third record")
        again = Rank(tmp_path / "run")
        assert again.connect().have == 3
        again.close()
    found = load_record(tmp_path / "run").metrics.query("loss")
    assert found["step"].tolist() == [1, 2, 3]


def test_a_killed_hub_comes_back_at_the_same_port_with_no_hole_in_the_history(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub:
            rank = Rank(tmp_path / "run")
            rank.connect()
            for step in range(1, 11):
                rank.record(rows(step))
            before = hub.card()
            async with peer_of(before) as peer:
                await snapshot_when(peer, lambda found: found.heads["metrics"] == 10)
            hub.kill()
            rank.close()
        with hub_running(tmp_path / "run") as hub:
            after = hub.card()
            assert after.epoch > before.epoch
            assert (after.addresses, after.publish_port) == (before.addresses, before.publish_port)
            again = Rank(tmp_path / "run")
            assert again.connect().have == 10
            again.sent = 8  # the rank kept the newest and sends them again
            for step in range(9, 21):
                again.record(rows(step))
            async with peer_of(after) as peer:
                found = await snapshot_when(peer, lambda found: found.heads["metrics"] == 20)
                assert found.metrics["loss"].step == 20
                states = [event for event in found.events if isinstance(event, StateChanged)]
                assert [event.state for event in states] == ["starting"], "the attempt began once"
            again.close()
        assert load_record(tmp_path / "run").metrics.query("loss")["step"].tolist() == list(range(1, 21))

    asyncio.run(scenario())


def test_the_beat_carries_the_state_that_rank_0_says(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            async with peer_of(hub.card()) as peer:
                async with following(peer) as heard:
                    rank.step(3)
                    rank.step(4, "paused", by="ann")
                    beat = await heard.until(
                        lambda item: isinstance(item, Beat) and item.run is not None and item.run.state == "paused"
                    )
                assert isinstance(beat, Beat)
                assert beat.run is not None
                assert (beat.run.step, beat.run.by, beat.run.total_steps) == (4, "ann", 500)
                told = [event.state for event in (await snapshot(peer)).events if isinstance(event, StateChanged)]
                assert told == ["starting", "running", "paused"]

    asyncio.run(scenario())


def test_a_metric_that_becomes_nan_is_an_event(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            rank.record(rows(1, 2, 3, loss=[1.0, float("nan"), float("nan")]))
            async with peer_of(hub.card()) as peer:
                found = await snapshot_when(peer, lambda found: any(isinstance(e, Anomaly) for e in found.events))
                told = [event for event in found.events if isinstance(event, Anomaly)]
                assert [(event.what, event.metric, event.step) for event in told] == [("nan", "loss", 2)]

    asyncio.run(scenario())


def test_a_second_hub_of_the_run_on_this_machine_leaves_at_once(tmp_path: Path) -> None:
    with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run"):
        second = HubProcess(tmp_path / "run")
        assert second.process.wait(15) == 0
        assert hub.process.poll() is None


def test_a_hub_that_was_superseded_leaves_and_the_newer_one_goes_on(tmp_path: Path) -> None:
    other = tmp_path / "t"
    other.mkdir()
    with hub_running(tmp_path / "run") as old, rank_linked(tmp_path / "run") as rank:
        rank.record(rows(1))
        until(lambda: rank.hear(LinkAck).link == 1)
        # Another machine sees the run's directory and not our sockets.
        with hub_running(tmp_path / "run", env={"TMPDIR": str(other)}) as new:
            assert old.process.wait(10) == 0
            assert new.process.poll() is None
            assert new.card().epoch == 2


def test_sigterm_is_ignored_while_rank_0_is_linked_and_obeyed_afterwards(tmp_path: Path) -> None:
    with hub_running(tmp_path / "run") as hub:
        with rank_linked(tmp_path / "run") as rank:
            hub.process.send_signal(signal.SIGTERM)
            rank.record(rows(1))
            until(lambda: rank.hear(LinkAck).link == 1)
            rank.bye()
        until(lambda: "is not linked any more" in hub.log.read_text())
        hub.process.send_signal(signal.SIGTERM)
        assert hub.process.wait(10) == 0


def test_the_hub_leaves_a_while_after_the_run_ended_and_takes_its_card_along(tmp_path: Path) -> None:
    with hub_running(tmp_path / "run", linger_s=0.5) as hub:
        with rank_linked(tmp_path / "run") as rank:
            rank.bye("stopped", 12)
        assert hub.process.wait(10) == 0
    assert read_cards() == []
    assert not link_socket("demo-1").exists()
    record = load_record(tmp_path / "run")
    assert (record.state.state, record.state.step) == ("stopped", 12)
