"""What a rank's memory does while it logs 1e8 values, through `run.log()` and all that is behind it. One JSON line.

usage: rank_memory.py [--points 1e8] [--metrics 10]

A real run of one rank with its hub logs ten floats a step as fast as the sender thread takes them: the loop waits only
where a tenth of the buffer is full, so nothing may be dropped. Printed are the rank's and the hub's memory (PSS, MB)
when a tenth was logged, at half and at the end. The ratio is the end over a tenth: 1 is flat.
"""

import argparse
import json
import os
import tempfile
import time

import psutil

_HOME = tempfile.TemporaryDirectory(prefix="tcb-")
os.environ |= {"TRAINCTL_HOME": f"{_HOME.name}/state", "TRAINCTL_CONFIG": f"{_HOME.name}/config"}
os.environ |= {"TRAINCTL_RUN_DIR": f"{_HOME.name}/run"}

from trainctl.trainer import Run  # noqa: E402 - the environment decides where it writes


def pss_mb(process: psutil.Process) -> float:
    return round(float(process.memory_full_info().pss) / 2**20, 1)


def hub_of(rank: psutil.Process) -> psutil.Process:
    return next(child for child in rank.children(recursive=True) if "trainctl.hub" in " ".join(child.cmdline()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=float, default=1e8)
    parser.add_argument("--metrics", type=int, default=10)
    given = parser.parse_args()
    steps = int(given.points) // given.metrics
    names = [f"metric_{number}" for number in range(given.metrics)]
    run = Run.attach("bench-memory")
    buffer, rank = run._buffer, psutil.Process()
    room = buffer.capacity // 10
    while not (link := run._parts.sender._link) or not link.connected:
        time.sleep(0.05)
    hub = hub_of(rank)
    found: dict[str, dict[str, float]] = {"rank": {}, "hub": {}}
    marks = {steps // 10: "tenth", steps // 2: "half", steps - 1: "end"}
    began = time.perf_counter()
    for step in range(steps):
        value = step / 7.0
        run.log(**{name: value + at for at, name in enumerate(names)})
        run.step_done()
        while len(buffer) > room or len(link._kept) > 2000:
            time.sleep(0.001)
        if (mark := marks.get(step)) is not None:
            found["rank"][mark], found["hub"][mark] = pss_mb(rank), pss_mb(hub)
    took = time.perf_counter() - began
    dropped = buffer.refused + buffer.refused_wide + link.lost + link.oversize
    run.close()
    print(
        json.dumps(
            {
                "bench": "rank_memory",
                "points": steps * given.metrics,
                "points_per_s": round(steps * given.metrics / took),
                "dropped": dropped,
                "rank_pss_mb": found["rank"],
                "hub_pss_mb": found["hub"],
                "ratio_rank": round(found["rank"]["end"] / found["rank"]["tenth"], 2),
                "ratio_hub": round(found["hub"]["end"] / found["hub"]["tenth"], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
