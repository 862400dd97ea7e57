"""Early stopping: when has a metric that should fall stopped falling?"""

import math
from collections.abc import Mapping
from typing import Any


class EarlyStopping:
    """Stops after `patience` evaluations in a row without an improvement of more than `min_delta`.

    Deterministic in what it is given, so ranks that see the same values stop together. A NaN is no improvement. Two
    evaluations at one step count once: an operator who looks again does not use up the patience.
    """

    def __init__(self, *, patience: int, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0.0:
            raise ValueError(f"patience is at least 1 and min_delta at least 0, not {patience} and {min_delta}")
        self.patience = patience
        self.min_delta = min_delta
        self.best = math.inf
        self.waited = 0
        self._judged_step = -1

    @property
    def exhausted(self) -> bool:
        return self.waited >= self.patience

    def judge(self, value: float, *, step: int) -> None:
        """Take the metric as evaluated at `step`."""
        if step == self._judged_step:
            return
        self._judged_step = step
        if value < self.best - self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "judged_step": self._judged_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = float(state["best"])
        self.waited = int(state["waited"])
        self._judged_step = int(state["judged_step"])
