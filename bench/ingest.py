"""How much a real hub takes in over the link: points a second, and its memory at half and at the end. One JSON line.

usage: ingest.py [--points 1e7] [--metrics 10] [--rows N]

The hub is fed as fast as it takes it. `--rows 2` is the shape of a run of 20 steps a second, whose batches are small:
then what a batch costs counts, and not what a value does.

The floor is this process decoding, encoding and writing the same batches, which is the least that a hub must do.
"""

import argparse
import json
import os
import resource
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import psutil

from trainctl.store.replay import load_record
from trainctl.trainer.link import HubProcess, Link, wait_readable
from trainctl.wire import codec
from trainctl.wire.messages import Column, HistoryRequest, LinkBye, LinkHello, LinkRecord, Rows, RunInfo

CELLS = 8192
_HOME = tempfile.TemporaryDirectory(prefix="tcb-")
RUN_ID = "ingest-20260101-000000-0000"


def batch(number: int, rows: int, metrics: int, noise: bytes) -> Rows:
    steps = list(range(number * rows + 1, (number + 1) * rows + 1))
    start = 4 * (number * 104_729 % (len(noise) // 4 - CELLS))  # far apart, so that no two batches are alike
    columns = [
        Column(name=f"metric_{at}", dtype="f4", data=noise[start + 4 * at * rows : start + 4 * (at + 1) * rows])
        for at in range(metrics)
    ]
    times = [1.79e9 + step / 1024 for step in steps]
    return Rows(attempt=1, incarnation=1, steps=steps, times=times, columns=columns)


def pss_mb(process: psutil.Process) -> float:
    return float(process.memory_full_info().pss) / 2**20


def floor_s(batches: int, rows: int, metrics: int, noise: bytes) -> float:
    """The least a hub must do: decode, encode anew, checksum, write, sync."""
    packets = [
        codec.encode(LinkRecord(link=number, body=batch(number, rows, metrics, noise))) for number in range(batches)
    ]
    decode = codec.from_rank_decoder()
    began = time.perf_counter()
    with (Path(_HOME.name) / "floor").open("wb") as file:
        for packet in packets:
            encoded = codec.encode(decode(packet))
            zlib.crc32(encoded)
            file.write(encoded)
        os.fsync(file.fileno())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=float, default=1e7)
    parser.add_argument("--metrics", type=int, default=10)
    parser.add_argument(
        "--rows", type=int, help="of a batch; a rank's own batches have the steps of 0.1 s (default: as many as fit)"
    )
    given = parser.parse_args()
    os.environ |= {"TRAINCTL_HOME": f"{_HOME.name}/state", "TRAINCTL_CONFIG": f"{_HOME.name}/config"}
    rows = given.rows or CELLS // given.metrics
    batches = int(given.points) // (rows * given.metrics)
    noise = np.random.default_rng(1).normal(size=1 << 20).astype("<f4").tobytes()
    directory = Path(_HOME.name) / "run"
    directory.mkdir(mode=0o700)
    info = RunInfo(run="ingest", id=RUN_ID, dir=str(directory), host="h", created=0, started=0, world_size=1)
    hub = HubProcess(run_id=RUN_ID, name="ingest", directory=directory)
    link = Link(run_id=RUN_ID, hub=hub, hello=lambda: LinkHello(info=info, incarnation=1, step=0, pid=os.getpid()))
    while not link.connected:
        link.tick(time.monotonic())
        wait_readable(link, 0.02)
    process = next(child for child in psutil.Process().children() if "trainctl.hub" in " ".join(child.cmdline()))
    before = pss_mb(process)
    half, ours_half = 0.0, 0.0
    may_wait = min(60_000, 400 * CELLS // (rows * given.metrics))  # what is on disk is acknowledged once a second
    began = time.perf_counter()
    for number in range(batches):
        link.record(batch(number, rows, given.metrics, noise), time.monotonic())
        while len(link._kept) > may_wait:  # the rank's own bound is a minute; here nothing may be dropped
            link.tick(time.monotonic())
            wait_readable(link, 0.05)
        link.tick(time.monotonic())
        if number == batches // 2:
            half, ours_half = pss_mb(process), pss_mb(psutil.Process())
    while not link.drained():
        link.tick(time.monotonic())
        wait_readable(link, 0.05)
    took = time.perf_counter() - began
    end, ours_end = pss_mb(process), pss_mb(psutil.Process())
    link.tell(LinkBye(state="finished", step=batches * rows))
    link.tick(time.monotonic())
    link.close()
    floor = floor_s(min(batches, 1000), rows, given.metrics, noise) / min(batches, 1000) * batches
    process.terminate()
    process.wait(120)
    began = time.perf_counter()
    record = load_record(directory)
    opened = time.perf_counter() - began
    record.history(HistoryRequest(req=1, metrics=["metric_0"], points=400))
    charted = time.perf_counter() - began - opened
    points = batches * rows * given.metrics
    size = sum(path.stat().st_size for path in (directory / "journal").iterdir())
    print(
        json.dumps(
            {
                "bench": "ingest",
                "points": points,
                "batch": {"rows": rows, "metrics": given.metrics},
                "points_per_s": round(points / took),
                "ratio_to_decode_and_write": round(took / floor, 2),
                "lost": link.lost + link.oversize,
                "hub_pss_mb": {"start": round(before, 1), "half": round(half, 1), "end": round(end, 1)},
                "rank_pss_mb": {"half": round(ours_half, 1), "end": round(ours_end, 1)},
                "bytes_per_point": round(size / points, 3),
                "open_s": round(opened, 3),
                "chart_ms": round(1000 * charted, 2),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
