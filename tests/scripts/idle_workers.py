"""A rank whose workers do nothing but live, one started by each METHOD of multiprocessing.

usage: idle_workers.py OUTPUT METHOD...

Only the rank imports torch: workers are up in a moment.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path


def idle(told: Path) -> None:
    names = [thread.name for thread in threading.enumerate()]
    made = told.with_suffix(".new")
    made.write_text(json.dumps({"pid": os.getpid(), "threads": names}))
    made.rename(told)  # whoever sees it sees all of it
    threading.Event().wait()


def main(output: Path, methods: list[str]) -> None:
    from trainctl.trainer import Run

    run = Run.attach("workers", total_steps=1_000_000)
    linked = Path(os.environ["TRAINCTL_RUN_DIR"]) / "run.json"  # written when the hub hears of this rank
    while True:
        run.log(loss=1.0)
        run.step_done()
        time.sleep(0.02)
        while methods and linked.exists():  # only now there is something to inherit
            start(methods.pop(), output)


def start(method: str, output: Path) -> None:
    worker = multiprocessing.get_context(method).Process  # type: ignore[attr-defined]
    worker(target=idle, args=(output / f"worker-{method}.json",), daemon=True).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
