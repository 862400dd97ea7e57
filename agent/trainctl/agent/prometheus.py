"""The latest reading as Prometheus text, on the loopback interface only.

What is missing has no sample; names and units are those of wire/gauges.py.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Final

from trainctl.wire.gauges import Gauge, Labels, node_gauges, ratio
from trainctl.wire.messages import NodeReading, ProcessReading

log = logging.getLogger(__name__)

_REQUEST_S: Final = 5.0


def render(reading: NodeReading) -> str:
    """Text exposition format, version 0.0.4."""
    families: dict[str, list[str]] = {}
    for name, description, labels, value in _samples(reading):
        if value is None:
            continue
        family = families.setdefault(name, [f"# HELP {name} {description}", f"# TYPE {name} gauge"])
        family.append(f"{name}{{{_text_of(labels)}}} {value!r}")
    return "".join(f"{line}\n" for family in families.values() for line in family)


def _samples(reading: NodeReading) -> Iterator[Gauge]:
    node = {"node": reading.node}
    yield "trainctl_reading_timestamp_seconds", "When this was measured", node, reading.time
    yield from node_gauges(reading, node)
    state = {**node, "state": reading.gpu_state}
    yield "trainctl_gpus_ok", "1 while every GPU answers", state, float(reading.gpu_state == "ok")
    for process in reading.processes:
        yield from _rank_samples(process, node)


def _rank_samples(process: ProcessReading, node: Labels) -> Iterator[Gauge]:
    labels = {**node, "run_id": process.run_id, "rank": str(process.rank), "pid": str(process.pid)}
    yield "trainctl_rank_alive", "1 while the rank's process lives", labels, float(process.alive)
    yield "trainctl_rank_cpu_ratio", "CPU time used, of one core", labels, ratio(process.cpu)
    yield "trainctl_rank_memory_bytes", "Resident memory", labels, process.memory_bytes


def _text_of(labels: Labels) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


async def serve_metrics(port: int, latest: Callable[[], NodeReading]) -> None:
    """Answer `GET /metrics` until cancelled. Without the port, the agent goes on without Prometheus."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError, asyncio.IncompleteReadError):  # it hung up
            async with asyncio.timeout(_REQUEST_S):
                request = await reader.readline()
                while (await reader.readline()).strip():
                    pass
                writer.write(_response(request, latest()))
                await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(answer, "127.0.0.1", port, limit=8192)
    except OSError as error:
        log.warning("Prometheus cannot be served on port %d (%s): the agent works on without it", port, error)
        await asyncio.Event().wait()
        return
    async with server:
        await server.serve_forever()


def _response(request: bytes, reading: NodeReading) -> bytes:
    words = request.split()
    if words[:1] != [b"GET"] or len(words) < 2 or words[1].split(b"?")[0] != b"/metrics":
        status, body = "404 Not Found", "the metrics are at /metrics\n"
    else:
        status, body = "200 OK", render(reading)
    content = body.encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content
