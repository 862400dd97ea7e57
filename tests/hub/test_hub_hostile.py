"""Whatever comes through the link: the hub goes on, records what is right, and answers its clients."""

import asyncio
import contextlib
from pathlib import Path

import msgpack
import psutil
from hub_double import Rank, hub_running, peer_of, rows, snapshot_when

from mutations import hostile
from trainctl.wire import codec
from trainctl.wire.messages import History, HistoryRequest, LinkRecord

GROWTH_BYTES = 64 * 1024 * 1024


def odd() -> list[bytes]:
    """Messages that have the right types and make no sense."""
    good = {"type": "rows", "attempt": 1, "incarnation": 1, "steps": [1], "times": [1.0], "columns": []}
    columns = [{"name": "loss", "dtype": "f8", "data": bytes(8)}, {"name": "cut", "dtype": "f4", "data": b"abc"}]
    bodies = [
        good | {"times": []},
        good | {"steps": [], "columns": columns},
        good | {"steps": [2**64 - 1]},
        good | {"steps": [-(2**63)], "columns": columns},
        good | {"steps": [1, 2, 3], "columns": columns},
        good | {"incarnation": 2**63},
        good | {"times": [float("nan")], "columns": columns},
        good | {"columns": [{"name": "\x1b[2J\x00" * 1000, "dtype": "f8", "data": bytes(8)}]},
        {"type": "ranks", "incarnation": 1, "ranks": []},
        {"type": "state", "time": 1.0, "step": 2**64 - 1, "incarnation": 1, "state": "running"},
        {
            "type": "rollback",
            "time": 1.0,
            "step": 5,
            "incarnation": 1,
            "from_step": 1,
            "from_incarnation": 9,
            "checkpoint": "",
        },
        {"type": "checkpoint", "time": 1.0, "step": 5, "incarnation": 1, "id": "../../etc/passwd"},
        {
            "type": "command",
            "time": 1.0,
            "step": 5,
            "incarnation": 1,
            "id": "x",
            "command": "?",
            "args": {},
            "actor": "",
            "state": "applied",
        },
    ]
    records = [{"type": "record", "link": 0, "body": body} for body in bodies]
    others = [{"type": "agents", "agents": [{"node": "n", "addresses": ["nonsense"], "server_key": "short"}]}]
    return [msgpack.packb(message) for message in records + others]


def test_a_hub_that_is_sent_garbage_goes_on_recording_and_serving(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub:
            rank = Rank(tmp_path / "run")
            rank.connect()
            rank.socket.settimeout(10)
            process, before = psutil.Process(hub.process.pid), 0
            decode = codec.from_rank_decoder()
            number = 0
            for data in hostile(4, 20_000):
                with contextlib.suppress(codec.DecodeError):
                    decode(data)
                    continue  # what is a message is acted on, and some end the run
                if data:
                    rank.socket.send(data)
                number += 1
                before = before or (process.memory_info().rss if number > 2000 else 0)
            for data in odd():
                message = msgpack.unpackb(data)
                if "link" in message:
                    rank.sent += 1
                    message["link"] = rank.sent
                rank.socket.send(msgpack.packb(message))
            rank.record(rows(7, loss=[0.5]))
            async with peer_of(hub.card()) as peer:
                await snapshot_when(peer, lambda found: "loss" in found.metrics and found.metrics["loss"].step == 7)
                found = await peer.ask(HistoryRequest(req=0, metrics=["loss", "cut"]), History)
                assert found.series
            assert process.memory_info().rss - before < GROWTH_BYTES
            assert hub.log.stat().st_size < 100_000, "the log is not filled by who sends garbage"
            rank.close()

    asyncio.run(scenario())


def test_a_packet_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub:
            rank = Rank(tmp_path / "run")
            rank.connect()
            body = rows(1, loss=[1.0])
            with contextlib.suppress(OSError):  # the kernel may refuse it before the hub does
                rank.socket.send(codec.encode(LinkRecord(link=1, body=body)) + bytes(150_000))
            rank.record(rows(2, loss=[0.5]))
            async with peer_of(hub.card()) as peer:
                await snapshot_when(peer, lambda found: "loss" in found.metrics and found.metrics["loss"].step == 2)
            rank.close()

    asyncio.run(scenario())
