"""Ends while much of what it logged is still on its way: calls that the sender has not taken, values of a device.

usage: lagging.py OUTPUT --lag S     how long after the last step the device brings its values, in seconds
"""

import argparse
import json
import time
from pathlib import Path

import torch

from trainctl.trainer import Run
from trainctl.trainer.device import ScalarPool

STEPS = 11_000


class Lagging:
    """A device that has done nothing before training ended, and its own event. Every value of it is 2.5."""

    def __init__(self, lag_s: float) -> None:
        self.lag_s = lag_s
        self.ended: float | None = None

    def query(self) -> bool:
        return self.ended is not None and time.monotonic() >= self.ended + self.lag_s

    def elapsed_time(self, end: "Lagging") -> float:
        raise NotImplementedError

    def copy(self, value: torch.Tensor, slot: int) -> None:
        pass

    def read(self, slot: int) -> float:
        return 2.5

    def event(self) -> "Lagging":
        return self

    def record(self, event: "Lagging") -> None:
        pass

    def capturing(self) -> bool:
        return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--lag", type=float, required=True)
    given = parser.parse_args()
    run = Run.attach("lagging")
    device = Lagging(given.lag)
    run._buffer._pools._pools[torch.device("meta")] = ScalarPool(device)
    far_away = torch.empty((), device="meta")
    for step in range(1, STEPS + 1):
        run.log(loss=1.0 / step)
        if step <= 10:
            run.log(norm=far_away)
        run.step_done()
    run.log(test_accuracy=0.93)
    waiting = len(run._buffer)
    device.ended = began = time.monotonic()
    run.close()
    told = {"waiting": waiting, "left": len(run._buffer), "took_s": time.monotonic() - began}
    (given.output / "closing.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
