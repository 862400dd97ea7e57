"""The weights of the best evaluation so far, for the end of a training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class BestWeights:
    """Keeps a copy of every parameter and buffer of a model, where it lies: sharded (DTensor) ones each rank's part.

    It is state: tracked by a run (`run.track`) it is in checkpoints, and a rollback has the best of its own branch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live: dict[str, Tensor] = {
            name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)
        }
        self._kept = {name: value.detach().clone() for name, value in self._live.items()}
        self.step: int | None = None
        self.averaged = False

    @torch.no_grad()
    def keep(self, *, step: int, averaged: bool = False) -> None:
        """The model as it is now is the best; `averaged` notes that its parameters are a moving average's."""
        for name, kept in self._kept.items():
            kept.copy_(self._live[name])
        self.step, self.averaged = step, averaged

    @torch.no_grad()
    def put_back(self) -> int | None:
        """Give the model the best weights; the step they are of, or None where none were kept and nothing was done."""
        if self.step is not None:
            for name, kept in self._kept.items():
                self._live[name].copy_(kept)
        return self.step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "averaged": self.averaged, "weights": dict(self._kept)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state in. Raises `KeyError` when it lacks a weight."""
        for name, kept in self._kept.items():
            kept.copy_(state["weights"][name])
        self.step = None if state["step"] is None else int(state["step"])
        self.averaged = bool(state.get("averaged", False))  # before it was noted, no average was kept
