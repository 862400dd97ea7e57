"""Server, peer and follower over real sockets: who gets in, who may ask, and that nothing is missed."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from serving import connect, serving

from trainctl.wire.commands import AddNote, Command
from trainctl.wire.follower import Follower
from trainctl.wire.keys import new_keys, source_keys, user_keys
from trainctl.wire.messages import (
    AuditRequest,
    Beat,
    CommandReply,
    CommandRequest,
    Envelope,
    History,
    HistoryRequest,
    NodeReading,
    Nodes,
    NodesRequest,
)
from trainctl.wire.peer import KeyRefused, Peer, Refused, Unreachable
from trainctl.wire.retained import Retained


def reading(number: int) -> NodeReading:
    return NodeReading(node="node-a", time=float(number), interval_s=1.0)


def test_the_owner_needs_no_set_up_and_is_admin() -> None:
    async def scenario() -> None:
        async with serving() as server:
            peer = await connect(server, user_keys())
            assert (peer.welcome.role, peer.welcome.name, peer.welcome.epoch) == ("admin", "node-a", 1)
            assert await peer.ask(NodesRequest(req=0), Nodes) == Nodes(req=2, nodes=[])
            peer.close()

    asyncio.run(scenario())


def test_a_stranger_is_told_that_the_key_is_unknown() -> None:
    async def scenario() -> None:
        async with serving() as server:
            with pytest.raises(KeyRefused, match="does not know this key"):
                await connect(server, new_keys())

    asyncio.run(scenario())


def test_a_wrong_server_key_never_reaches_the_other_end() -> None:
    async def scenario() -> None:
        async with serving() as server:
            with pytest.raises((KeyRefused, Unreachable)):
                await connect(server, user_keys(), new_keys().public)

    asyncio.run(scenario())


def test_nobody_there_is_unreachable_and_a_bad_key_is_a_value_error() -> None:
    async def scenario() -> None:
        with pytest.raises(Unreachable):
            await Peer.connect(["tcp://127.0.0.1:9"], source_keys().public, user_keys(), timeout_s=0.3)
        with pytest.raises(ValueError, match="Z85"):
            await Peer.connect(["tcp://127.0.0.1:9"], "short", user_keys(), timeout_s=0.3)

    asyncio.run(scenario())


def test_a_viewer_may_look_and_not_act(tmp_path: Path) -> None:
    viewer = new_keys()
    grants = tmp_path / "grants.json"
    grants.write_text(f'[{{"name": "ann", "key": "{viewer.public}", "role": "viewer"}}]')

    async def scenario() -> None:
        async with serving(grants) as server:
            peer = await connect(server, viewer)
            assert peer.welcome.actor == "ann"
            await peer.ask(NodesRequest(req=0), Nodes)
            note = Command(id="n1", action=AddNote(text="hello"))
            for request, answer in (
                (CommandRequest(req=0, command=note), CommandReply),
                (AuditRequest(req=0), Nodes),
            ):
                with pytest.raises(Refused, match="ann is viewer here, and this needs operator") as refusal:
                    await peer.ask(request, answer)
                assert refusal.value.code == "not_allowed"
            grants.unlink()
            assert server._authority.who(viewer.public) is None
            peer.close()

    asyncio.run(scenario())


def test_a_request_that_is_too_large_is_told_so_under_its_own_number() -> None:
    async def scenario() -> None:
        async with serving() as server:
            peer = await connect(server, user_keys())
            names = [f"model.layers.{number}.self_attn.grad_norm" for number in range(10_000)]
            for metrics in (names, ["n" * 100_000]):
                with pytest.raises(Refused, match="over the limit of 65536") as refusal:
                    await peer.ask(HistoryRequest(req=0, metrics=metrics), History, timeout_s=10)
                assert refusal.value.code == "too_large"
            assert isinstance(await peer.ask(NodesRequest(req=0), Nodes), Nodes), "and the next one is answered"
            peer.close()

    asyncio.run(scenario())


def test_a_follower_gets_every_message_once_and_in_order_even_when_some_are_never_sent() -> None:
    async def scenario() -> None:
        async with serving() as server:
            peer = await connect(server, user_keys())
            for number in (1, 2):
                server.publish(reading(number))
            seen: list[int] = []
            beats = 0
            async for item in Follower(peer, ("nodes",), snapshot=False).items():
                if isinstance(item, Beat):
                    beats += 1
                    if beats == 1:
                        for number in range(3, 60):
                            envelope, encoded = server.number(reading(number))
                            if number % 7:
                                server.send(envelope, encoded)
                            else:  # numbered and kept, never published: lost on the way
                                server._kept["nodes"].append(envelope.seq, encoded)
                elif isinstance(item, Envelope):
                    seen.append(item.seq)
                if len(seen) >= 57:
                    break
            assert seen == list(range(3, 60))
            peer.close()

    asyncio.run(scenario())


def test_who_subscribes_hears_a_heartbeat_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainctl.wire.server.BEAT_INTERVAL_S", 1000.0)

    async def scenario() -> None:
        async with serving() as server:
            for _ in range(3):  # the second one to a topic is noticed like the first
                peer = await connect(server, user_keys())
                async with contextlib.aclosing(Follower(peer, ("nodes",), snapshot=False).items()) as items:
                    assert isinstance(await anext(items), Beat)
                peer.close()

    asyncio.run(scenario())


def test_a_range_of_which_the_beginning_was_never_sent_is_given_from_what_there_is() -> None:
    kept = Retained(10)
    for seq in (1, 2, 4, 5, 9):
        kept.append(seq, str(seq).encode())
    assert kept.range(1, 9) == [b"1", b"2", b"4", b"5", b"9"]
    assert kept.range(3, 4) == [b"4"]
    assert kept.range(4, 5) == [b"4", b"5"]
    assert kept.range(9, 20) == [b"9"]
    assert kept.range(10, 20) == []
    assert kept.range(0, 5) is None


def test_of_several_addresses_the_first_to_answer_is_taken_and_the_others_are_let_go() -> None:
    async def scenario() -> None:
        async with serving() as server:
            addresses = [f"tcp://127.0.0.1:{server.port}"] * 3
            for _ in range(30):
                peer = await Peer.connect(addresses, source_keys().public, user_keys(), timeout_s=5)
                assert peer.welcome.source == "a1"
                peer.close()

    asyncio.run(scenario())
