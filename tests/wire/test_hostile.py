"""Whatever bytes arrive: no crash, no growth, a counted refusal; and who serves goes on serving."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgpack
import pytest
import zmq
import zmq.asyncio
from serving import Echo, connect, serving

from mutations import hostile
from trainctl.wire import codec
from trainctl.wire.follower import EnvelopeReader, Follower
from trainctl.wire.keys import source_keys, user_keys
from trainctl.wire.messages import Beat, Envelope, NodeReading, Nodes, NodesRequest, Reply, Request
from trainctl.wire.peer import Refused
from trainctl.wire.server import Caller, Server
from trainctl.wire.sockets import client_socket, new_context

DECODERS: dict[str, Callable[[], codec.Decoder]] = {
    "envelope": codec.envelope_decoder,
    "beat": codec.beat_decoder,
    "request": codec.request_decoder,
    "reply": codec.reply_decoder,
    "from rank": codec.from_rank_decoder,
    "to rank": codec.to_rank_decoder,
}
MUTATIONS = 100_000
GROWTH_BYTES = 16 * 1024 * 1024


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_hundred_thousand_damaged_messages_end_in_counted_refusals_and_no_growth() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    decoders = [make() for make in DECODERS.values()]
    refused = taken = 0
    before = 0
    for number, data in enumerate(hostile(seed, MUTATIONS)):
        if number == MUTATIONS // 10:
            before = resident_bytes()
        for decode in decoders:
            try:
                message = decode(data)
            except codec.DecodeError:
                refused += 1
            else:
                taken += 1
                assert codec.encode(message), "what was taken can be passed on"
    assert resident_bytes() - before < GROWTH_BYTES, f"seed {seed}"
    assert sum(decode.refused for decode in decoders) == refused
    assert refused + taken == MUTATIONS * len(decoders)
    assert refused > MUTATIONS


@pytest.mark.parametrize("name", DECODERS)
def test_too_large_too_deep_cut_off_and_of_the_wrong_type_is_refused(name: str) -> None:
    decode = DECODERS[name]()
    bad = [
        b"",
        bytes(decode.limit + 1),
        b"\x91" * decode.limit,
        b"\x81\xa1a" * (decode.limit // 3),
        b"\x81\xa4type" + b"\x91" * 60_000,
        msgpack.packb({"unknown": [[[{}]]] * 1000}),
        msgpack.packb({"type": ["hello"]}),
        msgpack.packb({"type": "hello", "req": None, "epoch": "one"}),
        msgpack.packb({1: 2}),
        msgpack.packb(msgpack.ExtType(5, b"x" * 100)),
        msgpack.packb("hello"),
        msgpack.packb(None),
    ]
    for data in bad:
        with pytest.raises(codec.DecodeError):
            decode(data)
    assert decode.refused == len(bad)


def test_of_a_published_message_at_least_the_numbers_are_read_if_any() -> None:
    read = EnvelopeReader()
    for data in hostile(1, 3000):
        read(data)
    assert read.refused > 0
    newer = {"source": "r", "epoch": 2, "stream": "events", "seq": 7, "time": 1.0, "body": {"type": "of-tomorrow"}}
    assert getattr(read(msgpack.packb(newer)), "seq", None) == 7
    known = newer | {
        "v": 2,
        "body": {"type": "note", "time": 1.0, "step": 1, "incarnation": 1, "actor": "a", "text": ""},
    }
    assert type(read(msgpack.packb(known))).__name__ == "Unreadable", "its fields may mean something else by now"


def test_a_server_that_is_sent_garbage_goes_on_serving() -> None:
    async def scenario() -> None:
        async with serving() as server, dealer(server) as sender:
            peer = await connect(server, user_keys())
            before = resident_bytes()
            for number, data in enumerate(hostile(2, 10_000)):
                await sender.send_multipart([data] if number % 50 else [data, data, b""])
                if number % 1000 == 0:  # others are served meanwhile
                    await peer.ask(NodesRequest(req=0), Nodes, timeout_s=30)
            await sender.send(bytes(3 * 1024 * 1024))
            await sender.send(bytes(5 * 1024 * 1024))  # past what the socket takes: who sends this is cut off
            await peer.ask(NodesRequest(req=0), Nodes, timeout_s=30)
            async with asyncio.timeout(30):
                await sender.send(codec.encode(NodesRequest(req=77)))
                while (await answer(sender)).get("req") != 77:  # it comes back, and is served as well
                    await sender.send(codec.encode(NodesRequest(req=77)))
            assert server.refused > 9000
            assert resident_bytes() - before < 4 * GROWTH_BYTES
            peer.close()

    asyncio.run(scenario())


def test_a_client_that_is_sent_garbage_goes_on_following() -> None:
    async def scenario() -> None:
        async with serving() as server:
            peer = await connect(server, user_keys())
            follower = Follower(peer, ("nodes",), snapshot=False)
            read = EnvelopeReader()
            beat = codec.decoder(Beat, codec.DATA_LIMIT)
            async with contextlib.aclosing(follower.items()) as items:  # type: ignore[type-var]
                assert isinstance(await anext(items), Beat)
                for data in hostile(3, 2000):
                    if read(data) is None:  # what can be read is believed: the key was the source's
                        server._send(b"nodes", data)
                    with contextlib.suppress(codec.DecodeError):
                        beat(data)
                        continue
                    server._send(b"beat", data)
                await server._publisher.send_multipart([b"nodes"])
                await server._publisher.send_multipart([b"nodes", b"", b"more"])
                sent = server.publish(NodeReading(node="node-a", time=1.0, interval_s=1.0))
                async with asyncio.timeout(30):
                    while not (isinstance(item := await anext(items), Envelope) and item.body == sent.body):
                        pass
            assert follower.refused > 1000
            peer.close()

    asyncio.run(scenario())


def test_an_answer_that_no_client_would_take_is_an_error_that_says_so() -> None:
    class Talkative(Echo):
        async def handle(self, request: Request, caller: Caller) -> Reply | None:
            return Nodes(req=caller.req, nodes=[NodeReading(node="n" * 3_000_000, time=1.0, interval_s=1.0)])

    async def scenario() -> None:
        async with serving(handler=Talkative()) as server:
            peer = await connect(server, user_keys())
            with pytest.raises(Refused, match="at most 2097152 may be sent") as refused:
                await peer.ask(NodesRequest(req=0), Nodes)
            assert refused.value.code == "too_large"
            peer.close()

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def dealer(server: Server) -> AsyncIterator[zmq.asyncio.Socket]:
    """A socket with a good key and no manners."""
    context = new_context()
    socket = client_socket(context, zmq.DEALER, user_keys(), source_keys().public)
    socket.connect(f"tcp://127.0.0.1:{server.port}")
    try:
        yield socket
    finally:
        socket.close(0)
        context.term()


async def answer(socket: zmq.asyncio.Socket) -> dict[str, object]:
    return msgpack.unpackb(await socket.recv()) if await socket.poll(1000) else {}
