"""How long a command takes from the client to every rank, while four ranks train with steps of about 20 ms.

Prints one JSON line. `applied`: from the moment the client sends until the last rank has applied it, on one clock;
`told`: until the client has heard so. `over_steps` takes away what the protocol may cost by design: one step at the
median, two at the 99th percentile; promised is at most 20 ms beyond either. `store`: a bare compare-and-set on the same
kind of store, idle. `ratio_p50` is over the floor: half a step, which a boundary costs on average, and that round trip.

usage: python bench/commands.py [--commands N] [--ranks R] [--step-ms S]
"""

import argparse
import asyncio
import datetime as dt
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def quantiles_ms(taken_s: list[float]) -> dict[str, float]:
    ordered = sorted(taken_s)
    return {
        "p50_ms": round(ordered[len(ordered) // 2] * 1e3, 2),
        "p99_ms": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1e3, 2),
    }


def train(output: Path, step_s: float) -> None:
    """One rank: waits for the others and for the step's time, and notes when a value reached it."""
    import torch
    import torch.distributed as dist

    from trainctl.trainer import Run

    dist.init_process_group("gloo")
    run = Run.attach("bench-commands")
    taken: list[tuple[float, float, int]] = []
    run.tunable("x", 0.0, on_change=lambda value: taken.append((float(value), time.time(), run.step)))
    together = torch.zeros(1)
    steps, began = 0, time.perf_counter()
    with run:
        while not run.stopping:
            time.sleep(step_s)
            dist.all_reduce(together)
            run.step_done()
            steps += 1
    seconds = (time.perf_counter() - began) / max(1, steps)
    (output / f"rank-{dist.get_rank()}.json").write_text(json.dumps({"taken": taken, "step_s": seconds}))
    dist.destroy_process_group()


async def send_all(directory: Path, count: int, step_s: float) -> tuple[list[float], list[float], int]:
    """Send commands at random moments; when each was sent, how long until it was told, how many were not applied."""
    from trainctl.client.session import open_session
    from trainctl.wire.commands import SetTunable, Stop

    session = await open_session(str(directory))
    sent, told_s, missed = [], [], 0
    for number in range(1, count + 1):
        await asyncio.sleep(random.uniform(0, 3 * step_s))
        sent.append(time.time())
        began, state = time.perf_counter(), ""
        async for update in session.do(SetTunable(name="x", value=float(number))):
            state = update.state
        told_s.append(time.perf_counter() - began)
        missed += state != "applied"
    async for _ in session.do(Stop()):
        pass
    await session.close()
    return sent, told_s, missed


def store_floor() -> list[float]:
    """Seconds of bare compare-and-set round trips."""
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=dt.timedelta(seconds=10))
    taken = []
    for number in range(2000):
        began = time.perf_counter()
        client.compare_set(f"k{number}", "", "v")
        taken.append(time.perf_counter() - began)
    return taken


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(given: argparse.Namespace, home: Path) -> dict[str, Any]:
    directory = home / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(given.ranks)]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    job = subprocess.Popen(
        [*launcher, __file__, "--train", str(home), "--step-ms", str(given.step_ms)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRAINCTL_RUN_DIR": str(directory)},
    )
    try:
        while not (directory / "run.json").exists():
            if job.poll() is not None:
                raise SystemExit("the ranks did not start")
            time.sleep(0.1)
        time.sleep(3.0)  # the ranks' first steps and the agent's start are not what is measured
        sent, told_s, missed = asyncio.run(send_all(directory, given.commands, given.step_ms / 1e3))
        job.wait(60)
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(60)
    ranks = [json.loads((home / f"rank-{rank}.json").read_text()) for rank in range(given.ranks)]
    last: dict[int, float] = {}
    for rank in ranks:
        for value, at, _ in rank["taken"]:
            last[int(value)] = max(at, last.get(int(value), 0.0))
    applied_s = [last[number] - at for number, at in enumerate(sent, start=1) if number in last]
    step_ms = ranks[0]["step_s"] * 1e3
    applied, store = quantiles_ms(applied_s), quantiles_ms(store_floor())
    over = {
        "p50_ms_over_one_step": round(applied["p50_ms"] - step_ms, 2),
        "p99_ms_over_two_steps": round(applied["p99_ms"] - 2 * step_ms, 2),
    }
    return {
        "bench": "commands",
        "ranks": given.ranks,
        "commands": given.commands,
        "not_applied": missed,
        "step_ms": round(step_ms, 2),
        "applied": applied,
        "over_steps": over,
        "told": quantiles_ms(told_s),
        "store": store,
        "ratio_p50": round(applied["p50_ms"] / (step_ms / 2 + store["p50_ms"]), 2),
        "kept": over["p50_ms_over_one_step"] <= 20 and over["p99_ms_over_two_steps"] <= 20,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--commands", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train is not None:
        train(given.train, given.step_ms / 1e3)
        return
    with tempfile.TemporaryDirectory(prefix="tc-bench-", dir="/tmp", ignore_cleanup_errors=True) as made:
        home = Path(made)
        os.environ.update(TRAINCTL_HOME=f"{home}/state", TRAINCTL_CONFIG=f"{home}/config", TMPDIR=made)
        print(json.dumps(measure(given, home)))


if __name__ == "__main__":
    main()
