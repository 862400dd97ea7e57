"""What an agent costs its node: CPU and memory with eight GPUs once a second, beside a bare Python with pyzmq.

    python bench/agent.py [--seconds 30] [--gpus 8] [--ranks 8]

Prints one JSON line. CPU is user and system time of the agent and of its GPU poller over the wall time, in percent of
one core; memory is the sum of their proportional set sizes (PSS), in MB of 10^6 bytes. The GPUs are the tests' fake
NVML (a real driver's own time comes on top); the ranks are sleeping processes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "agent")]

from agent_process import agent, ranks  # noqa: E402
from fake_gpus import FakeGpus, build_library  # noqa: E402

FLOOR = """
import asyncio, zmq.asyncio
async def main():
    context = zmq.asyncio.Context()
    publisher, router = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
    publisher.bind("tcp://127.0.0.1:*"); router.bind("tcp://127.0.0.1:*")
    print("ready", flush=True)
    while True:
        await asyncio.sleep(1)
        zmq.Socket.send(publisher, bytes(2000))
asyncio.run(main())
"""


def cost(pids: list[int], seconds: float) -> tuple[float, float]:
    """CPU percent of one core over `seconds`, and PSS in MB at the end."""
    processes = [psutil.Process(pid) for pid in pids]
    began, before = time.monotonic(), sum(sum(process.cpu_times()[:2]) for process in processes)
    time.sleep(seconds)
    used_s = sum(sum(process.cpu_times()[:2]) for process in processes) - before
    pss = sum(process.memory_full_info().pss for process in processes)
    return 100 * used_s / (time.monotonic() - began), pss / 1e6


def floor_cost(seconds: float) -> tuple[float, float]:
    with subprocess.Popen([sys.executable, "-P", "-c", FLOOR], stdout=subprocess.PIPE) as floor:
        assert floor.stdout is not None
        floor.stdout.readline()
        try:
            return cost([floor.pid], seconds)
        finally:
            floor.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        os.environ |= {"TRAINCTL_HOME": f"{name}/state", "TRAINCTL_CONFIG": f"{name}/config", "TMPDIR": name}
        tempfile.tempdir = name
        fake = FakeGpus(directory, build_library(directory), given.gpus)
        job = f"bench-{os.getpid()}"
        with ranks(given.ranks, job), agent(directory, job=job, environment=fake.environment) as running:
            running.reads(lambda reading: reading.gpu_state == "ok" and len(reading.processes) == given.ranks)
            own = running.process.pid
            children = [child.pid for child in psutil.Process(own).children()]
            cpu, pss = cost([own, *children], given.seconds)
            parts = {"agent": cost([own], 1)[1], "poller": cost(children, 1)[1]}
    floor_cpu, floor_pss = floor_cost(given.seconds)
    result = {
        "bench": "agent",
        "gpus": given.gpus,
        "ranks": given.ranks,
        "interval_s": 1.0,
        "seconds": given.seconds,
        "cpu_percent": round(cpu, 3),
        "pss_mb": round(pss, 1),
        "pss_mb_of": {part: round(value, 1) for part, value in parts.items()},
        "floor": {
            "what": "python + pyzmq, one message a second",
            "cpu_percent": round(floor_cpu, 3),
            "pss_mb": round(floor_pss, 1),
        },
        "pss_ratio": round(pss / floor_pss, 2),
        "target": {"cpu_percent": 0.5, "pss_mb": 40},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
