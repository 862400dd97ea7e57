"""An exponential moving average of a model's parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Keeps `average ← decay · average + (1 − decay) · parameter` for every parameter that is trained.

    Works on plain and on sharded (DTensor) parameters; each rank keeps its own part.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"the decay of an average is between 0 and 1, not {decay}")
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are after an optimizer step."""
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name], 1.0 - self.decay)

    @contextmanager
    def in_place_of_parameters(self) -> Iterator[None]:
        """Let the model compute with the averages for a while; the parameters come back to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self._averages.items():
            parameter = self._parameters[name]
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state in. Raises `KeyError` when it lacks a parameter."""
        for name, average in self._averages.items():
            average.copy_(state[name])
