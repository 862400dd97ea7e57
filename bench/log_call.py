"""What `run.log()` of ten Python floats, a phase and `run.step_done()` cost the training thread, beside a bare deque.

Prints one JSON line: microseconds, p50 and p99 over 20,000 rounds, ours and the floor (a deque's append of the same
keywords as a dict) in turn, either one first. Reading the clock is in every figure as it was measured; `clock` is what
two readings with nothing between them take in the same rounds, and `log_net_p50_us` is without it.
"""

import json
import os
import tempfile
import time
from collections import deque

os.environ.setdefault("TRAINCTL_HOME", tempfile.mkdtemp(prefix="trainctl-bench-"))
os.environ.setdefault("TRAINCTL_CONFIG", tempfile.mkdtemp(prefix="trainctl-bench-"))

from trainctl.trainer import Run

ROUNDS = 20_000
ROUND_S = 100e-6


def quantiles_us(taken: list[float]) -> dict[str, float]:
    ordered = sorted(taken)
    return {
        "p50_us": round(ordered[len(ordered) // 2] * 1e6, 3),
        "p99_us": round(ordered[len(ordered) * 99 // 100] * 1e6, 3),
    }


def main() -> None:
    run, clock = Run.attach("bench-log"), time.perf_counter
    floor: deque[dict[str, float]] = deque(maxlen=100_000)
    log_s, floor_s, step_s, phase_s, clock_s = [], [], [], [], []
    a, b, c, d, e, f, g, h, i, j = [1.5 * number for number in range(10)]

    def ours() -> None:
        started = clock()
        run.log(loss=a, grad_norm=b, m3=c, m4=d, m5=e, m6=f, m7=g, m8=h, m9=i, m10=j)
        log_s.append(clock() - started)

    def bare() -> None:
        started = clock()
        floor.append(dict(loss=a, grad_norm=b, m3=c, m4=d, m5=e, m6=f, m7=g, m8=h, m9=i, m10=j))  # noqa: C408 - a call
        floor_s.append(clock() - started)

    for number in range(ROUNDS):
        first, second = (ours, bare) if number % 2 else (bare, ours)
        first()
        second()
        started = clock()
        clock_s.append(clock() - started)
        started = clock()
        with run.phase("forward"):
            pass
        phase_s.append(clock() - started)
        started = clock()
        run.step_done()
        ended = clock()
        step_s.append(ended - started)
        while clock() - ended < ROUND_S:
            pass
    dropped = run._buffer.refused
    run.close()
    log, deque_floor, reading = quantiles_us(log_s), quantiles_us(floor_s), quantiles_us(clock_s)
    figures = {
        "log": log,
        "deque": deque_floor,
        "clock": reading,
        "log_net_p50_us": round(log["p50_us"] - reading["p50_us"], 3),
        "phase": quantiles_us(phase_s),
        "step_done": quantiles_us(step_s),
        "ratio_p50": round(log["p50_us"] / deque_floor["p50_us"], 2),
        "dropped": dropped,
    }
    print(json.dumps({"bench": "log_call"} | figures))


if __name__ == "__main__":
    main()
