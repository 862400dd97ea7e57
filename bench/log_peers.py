"""Logging ten Python floats: ours beside W&B (offline), TensorBoard, Trackio and a bare deque, in the same process.

Prints one JSON line: microseconds, p50 and p99 over all calls of each, and how many times dearer each median is than
ours. Each is opened, measured and closed alone, in turn, several times over, so that none is disturbed by another's
threads and all meet the same machine. Calls are 100 µs apart, as in log_call.py. Peers come with
`pip install 'trainctl-cockpit[bench]'`; those that are not installed are named in `missing`. Nothing leaves the
machine, and what the peers write is removed.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

HOME = Path(tempfile.mkdtemp(prefix="trainctl-bench-"))
os.environ["TRAINCTL_HOME"] = os.environ["TRAINCTL_CONFIG"] = str(HOME / "trainctl")
os.environ["TRACKIO_DIR"] = str(HOME / "trackio")
os.environ.setdefault("WANDB_SILENT", "true")

from trainctl.trainer import Run  # noqa: E402 - the environment decides where it writes

ROUNDS, CALLS, PACE_S = 3, 2000, 100e-6
VALUES = {f"metric_{number}": 1.5 * number for number in range(10)}

# What logs at a step, and what a loop calls between two steps, which is not measured here.
Loop = tuple[Callable[[int], None], Callable[[], None]]


def nothing() -> None: ...


@contextlib.contextmanager
def ours() -> Iterator[Loop]:
    with Run.attach("bench-peers") as run:
        yield lambda _step: run.log(**VALUES), run.step_done


@contextlib.contextmanager
def bare_deque() -> Iterator[Loop]:
    kept: deque[dict[str, float]] = deque(maxlen=100_000)
    yield lambda _step: kept.append(dict(**VALUES)), nothing


@contextlib.contextmanager
def wandb_offline() -> Iterator[Loop]:
    import wandb

    run = wandb.init(
        project="bench", mode="offline", dir=str(HOME), settings=wandb.Settings(console="off", silent=True)
    )
    try:
        yield lambda _step: run.log(VALUES), nothing
    finally:
        run.finish()


@contextlib.contextmanager
def tensorboard() -> Iterator[Loop]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(HOME / "tensorboard"))

    def log(step: int) -> None:
        for name, value in VALUES.items():
            writer.add_scalar(name, value, step)

    yield log, nothing
    writer.close()


@contextlib.contextmanager
def trackio() -> Iterator[Loop]:
    import trackio as library

    with contextlib.redirect_stdout(sys.stderr):
        library.init(project="bench", embed=False)
        try:
            yield lambda _step: library.log(VALUES), nothing
        finally:
            library.finish()


ALL = {"ours": ours, "deque": bare_deque, "wandb": wandb_offline, "tensorboard": tensorboard, "trackio": trackio}


def quantiles_us(taken: list[float]) -> dict[str, float]:
    ordered = sorted(taken)
    return {
        "p50_us": round(ordered[len(ordered) // 2] * 1e6, 3),
        "p99_us": round(ordered[len(ordered) * 99 // 100] * 1e6, 3),
    }


def measure(loop: Loop) -> list[float]:
    log, between = loop
    clock, taken = time.perf_counter, list[float]()
    for step in range(CALLS):
        started = clock()
        log(step)
        ended = clock()
        taken.append(ended - started)
        between()
        while clock() - ended < PACE_S:
            pass
    return taken


def main() -> None:
    present = {name: made for name, made in ALL.items() if name in {"ours", "deque"} or importlib.util.find_spec(name)}
    taken = {name: list[float]() for name in present}
    for _ in range(ROUNDS):
        for name, made in present.items():
            with made() as loop:
                taken[name] += measure(loop)
    shutil.rmtree(HOME, ignore_errors=True)
    found = {name: quantiles_us(times) for name, times in taken.items()}
    ratios = {name: round(one["p50_us"] / found["ours"]["p50_us"], 2) for name, one in found.items() if name != "ours"}
    missing = sorted(ALL.keys() - present.keys())
    print(
        json.dumps({"bench": "log_peers", "calls": ROUNDS * CALLS, **found, "p50_to_ours": ratios, "missing": missing})
    )


if __name__ == "__main__":
    main()
