"""Logging scalars of a CUDA device while a long kernel runs: nothing may wait for the device.

Prints one JSON line. `log_us` is what a call with three device scalars costs the training thread while the device is
busy for seconds; `item_us` the same values read by `.item()`, which waits. `torch.cuda.set_sync_debug_mode("error")`
is on throughout ours, so an operation that synchronises raises. Without a CUDA device the line says so.
"""

import json
import os
import tempfile
import time

os.environ.setdefault("TRAINCTL_HOME", tempfile.mkdtemp(prefix="trainctl-bench-"))
os.environ.setdefault("TRAINCTL_CONFIG", tempfile.mkdtemp(prefix="trainctl-bench-"))

import torch

from trainctl.trainer import Run

CALLS = 200
BUSY_CYCLES = 4_000_000_000  # about two seconds


def quantiles_us(taken: list[float]) -> dict[str, float]:
    ordered = sorted(taken)
    return {
        "p50_us": round(ordered[len(ordered) // 2] * 1e6, 1),
        "p99_us": round(ordered[len(ordered) * 99 // 100] * 1e6, 1),
        "max_us": round(ordered[-1] * 1e6, 1),
    }


def measure() -> dict[str, object]:
    device = torch.device("cuda")
    values = [torch.full((), 1.5, device=device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)]
    run = Run.attach("bench-no-sync")
    run.log(loss=values[0], norm=values[1], count=values[2])
    with run.phase("forward"):
        pass
    run.step_done()
    torch.cuda.synchronize()
    taken: list[float] = []
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    torch.cuda._sleep(BUSY_CYCLES)
    done.record()
    for _ in range(CALLS):
        started = time.perf_counter()
        with run.phase("forward"):
            run.log(loss=values[0], norm=values[1], count=values[2])
        taken.append(time.perf_counter() - started)
        run.step_done()
    still_busy = not done.query()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda._sleep(BUSY_CYCLES // 20)
    started = time.perf_counter()
    _ = [value.item() for value in values]
    waited = time.perf_counter() - started
    lost = run._buffer.not_copied
    run.close()
    return {
        "device": torch.cuda.get_device_name(),
        "log_us": quantiles_us(taken),
        "device_still_busy": still_busy,
        "item_us": round(waited * 1e6, 1),
        "ratio": round(sorted(taken)[CALLS // 2] / waited, 6),
        "dropped": lost,
    }


def main() -> None:
    found: dict[str, object] = measure() if torch.cuda.is_available() else {"device": None, "reason": "no CUDA device"}
    print(json.dumps({"bench": "no_sync"} | found))


if __name__ == "__main__":
    main()
