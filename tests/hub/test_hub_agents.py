"""The hub follows the agents of the run's nodes: one connection to the hub shows every node."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hub_double import following, hub_running, peer_of, rank_linked, snapshot, snapshot_when

from trainctl.hub.awake import AwakeClock
from trainctl.store.replay import load_record
from trainctl.wire.cards import write_card
from trainctl.wire.follower import Follower
from trainctl.wire.keys import Authority, source_keys, user_keys
from trainctl.wire.messages import (
    Beat,
    Card,
    Envelope,
    LinkAgents,
    NodeChanged,
    NodeReading,
    Reply,
    Request,
    RunState,
    SourceAddress,
    Stream,
)
from trainctl.wire.peer import Peer
from trainctl.wire.server import Caller, Identity, Server


class Silent:
    """An agent that is only listened to."""

    async def handle(self, request: Request, caller: Caller) -> Reply | None:
        return None

    def recorded(self, stream: Stream, first: int, last: int) -> list[bytes] | None:
        return None

    def run_state(self) -> RunState | None:
        return None


@contextlib.asynccontextmanager
async def agent(epoch: int = 1) -> AsyncIterator[Server]:
    server = Server(
        identity=Identity(kind="agent", source="a1", name="node-a", epoch=epoch),
        keys=source_keys(),
        authority=Authority(user_keys().public),
        handler=Silent(),
    )
    await server.start("127.0.0.1")
    task = asyncio.create_task(server.serve())
    try:
        yield server
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.close()


def address_of(server: Server) -> SourceAddress:
    addresses = [f"tcp://127.0.0.1:{server.port}"]
    return SourceAddress(node="node-a", addresses=addresses, server_key=source_keys().public, source="a1")


def reading(number: int) -> NodeReading:
    return NodeReading(node="node-a", time=float(number), interval_s=1.0, cpu=12.0)


async def publishing(server: Server, until_heard: "asyncio.Event") -> None:
    """Read the node often until somebody has heard of it: the hub connects when it does."""
    number = 0
    while not until_heard.is_set():
        number += 1
        server.publish(reading(number))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(until_heard.wait(), 0.05)


def is_node(item: object, state: str) -> bool:
    return isinstance(item, Envelope) and isinstance(item.body, NodeReading) and item.body.state == state


def is_event(item: object, state: str) -> bool:
    return isinstance(item, Envelope) and isinstance(item.body, NodeChanged) and item.body.state == state


def test_readings_are_relayed_a_silent_agent_is_lost_and_one_that_comes_back_is_found(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    async def scenario() -> None:
        with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
            async with peer_of(hub.card()) as peer, following(peer) as heard:
                async with agent() as first:
                    rank.say(LinkAgents(agents=[address_of(first)]))
                    seen = asyncio.Event()
                    telling = asyncio.create_task(publishing(first, seen))
                    await heard.until(lambda item: is_node(item, "alive"))
                    seen.set()
                    await telling
                gone = time.monotonic()
                await heard.until(lambda item: is_node(item, "lost"))
                assert time.monotonic() - gone < 15.0
                await heard.until(lambda item: is_event(item, "lost"))
                lost = (await snapshot(peer)).nodes[0]
                assert (lost.state, lost.cpu) == ("lost", None), "what was read last is not true now"
                # Started again: another port, which its new card tells.
                async with agent(epoch=2) as second:
                    card = Card(
                        kind="agent",
                        source="a1",
                        name="node-a",
                        epoch=2,
                        addresses=address_of(second).addresses,
                        server_key=source_keys().public,
                        host=socket.gethostname(),
                        pid=os.getpid(),
                        started=time.time(),
                    )
                    write_card(card)
                    await heard.until(lambda item: is_event(item, "alive"), timeout_s=15)
                    seen = asyncio.Event()
                    telling = asyncio.create_task(publishing(second, seen))
                    await snapshot_when(peer, lambda found: found.nodes[0].state == "alive")
                    seen.set()
                    await telling
                    rank.bye()
        assert load_record(run_dir).nodes["node-a"].cpu == 12.0

    asyncio.run(scenario())


async def heard_for(server: Server, beats: int) -> None:
    """Follow an agent until it has beaten so often, once a second."""
    address = address_of(server)
    peer = await Peer.connect(address.addresses, address.server_key, user_keys())
    try:
        async for item in Follower(peer, streams=("nodes",), snapshot=False).items():
            beats -= isinstance(item, Beat)
            if not beats:
                return
    finally:
        peer.close()


def test_a_hub_that_stood_still_does_not_call_an_agent_lost(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    async def scenario() -> None:
        with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
            async with agent() as well, peer_of(hub.card()) as peer:
                rank.say(LinkAgents(agents=[address_of(well)]))
                seen = asyncio.Event()
                telling = asyncio.create_task(publishing(well, seen))
                await snapshot_when(peer, lambda found: found.nodes)
                seen.set()
                await telling
                os.kill(hub.process.pid, signal.SIGSTOP)
                await heard_for(well, beats=5)
                os.kill(hub.process.pid, signal.SIGCONT)
                seen = asyncio.Event()
                telling = asyncio.create_task(publishing(well, seen))
                head = well.heads["nodes"]
                await snapshot_when(peer, lambda found: found.nodes[0].time > head)
                seen.set()
                await telling
                told = [event for event in (await snapshot(peer)).events if isinstance(event, NodeChanged)]
                assert told == [], "it was heard again as soon as the hub read"

    asyncio.run(scenario())


def test_the_time_of_a_hub_that_stands_still_counts_a_second_at_most() -> None:
    clock = AwakeClock(100.0)
    for now in (100.5, 101.0, 101.5):
        clock.pulse(now)
    assert clock.at(101.8) == pytest.approx(1.8)
    assert clock.at(121.5) == pytest.approx(2.5), "before it pulses again"
    clock.pulse(121.5)
    clock.pulse(125.5)  # starved
    assert clock.at(126.0) == pytest.approx(4.0)
