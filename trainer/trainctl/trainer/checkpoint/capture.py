"""The state of a run as two trees: what is shared by all ranks and holds tensors, and what belongs to one rank."""

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainctl.trainer.checkpoint.rng import capture_rng
from trainctl.trainer.checkpoint.state import Accessor, State, Tracked
from trainctl.trainer.checkpoint.tree import Node, References, encode, keep_inline


@dataclass(frozen=True, kw_only=True)
class Captured:
    """`nodes` by part name, with references into `tensors`, which are still the live ones."""

    nodes: dict[str, Node]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def bare(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel and torch.compile, so that names do not depend on them."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            return model


def capture_shared(state: State) -> Captured:
    """Models, optimizers and tracked objects. Raises CheckpointError for what is not data."""
    references = References()
    nodes: dict[str, Node] = {}
    for index, model in enumerate(state.models):
        nodes[f"model.{index}"] = encode(bare(model).state_dict(), f"model.{index}", references)
    for index, optimizer in enumerate(state.optimizers):
        # Not get_optimizer_state_dict: it takes an empty step to fill lazy state, and that step fires hooks.
        nodes[f"optimizer.{index}"] = encode(optimizer.state_dict(), f"optimizer.{index}", references)
    for name, tracked in state.tracked.items():
        nodes[f"tracked.{name}"] = encode(_value(tracked), f"tracked.{name}", references)
    return Captured(nodes=nodes, tensors=references.tensors)


def capture_tracked(name: str, tracked: Tracked) -> Captured:
    """One tracked object. Raises CheckpointError for what is not data."""
    references, path = References(), f"tracked.{name}"
    return Captured(nodes={path: encode(_value(tracked), path, references)}, tensors=references.tensors)


def capture_rank(state: State) -> Captured:
    """Everything else, this rank's own: small, and copied at once."""
    nodes: dict[str, Node] = {}
    for index, scheduler in enumerate(state.schedulers):
        path = f"scheduler.{index}"
        nodes[path] = encode(scheduler.state_dict(), path, keep_inline, skip_code=True)
    single = {
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "loader": state.loader.state_dict() if state.loader is not None else None,
        "overrides": state.overrides.state_dict() if state.overrides is not None else None,
        "tunables": _values(state.tunables),
        "trials": state.trials.state_dict() if state.trials is not None else None,
        "counters": _values(state.counters),
        "rng": capture_rng(),
    }
    for name, value in single.items():
        if value is not None:
            nodes[name] = encode(value, name, keep_inline)
    return Captured(nodes=nodes)


def _value(tracked: Tracked) -> Any:
    return tracked.get() if isinstance(tracked, Accessor) else tracked.state_dict()


def _values(values: MutableMapping[str, Any] | Accessor) -> dict[str, Any]:
    return dict(values.get() if isinstance(values, Accessor) else values)
