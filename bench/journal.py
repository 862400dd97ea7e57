"""What history costs: bytes a point on disk, how fast it goes in, opens, and answers a chart. One JSON line.

usage: journal.py [--points 1e7] [--noise f4|f8|demo] [--rows 2]

Ten metrics, in batches of `--rows` rows as the trainer sends them. `demo` is made like what the demo records: noisy
float32 losses, norms and times, and float64 learning rates of a cosine. The floor of the bytes is what the values alone
take; the floor of a chart is plain numpy over the same values in memory.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainctl.store.frames import recorded_segments, segments
from trainctl.store.journal import JournalIndex, JournalWriter
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record, replay_journal
from trainctl.store.saved import packed_sizes, write_index
from trainctl.wire import codec
from trainctl.wire.messages import Column, Envelope, HistoryRequest, Rows, RunInfo
from trainctl.wire.rundir import RunDir

METRICS = [
    "loss",
    "grad_norm",
    "lr",
    "lr_scheduled",
    "tokens_per_s",
    "step_time_s",
    "clipped",
    "val_loss",
    "mfu",
    "accuracy",
]
_AT_ONCE = 4096


def values(kind: str, first: int, count: int, random: np.random.Generator) -> dict[str, NDArray[np.generic]]:
    if kind != "demo":
        return {name: random.normal(size=count).astype(f"<{kind}") for name in METRICS}
    steps = np.arange(first, first + count)
    cosine = 3e-4 * 0.5 * (1 + np.cos(np.pi * (steps % 100_000) / 100_000))
    made: dict[str, NDArray[np.generic]] = {
        name: (2.5 + 0.1 * random.normal(size=count)).astype("<f4") for name in METRICS
    }
    return made | {"lr": cosine.astype("<f8"), "lr_scheduled": cosine.astype("<f8")}


def envelopes(kind: str, points: int, rows: int) -> Iterator[tuple[int, bytes, Envelope]]:
    random, seq, step, clock = np.random.default_rng(1), 0, 0, 1.79e9
    while step * len(METRICS) < points:
        made = values(kind, step + 1, _AT_ONCE, random)
        times = clock + np.cumsum(random.normal(0.05, 0.002, _AT_ONCE))
        for start in range(0, _AT_ONCE, rows):
            end = min(start + rows, _AT_ONCE)
            body = Rows(
                attempt=1,
                incarnation=1,
                steps=list(range(step + start + 1, step + end + 1)),
                times=[round(at * 2**22) / 2**22 for at in times[start:end].tolist()],
                columns=[
                    Column(name=name, dtype="f8" if data.dtype.itemsize == 8 else "f4", data=data[start:end].tobytes())
                    for name, data in made.items()
                ],
            )
            seq += 1
            envelope = Envelope(
                source="bench-20260101-000000-0000",
                epoch=1,
                stream="metrics",
                seq=seq,
                time=body.times[-1],
                body=body,
                attempt=1,
                link=seq,
            )
            yield seq, codec.encode(envelope), envelope
        step, clock = step + _AT_ONCE, float(times[-1])


def memory_mb() -> float:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def fill(run: RunDir, given: argparse.Namespace) -> dict[str, float]:
    """Write, apply and pack as the hub does, in turn; return what it took."""
    info = RunInfo(run="b", id="b", dir=str(run.path), host="h", created=0, started=0, world_size=1)
    run.create()
    run.info_file.write_text(
        json.dumps({name: getattr(info, name) for name in info.__struct_fields__ if name != "ranks"})
    )
    record, index = RunRecord(info), JournalIndex(run.journal)
    writer = JournalWriter(run.journal, index=index)
    decode, points, raw = codec.envelope_decoder(), 0, 0
    taken = {"append_s": 0.0, "pack_s": 0.0}
    clock = time.perf_counter
    memory: list[float] = []
    for seq, encoded, _ in envelopes(given.noise, int(given.points), given.rows):
        began = clock()
        envelope = decode(encoded)
        assert isinstance(envelope, Envelope)
        assert isinstance(envelope.body, Rows)
        writer.append(encoded, "metrics", seq)
        record.apply(envelope)
        taken["append_s"] += clock() - began
        raw += len(encoded)
        points += len(envelope.body.steps) * len(METRICS)
        waiting = [n for n in recorded_segments(run.journal) if n != writer.segment] if seq % 1000 == 0 else []
        began = clock()
        for number in waiting[:-1]:
            record.seal(pack_segment(run.journal, number))
            index.forget(number)
            memory.append(memory_mb())
        taken["pack_s"] += clock() - began
    began = clock()
    writer.close()
    for number in recorded_segments(run.journal):
        record.seal(pack_segment(run.journal, number))
        index.forget(number)
    taken["pack_s"] += clock() - began
    saved = record.save(packed_sizes(run.journal, segments(run.journal)), index.gone)
    index_bytes = write_index(run.journal, saved)
    size = sum(path.stat().st_size for path in run.journal.glob("*.col"))
    half = memory[len(memory) // 2] if memory else memory_mb()
    return {
        "points": points,
        "bytes_per_point": round(size / points, 3),
        "recorded_bytes_per_point": round(raw / points, 2),
        "index_bytes_per_point": round(index_bytes / points, 3),
        "in_points_per_s": round(points / (taken["append_s"] + taken["pack_s"])),
        "append_points_per_s": round(points / taken["append_s"]),
        "memory_half_mb": round(half, 1),
        "memory_end_mb": round(memory_mb(), 1),
    }


def ask(run: RunDir) -> dict[str, float]:
    """Open by the index, draw, and open without the index."""
    clock = time.perf_counter
    began = clock()
    record = load_record(run.path)
    opened = clock() - began
    total = len(record.metrics.query("loss")["step"])
    random = np.random.default_rng(2)
    spans = [(1, total)] + [
        (low := int(random.integers(1, total)), int(low + 10 ** random.uniform(2, np.log10(total)))) for _ in range(200)
    ]
    taken: list[float] = []
    for at, (low, high) in enumerate(spans):
        name = METRICS[at % len(METRICS)]
        began = clock()
        record.history(HistoryRequest(req=1, metrics=[name], from_step=low, to_step=min(high, total), points=400))
        taken.append(clock() - began)
    plain = record.metrics.query("loss")["value"].astype("f8")
    began = clock()
    starts = np.arange(0, len(plain), max(1, len(plain) // 400))
    np.fmin.reduceat(plain, starts), np.fmax.reduceat(plain, starts), np.add.reduceat(plain, starts)
    floor = clock() - began
    began = clock()
    fresh = RunRecord(record.info)
    (run.journal / "index").unlink()
    replay_journal(fresh, JournalIndex(run.journal), run.journal)
    replayed = clock() - began
    ordered = sorted(taken)
    return {
        "open_s": round(opened, 3),
        "open_without_index_s": round(replayed, 3),
        "chart_ms_p50": round(1000 * ordered[len(ordered) // 2], 2),
        "chart_ms_max": round(1000 * ordered[-1], 2),
        "chart_of_all_ms": round(1000 * taken[0], 2),
        "numpy_over_all_ms": round(1000 * floor, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=float, default=2e6)
    parser.add_argument("--noise", choices=["f4", "f8", "demo"], default="demo")
    parser.add_argument("--rows", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run = RunDir(Path(name))
        filled = fill(run, given)
        floor = {"f4": 4.0, "f8": 8.0, "demo": (8 * 4 + 2 * 8) / 10}[given.noise]
        line = {"bench": "journal", "values": given.noise, "rows": given.rows} | filled | ask(run)
        line["ratio_to_values"] = round(filled["bytes_per_point"] / floor, 3)
        line["memory_peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
