"""Programs of different versions meet: what is the same goes on working, and what is not is said in so many words."""

import asyncio

import msgpack
import pytest
import zmq
from serving import connect, serving
from test_hostile import answer, dealer

from trainctl.client.errors import OtherVersion
from trainctl.client.wire_errors import from_peer
from trainctl.wire import peer as peer_module
from trainctl.wire import server as server_module
from trainctl.wire.keys import user_keys
from trainctl.wire.peer import Refused


def hello(*versions: int, **more: object) -> bytes:
    return bytes(msgpack.packb({"type": "hello", "req": 1, "versions": list(versions), "client": "test"} | more))


def test_a_newer_client_that_still_speaks_this_version_is_welcome() -> None:
    async def scenario() -> None:
        async with serving() as server, dealer(server) as socket:
            await socket.send(hello(3, 2, 1, capabilities=["of-tomorrow"]))
            welcome = await answer(socket)
            assert (welcome["type"], welcome["version"], welcome["kind"]) == ("welcome", 1, "agent")

    asyncio.run(scenario())


def test_a_newer_client_that_does_not_is_told_what_is_spoken_here() -> None:
    async def scenario() -> None:
        async with serving() as server, dealer(server) as socket:
            await socket.send(hello(2, 3))
            refusal = await answer(socket)
            assert (refusal["type"], refusal["req"], refusal["code"]) == ("error", 1, "version")
            assert refusal["message"] == "this agent speaks protocol 1, the client [2, 3]"

    asyncio.run(scenario())


def test_a_newer_source_refuses_this_client_and_the_operator_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        async with serving() as server:
            monkeypatch.setattr(server_module, "PROTOCOL", 2)
            with pytest.raises(Refused, match=r"this agent speaks protocol 2, the client \[1\]") as refused:
                await connect(server, user_keys())
            told = from_peer(refused.value, "gpt")
            assert isinstance(told, OtherVersion)
            assert "install the same trainctl-cockpit on both sides" in told.hint

    asyncio.run(scenario())


def test_an_older_source_refuses_a_newer_client_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving() as server:
            monkeypatch.setattr(peer_module, "PROTOCOL", 2)
            with pytest.raises(Refused, match=r"this agent speaks protocol 1, the client \[2\]"):
                await connect(server, user_keys())

    asyncio.run(scenario())


def test_a_source_that_chooses_a_version_nobody_offered_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving() as server:
            welcome = server._welcome

            def otherwise(request: server_module.Hello, caller: server_module.Caller) -> server_module.Welcome:
                return server_module.msgspec.structs.replace(welcome(request, caller), version=7)

            monkeypatch.setattr(server, "_welcome", otherwise)
            with pytest.raises(Refused, match="speaks protocol 7, this client 1") as refused:
                await connect(server, user_keys())
            assert refused.value.code == "version"

    asyncio.run(scenario())


def test_a_request_of_tomorrow_is_refused_by_its_number_and_the_next_one_answered() -> None:
    async def scenario() -> None:
        async with serving() as server, dealer(server) as socket:
            await socket.send(msgpack.packb({"type": "teleport", "req": 9, "where": "home"}))
            refusal = await answer(socket)
            assert (refusal["req"], refusal["code"]) == (9, "bad_request")
            await socket.send(msgpack.packb({"type": "nodes", "req": 10, "why": "a field of tomorrow"}))
            assert (await answer(socket)) == {"type": "nodes", "req": 10, "nodes": []}
            assert await socket.poll(0, zmq.POLLIN) == 0

    asyncio.run(scenario())
