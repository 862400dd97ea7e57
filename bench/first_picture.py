"""How long a client that joins late waits for its first complete picture. One JSON line.

usage: first_picture.py [--steps 100000] [--joins 20]

A real hub process on a run with `--steps` steps of ten metrics. Each join opens a session as the cockpit does: find the
card, connect, subscribe, take the snapshot, ask for 720 points of every metric (180 columns). The promise is 100 ms.
The floor, in turn with the joins, is bare ZeroMQ on the same machine: connect, without keys, and get one answer of as
many bytes. With few joins the p99 is the slowest one.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import zmq

from trainctl.client.discover import hub_cards
from trainctl.client.session import open_session
from trainctl.store.frames import recorded_segments, segments
from trainctl.store.journal import JournalIndex, JournalWriter
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.saved import packed_sizes, write_index
from trainctl.wire import codec
from trainctl.wire.messages import Column, Envelope, Rows, RunInfo, Snapshot
from trainctl.wire.rundir import RunDir

METRICS = [f"metric_{number}" for number in range(10)]
RUN = "bench-20260101-000000-0000"
POINTS = 4 * 180  # what a cockpit of 180 columns asks for
_ROWS = 20


def record_run(run: RunDir, steps: int) -> None:
    """A run's directory as a hub leaves it: packed, with its index."""
    info = RunInfo(run="bench", id=RUN, dir=str(run.path), host="h", created=0, started=0, world_size=1, attempt=1)
    run.create()
    run.info_file.write_bytes(msgspec.json.encode(info))
    record, index, random = RunRecord(info), JournalIndex(run.journal), np.random.default_rng(1)
    writer = JournalWriter(run.journal, index=index)
    for seq, first in enumerate(range(1, steps + 1, _ROWS), 1):
        made = list(range(first, min(first + _ROWS, steps + 1)))
        columns = [
            Column(name=name, dtype="f4", data=random.normal(size=len(made)).astype("<f4").tobytes())
            for name in METRICS
        ]
        body = Rows(attempt=1, incarnation=1, steps=made, times=[1.7e9 + step / 20 for step in made], columns=columns)
        envelope = Envelope(
            source=RUN, epoch=1, stream="metrics", seq=seq, time=body.times[-1], body=body, attempt=1, link=seq
        )
        writer.append(codec.encode(envelope), "metrics", seq)
        record.apply(envelope)
    writer.close()
    for number in recorded_segments(run.journal):
        record.seal(pack_segment(run.journal, number))
        index.forget(number)
    write_index(run.journal, record.save(packed_sizes(run.journal, segments(run.journal)), index.gone))


@contextlib.contextmanager
def hub_process(run: RunDir) -> Iterator[None]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "trainctl.hub",
        "--run-dir",
        str(run.path),
        "--run-id",
        RUN,
        "--name",
        "bench",
    ]
    with (run.path / "hub.log").open("ab") as output:
        hub = subprocess.Popen([*command, "--linger-s", "600"], stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not any(card.pid == hub.pid for card in hub_cards().values()):
            if hub.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the hub did not start:\n{(run.path / 'hub.log').read_text()}")
            time.sleep(0.05)
        yield
    finally:
        hub.kill()
        hub.wait(10)


async def join(steps: int) -> tuple[float, int]:
    """Seconds to the first complete picture, and the bytes it took."""
    began = time.perf_counter()
    session = await open_session(RUN)
    try:
        async with contextlib.aclosing(session.follow()) as items:
            async for item in items:
                if isinstance(item, Snapshot):
                    break
            found = await session.history(sorted(session.model.metrics), points=POINTS)
            taken = time.perf_counter() - began
        assert isinstance(item, Snapshot)
        assert len(found) == len(METRICS)
        for points in found.values():
            assert int(points.columns["count"].sum()) == steps
            assert POINTS * 0.5 <= len(points) <= POINTS + 2, len(points)
        columns = sum(column.nbytes for points in found.values() for column in points.columns.values())
        return taken, columns + len(codec.encode(item))
    finally:
        await session.close()


class Floor:
    """A ROUTER without keys, in a thread of its own, that answers with as many bytes."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._port = self._router.bind_to_random_port("tcp://127.0.0.1")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            route, wanted = self._router.recv_multipart()
            if wanted == b"0":
                return
            self._router.send_multipart([route, bytes(int(wanted))])

    def ask(self, size: int) -> float:
        """Seconds to connect and get an answer of `size` bytes."""
        began = time.perf_counter()
        context = zmq.Context()
        with context.socket(zmq.DEALER) as socket:
            socket.linger = 1000
            socket.connect(f"tcp://127.0.0.1:{self._port}")
            socket.send(b"%d" % size)
            if size:
                assert len(socket.recv()) == size
        taken = time.perf_counter() - began
        context.term()
        return taken

    def close(self) -> None:
        self.ask(0)
        self._thread.join(10)
        self._router.close(0)
        self._context.term()


def quantiles_ms(taken: list[float]) -> dict[str, float]:
    return {"p50_ms": round(float(np.quantile(taken, 0.5)) * 1e3, 2), "p99_ms": round(max(taken) * 1e3, 2)}


async def joins(count: int, steps: int, floor: Floor) -> tuple[list[float], list[float], int]:
    ours: list[float] = []
    bare: list[float] = []
    size = 0
    for number in range(count + 1):
        taken, size = await join(steps)
        again = await asyncio.to_thread(floor.ask, size)
        if number:  # the first one imports numpy and warms the hub
            ours.append(taken)
            bare.append(again)
    return ours, bare, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--joins", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tc-bench-") as name:
        os.environ |= {"TRAINCTL_HOME": f"{name}/home", "TRAINCTL_CONFIG": f"{name}/config", "TMPDIR": name}
        run = RunDir(Path(name) / "home" / "runs" / RUN)
        record_run(run, given.steps)
        with hub_process(run):
            floor = Floor()
            ours, bare, size = asyncio.run(joins(given.joins, given.steps, floor))
            floor.close()
    line = {
        "bench": "first_picture",
        "steps": given.steps,
        "metrics": len(METRICS),
        "joins": given.joins,
        "bytes": size,
    }
    line |= {"join": quantiles_ms(ours), "zmq_round_trip": quantiles_ms(bare), "promised_ms": 100}
    line["ratio_p50"] = round(float(np.median(ours) / np.median(bare)), 1)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
