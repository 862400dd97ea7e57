"""Checkpoints through a real hub: deleted by an operator, verified with progress, and what rank 0 hears of trouble."""

import asyncio
import json
import time
from pathlib import Path

from hub_double import Rank, first_reply, hub_running, peer_of, rank_linked, request, rows, snapshot, snapshot_when
from test_hub_commands import checkpoint

from trainctl.client.model import RunModel
from trainctl.hub.health import Health
from trainctl.hub.link import RankLine
from trainctl.wire.commands import CheckpointPin, CheckpointRemove, Rollback
from trainctl.wire.manifest import list_checkpoints
from trainctl.wire.messages import (
    Anomaly,
    CheckpointInfo,
    CheckpointRemoved,
    CommandReply,
    CommandUpdate,
    Envelope,
    LinkCommand,
    LinkTrouble,
    Severity,
    Trouble,
    Verified,
    Verifying,
    VerifyRequest,
)
from trainctl.wire.peer import Peer


def envelope(event: CheckpointRemoved) -> Envelope:
    return Envelope(source="s", epoch=1, stream="events", seq=1, time=event.time, body=event)


async def removed(peer: Peer, target: str, command_id: str) -> CommandUpdate:
    """The outcome of a removal."""
    last: CommandUpdate | None = None
    async for reply in peer.replies(request(CheckpointRemove(checkpoint=target), command_id), timeout_s=10.0):
        assert isinstance(reply, CommandReply)
        last = reply.update
        if last.state != "accepted":
            break
    assert last is not None
    return last


def test_an_operator_deletes_what_may_go_and_is_told_why_the_rest_may_not(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    async def scenario() -> None:
        pinned, target, spare, newest = (checkpoint(run_dir, step) for step in (10, 20, 30, 40))
        with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
            rank.step(50, "starting")
            async with peer_of(hub.card()) as peer:
                early = await removed(peer, spare, "r0")
                assert (early.state, "is starting" in str(early.reason)) == ("rejected", True)
                rank.step(50)
                await snapshot_when(peer, lambda found: found.state.state == "running")
                await first_reply(peer, request(CheckpointPin(checkpoint=pinned), "p1"))
                await first_reply(peer, request(Rollback(target="20"), "b1"))
                assert isinstance(await asyncio.to_thread(rank.hear, LinkCommand), LinkCommand)
                told = {name: await removed(peer, name, f"r-{name}") for name in (pinned, target, newest, "step-x")}
                assert {update.state for update in told.values()} == {"rejected"}
                words = [str(update.reason) for update in told.values()]
                for word, reason in zip(("pinned", "goes back to", "last good", "no checkpoint"), words, strict=True):
                    assert word in reason
                assert (await removed(peer, spare, "r1")).state == "applied"
                assert not (run_dir / "checkpoints" / spare).exists()
                found = await snapshot(peer)
                assert [info.step for info in found.checkpoints] == [10, 20, 40]
                assert found.checkpoints[-1].verified is True, "verified before another one was deleted"
                (event,) = (event for event in found.events if isinstance(event, CheckpointRemoved))
                assert (event.id, event.bytes) == (spare, 1000)
        lines = [json.loads(line) for line in (run_dir / "audit.jsonl").read_text().splitlines()]
        assert [line["state"] for line in lines if line["id"] == "r1"] == ["accepted", "applied"]

    asyncio.run(scenario())


def test_a_state_in_memory_alone_cannot_be_deleted_and_does_not_count_as_the_last_good_one(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    async def scenario() -> None:
        spare, last = checkpoint(run_dir, 10), checkpoint(run_dir, 20)
        held = [info for info in list_checkpoints(run_dir / "checkpoints") if info.id == spare]
        newest = CheckpointInfo(id="step-30", step=30, time=time.time(), bytes=1000, incarnation=1)
        with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
            rank.step(50, in_memory=[*held, newest])
            async with peer_of(hub.card()) as peer:
                await snapshot_when(peer, lambda found: bool(found.state.in_memory))
                told = {name: await removed(peer, name, f"r-{name}") for name in (newest.id, last)}
                assert "memory only" in str(told[newest.id].reason)
                assert "last good" in str(told[last].reason)
                model = RunModel()
                model.apply(await snapshot(peer))
                assert (await removed(peer, spare, "r1")).state == "applied"
                found = await snapshot(peer)
                assert {info.id: info.where for info in found.checkpoints} == {
                    spare: "memory",
                    last: "disk",
                    newest.id: "memory",
                }
                (event,) = (event for event in found.events if isinstance(event, CheckpointRemoved))
                model.apply(envelope(event))
                assert model.checkpoints[0].where == "memory", "what follows the events sees the same"

    asyncio.run(scenario())


def test_the_last_one_that_is_good_stays_when_the_newest_turns_out_to_be_damaged(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    async def scenario() -> None:
        good, newest = checkpoint(run_dir, 10), checkpoint(run_dir, 20)
        (run_dir / "checkpoints" / newest / "model.bin").write_bytes(b"x" * 1000)
        with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
            rank.step(50)
            async with peer_of(hub.card()) as peer:
                await snapshot_when(peer, lambda found: found.state.state == "running")
                told = await removed(peer, good, "r1")
                assert (told.state, "last good" in str(told.reason)) == ("rejected", True)
                assert (await removed(peer, newest, "r2")).state == "applied"
        assert (run_dir / "checkpoints" / good / "model.bin").exists()

    asyncio.run(scenario())


def test_a_verification_says_how_far_it_is_to_those_who_ask(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    async def scenario() -> None:
        name = checkpoint(run_dir, 10)
        with hub_running(run_dir) as hub:
            async with peer_of(hub.card()) as peer:
                heard = []
                async for reply in peer.replies(VerifyRequest(req=0, id=name, progress=True), timeout_s=10.0):
                    heard.append(reply)
                    if isinstance(reply, Verified):
                        break
                assert [type(reply) for reply in heard[:-1]] == [Verifying] * (len(heard) - 1)
                assert len(heard) > 1
                first = heard[0]
                assert isinstance(first, Verifying)
                assert (first.id, first.total_bytes) == (name, 1000)
                assert (await peer.ask(VerifyRequest(req=0, id=name), Verified)).ok, "the only reply, as ever"

    asyncio.run(scenario())


def test_rank_0_hears_of_trouble_and_the_next_rank_0_of_all_of_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with hub_running(run_dir), rank_linked(run_dir) as rank:
        assert rank.hear(LinkTrouble).troubles == []
        rank.record(rows(1, 2, 3, loss=[1.0, float("nan"), 1.0]))
        assert rank.hear(LinkTrouble).troubles == [Trouble(incarnation=1, first=2)]
        rank.close()
        again = Rank(run_dir)
        again.connect(step=3)
        assert again.hear(LinkTrouble).troubles == [Trouble(incarnation=1, first=2)]
        again.close()


def anomaly(step: int, severity: Severity, **more: object) -> Anomaly:
    made = {"what": "loss-spike", "metric": "loss", "incarnation": 1} | more
    return Anomaly(time=1.0, step=step, text="", severity=severity, **made)  # type: ignore[arg-type]


def test_trouble_is_an_episode_of_one_metric_from_its_warning_to_the_all_clear() -> None:
    health = Health(
        RankLine(),
        [
            anomaly(5, "good"),  # what never began is no trouble
            anomaly(10, "warning"),
            anomaly(12, "error", what="nan", metric="val_loss"),
            anomaly(14, "error", what="inf", metric="val_loss"),  # the same episode
            anomaly(20, "good"),
            anomaly(25, "good", what="inf", metric="val_loss"),
            anomaly(30, "info", what="nan", metric="grad_norm"),
            anomaly(35, "warning", metric=None, what="disk"),
            anomaly(40, "warning", incarnation=2),
        ],
    )
    assert health.troubles() == [
        Trouble(incarnation=1, first=10, last=20),
        Trouble(incarnation=1, first=12, last=25),
        Trouble(incarnation=2, first=40),
    ]
