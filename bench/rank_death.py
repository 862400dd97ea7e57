"""How soon a rank's kill -9 is told, while its DataLoader workers live, and how long a frozen hub holds up the exit.

Prints one JSON line: for each of --times jobs of one rank with two forked workers, seconds from the kill of the rank to
the event `lost` (promised: 2); and seconds that `run.close()` takes with a hub that is frozen (promised: about 3).

usage: rank_death.py [--times 5]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def train(output: Path, steps: int) -> None:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from trainctl.trainer import Run

    torch.set_num_threads(1)
    loader = DataLoader(TensorDataset(torch.zeros(64, 8)), num_workers=2, multiprocessing_context="fork")
    run = Run.attach("bench-death", loader=loader, total_steps=steps)
    for _ in run.batches():
        run.log(loss=1.0)
        run.step_done()
        time.sleep(0.02)
    (output / "leaves").touch()
    while not (output / "close").exists():
        time.sleep(0.02)
    began = time.monotonic()
    run.close()
    (output / "closed").write_text(str(time.monotonic() - began))


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"rank_death: {what} did not come within {timeout_s:.0f} s")
        time.sleep(0.05)


def started(directory: Path, steps: int) -> tuple[subprocess.Popen[bytes], int]:
    """The rank, and its hub's pid."""
    settings = {"TRAINCTL_HOME": "state", "TRAINCTL_CONFIG": "config", "TRAINCTL_RUN_DIR": "run"}
    os.environ |= {name: str(directory / folder) for name, folder in settings.items()}
    command = [sys.executable, __file__, "--train", str(directory), "--steps", str(steps)]
    rank = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    cards = directory / "state" / "cards"
    wait_for(lambda: any(cards.glob("hub-*.json")) and (directory / "run" / "run.json").exists(), "the hub")
    (card,) = cards.glob("hub-*.json")
    return rank, int(json.loads(card.read_text())["pid"])


def notice_s(directory: Path) -> float:
    from trainctl.store.replay import load_record
    from trainctl.wire.messages import StateChanged

    rank, hub = started(directory, 100_000)
    workers = [child for child in psutil.Process(rank.pid).children(recursive=True) if child.pid != hub]
    workers = [child for child in workers if child.status() != psutil.STATUS_ZOMBIE]
    workers = [child for child in workers if not any("trainctl." in word for word in child.cmdline())]
    for worker in workers:
        worker.suspend()  # they cannot notice that their parent is gone, and hold whatever they hold
    killed = time.time()
    rank.kill()
    found: list[float] = []

    def told() -> bool:
        events = load_record(directory / "run").events
        found.extend(event.time for event in events if isinstance(event, StateChanged) and event.state == "lost")
        return bool(found)

    wait_for(told, "the event")
    for worker in workers:
        worker.kill()
    os.kill(hub, signal.SIGTERM)
    rank.wait()
    return found[0] - killed


def close_s(directory: Path) -> float:
    rank, hub = started(directory, 200)
    wait_for((directory / "leaves").exists, "the last step")
    os.kill(hub, signal.SIGSTOP)
    (directory / "close").touch()
    wait_for((directory / "closed").exists, "the exit")
    os.kill(hub, signal.SIGKILL)
    rank.wait(30)
    return float((directory / "closed").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train is not None:
        train(given.train, given.steps)
        return
    figures: dict[str, list[float]] = {}
    for name, measure in (("lost_notice_s", notice_s), ("close_frozen_s", close_s)):
        for _ in range(given.times):
            with tempfile.TemporaryDirectory(prefix="tcb-", dir="/tmp", ignore_cleanup_errors=True) as directory:
                figures.setdefault(name, []).append(round(measure(Path(directory)), 3))
    line = {"bench": "rank_death"} | {name: {"each": taken, "max": max(taken)} for name, taken in figures.items()}
    print(json.dumps(line | {"promised_s": {"lost_notice_s": 2.0, "close_frozen_s": 3.0}}))


if __name__ == "__main__":
    main()
