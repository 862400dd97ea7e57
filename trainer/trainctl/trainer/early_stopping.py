"""Early stopping: when has a metric stopped improving?"""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

Mode: TypeAlias = Literal["min", "max"]


class EarlyStopping:
    """Stops after `patience` evaluations in a row without an improvement of more than `min_delta`.

    `mode`: whether the metric should fall ("min") or rise ("max"). `patience` None never stops, and still tells what is
    the best. Deterministic in what it is given, so ranks that see the same values stop together. A NaN is no
    improvement. Two evaluations at one step count once: an operator who looks again does not use up the patience.
    """

    def __init__(self, *, patience: int | None, min_delta: float = 0.0, mode: Mode = "min") -> None:
        if (patience is not None and patience < 1) or min_delta < 0.0:
            raise ValueError(f"patience is at least 1 and min_delta at least 0, not {patience} and {min_delta}")
        if mode not in {"min", "max"}:
            raise ValueError(f"mode is min or max, not {mode!r}")
        self.patience = patience
        self.min_delta = min_delta
        self.mode = mode
        self._sign = 1.0 if mode == "min" else -1.0
        self._best = math.inf
        self.waited = 0
        self._judged_step = -1

    @property
    def best(self) -> float:
        """The best value so far; infinite (of the worse sign) before the first."""
        return self._sign * self._best

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def judge(self, value: float, *, step: int) -> bool:
        """Take the metric as evaluated at `step`; whether it is the best so far."""
        if step == self._judged_step:
            return False
        self._judged_step = step
        if self._sign * value < self._best - self.min_delta:
            self._best, self.waited = self._sign * value, 0
            return True
        self.waited += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "judged_step": self._judged_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best = self._sign * float(state["best"])
        self.waited = int(state["waited"])
        self._judged_step = int(state["judged_step"])
