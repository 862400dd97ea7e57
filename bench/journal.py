"""What history costs: bytes a point on disk, how fast it goes in, opens, and answers a chart. One JSON line.

usage: journal.py [--points 1e7] [--noise f4|f8|demo|recorded] [--rows 2] [--rollbacks 90] [--every 400]
                  [--shape plain|back|rollbacks|sparse|varying]

Ten metrics, in batches of `--rows` rows as the trainer sends them (a slow run sends 2, a fast one 800). `demo` is made
like what the demo records: noisy float32 losses, norms and times, and float64 learning rates of a cosine. `recorded`
are the values of a real run of the reference loop, which is trained first (recorded.py), drawn anew row by row until
there are enough. `back` goes back by three steps in the middle; `rollbacks` leaves that many branches behind, a hundred
steps each. `sparse` has val_loss at every `--every`-th step only (the first chart of the rarest metric, nothing read
yet, is told for every shape); `varying` logs the losses of eight of fifty tasks, other ones at each step. The floor of
the bytes is what the values alone take; the floor of a chart is plain numpy over the same values in memory. The peer is
TensorBoard's writer with the first 200,000 of the same values.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from recorded import recorded_values

from trainctl.store.frames import recorded_segments, segments
from trainctl.store.journal import JournalIndex, JournalWriter
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record, replay_journal
from trainctl.store.saved import packed_sizes, write_index
from trainctl.wire import codec
from trainctl.wire.messages import Body, Column, Envelope, HistoryRequest, RolledBack, Rows, RunInfo, stream_of
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


class Values:
    """Ten metrics, some rows at a time."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._random = np.random.default_rng(1)
        self._recorded = recorded_values() if kind == "recorded" else {}
        self.names = list(self._recorded) or METRICS

    def floor(self) -> float:
        """Bytes a value takes by itself, on average."""
        made = self.take(1, 1)
        return sum(column.dtype.itemsize for column in made.values()) / len(made)

    def take(self, first: int, count: int) -> dict[str, NDArray[np.generic]]:
        if self._kind == "recorded":
            rows = self._random.integers(0, len(next(iter(self._recorded.values()))), count)
            return {name: column[rows] for name, column in self._recorded.items()}
        if self._kind != "demo":
            return {name: self._random.normal(size=count).astype(f"<{self._kind}") for name in METRICS}
        steps = np.arange(first, first + count)
        cosine = 3e-4 * 0.5 * (1 + np.cos(np.pi * (steps % 100_000) / 100_000))
        made: dict[str, NDArray[np.generic]] = {
            name: (2.5 + 0.1 * self._random.normal(size=count)).astype("<f4") for name in METRICS
        }
        return made | {"lr": cosine.astype("<f8"), "lr_scheduled": cosine.astype("<f8")}


def bodies(source: Values, given: argparse.Namespace) -> Iterator[Body]:
    """What rank 0 says of a run of that shape."""
    noise, step, done, incarnation, clock = np.random.default_rng(1), 0, 0, 1, 1.79e9
    total = int(given.points) // len(source.names)
    while done < total:
        if given.shape == "back" and incarnation == 1 and done >= total // 2:
            step, incarnation = step - 3, 0  # told by no event
        if given.shape == "rollbacks" and done >= incarnation * total // (given.rollbacks + 1):
            incarnation += 1
            at = {"time": clock, "step": step - 100, "incarnation": incarnation, "from_incarnation": incarnation - 1}
            yield RolledBack(from_step=step, checkpoint="c", **at)
            step -= 100
        made = source.take(step + 1, _AT_ONCE)
        times = clock + np.cumsum(noise.normal(0.05, 0.002, _AT_ONCE))
        for start in range(0, _AT_ONCE, given.rows):
            end = min(start + given.rows, _AT_ONCE)
            yield Rows(
                attempt=1,
                incarnation=max(1, incarnation),
                steps=list(range(step + start + 1, step + end + 1)),
                times=[round(at * 2**22) / 2**22 for at in times[start:end].tolist()],
                columns=[
                    Column(name=name, dtype="f8" if data.dtype.itemsize == 8 else "f4", data=data[start:end].tobytes())
                    for name, data in made.items()
                ],
            )
        step, done, clock = step + _AT_ONCE, done + _AT_ONCE, float(times[-1])


def sparse(made: Iterator[Body], every: int) -> Iterator[Body]:
    """The same with val_loss at some steps only; it comes with its step alone, as the trainer sends it."""
    for body in made:
        assert isinstance(body, Rows)
        start = 0
        for end in [at + 1 for at, step in enumerate(body.steps) if step % every == 0] + [len(body.steps)]:
            for first, last in (
                ((start, end - 1), (end - 1, end)) if body.steps[end - 1] % every == 0 else ((start, end),)
            ):
                if first < last:
                    yield cut(body, first, last, {"val_loss"} if body.steps[first] % every else set())
            start = end


def varying(made: Iterator[Body], names: list[str]) -> Iterator[Body]:
    """The same values a step at a time, as those of eight tasks."""
    chosen = random.Random(1)
    for body in made:
        assert isinstance(body, Rows)
        for at in range(len(body.steps)):
            row = cut(body, at, at + 1, set(names[8:]))
            columns = [
                msgspec.structs.replace(column, name=f"loss/task_{task:02d}")
                for column, task in zip(row.columns, chosen.sample(range(50), 8), strict=True)
            ]
            yield msgspec.structs.replace(row, columns=columns)


def cut(body: Rows, first: int, last: int, without: set[str]) -> Rows:
    """Rows `first` to `last`, exclusive."""
    columns = [
        msgspec.structs.replace(column, data=column.data[first * width : last * width])
        for column in body.columns
        if column.name not in without and (width := int(column.dtype[1]))
    ]
    return msgspec.structs.replace(body, steps=body.steps[first:last], times=body.times[first:last], columns=columns)


def envelopes(source: Values, given: argparse.Namespace) -> Iterator[Envelope]:
    heads = {"metrics": 0, "events": 0}
    made = bodies(source, given)
    if given.shape == "sparse":
        made = sparse(made, given.every)
    elif given.shape == "varying":
        made = varying(made, source.names)
    for link, body in enumerate(made, 1):
        stream = stream_of(body)
        heads[stream] += 1
        yield Envelope(
            source="bench-20260101-000000-0000",
            epoch=1,
            stream=stream,
            seq=heads[stream],
            time=body.times[-1] if isinstance(body, Rows) else body.time,  # type: ignore[union-attr]
            body=body,
            attempt=1,
            link=link,
        )


def memory_mb() -> float:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def fill(run: RunDir, source: Values, given: argparse.Namespace) -> dict[str, float]:
    """Write, apply and pack as the hub does, in turn; return what it took."""
    info = RunInfo(run="b", id="b", dir=str(run.path), host="h", created=0, started=0, world_size=1)
    run.create()
    run.info_file.write_bytes(msgspec.json.encode(info))
    record, index = RunRecord(info), JournalIndex(run.journal)
    writer = JournalWriter(run.journal, index=index)
    decode, points, raw = codec.envelope_decoder(), 0, 0
    taken = {"append_s": 0.0, "pack_s": 0.0}
    clock = time.perf_counter
    memory: list[float] = []
    for made in envelopes(source, given):
        encoded = codec.encode(made)
        began = clock()
        envelope = decode(encoded)
        assert isinstance(envelope, Envelope)
        writer.append(encoded, envelope.stream, envelope.seq)
        record.apply(envelope)
        taken["append_s"] += clock() - began
        raw += len(encoded)
        points += len(envelope.body.steps) * len(envelope.body.columns) if isinstance(envelope.body, Rows) else 0
        looks = envelope.link % max(1, 2000 // given.rows) == 0
        waiting = [n for n in recorded_segments(run.journal) if n != writer.segment] if looks else []
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
        "live_bytes_per_point": round(raw / points, 2),
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
    names = record.metrics.names
    total = int(record.metrics.query(names[0], points=1)["step"][-1])
    rarest = min(names, key=lambda name: record.metrics.query(name, points=1)["count"].sum())
    record = load_record(run.path)  # as cold as it is opened
    began, busy = clock(), time.process_time()
    record.history(HistoryRequest(req=1, metrics=[rarest], points=400))
    rare = clock() - began, time.process_time() - busy
    record = load_record(run.path)
    chosen = np.random.default_rng(2)
    spans = [(1, total)] + [
        (low := int(chosen.integers(1, total)), int(low + 10 ** chosen.uniform(2, np.log10(total)))) for _ in range(200)
    ]
    taken, computed = list[float](), list[float]()  # by the clock; of this process, whatever else the machine does
    for at, (low, high) in enumerate(spans):
        name = names[at % len(names)]
        began, busy = clock(), time.process_time()
        record.history(HistoryRequest(req=1, metrics=[name], from_step=low, to_step=min(high, total), points=400))
        taken.append(clock() - began)
        computed.append(time.process_time() - busy)
    plain = record.metrics.query(names[0])["value"].astype("f8")
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
        "chart_cpu_ms_p50": round(1000 * sorted(computed)[len(computed) // 2], 2),
        "chart_cpu_ms_max": round(1000 * max(computed), 2),
        "charts_over_20ms": sum(each > 0.020 for each in taken),
        "charts": len(taken),
        "chart_of_rarest_ms": round(1000 * rare[0], 2),
        "chart_of_rarest_cpu_ms": round(1000 * rare[1], 2),
        "chart_of_all_ms": round(1000 * taken[0], 2),
        "numpy_over_all_ms": round(1000 * floor, 2),
    }


def tfevents(source: Values, directory: Path) -> dict[str, object]:
    """The same values through TensorBoard's own writer, as scripts use it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return {"missing": ["tensorboard"]}
    rows = 200_000 // len(source.names)
    columns = {name: column.tolist() for name, column in source.take(1, rows).items()}
    writer = SummaryWriter(str(directory))
    began = time.perf_counter()
    for row in range(rows):
        for name, column in columns.items():
            writer.add_scalar(name, column[row], row + 1)
    writer.close()
    took = time.perf_counter() - began
    size = sum(path.stat().st_size for path in directory.iterdir())
    points = rows * len(columns)
    return {"tfevents_bytes_per_point": round(size / points, 2), "tfevents_points_per_s": round(points / took)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=float, default=2e6)
    parser.add_argument("--noise", choices=["f4", "f8", "demo", "recorded"], default="demo")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--shape", choices=["plain", "back", "rollbacks", "sparse", "varying"], default="plain")
    parser.add_argument("--rollbacks", type=int, default=90)
    parser.add_argument("--every", type=int, default=400)
    given = parser.parse_args()
    source = Values(given.noise)
    with tempfile.TemporaryDirectory() as name:
        run = RunDir(Path(name) / "run")
        line: dict[str, object] = {"bench": "journal", "values": given.noise, "rows": given.rows, "shape": given.shape}
        filled = fill(run, source, given)
        line |= filled | ask(run)
        line["ratio_to_values"] = round(filled["bytes_per_point"] / source.floor(), 3)
        line["memory_peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
        peer = tfevents(source, Path(name) / "tfevents")
        line |= peer
        if isinstance(theirs := peer.get("tfevents_bytes_per_point"), float):
            line["ratio_to_tfevents"] = round(filled["bytes_per_point"] / theirs, 3)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
