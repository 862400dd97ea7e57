"""Putting a loaded checkpoint into the live objects: copies into what is there, so nothing is shared afterwards."""

import functools
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch.optim import Optimizer

from trainctl.trainer.checkpoint.capture import bare, capture_shared, capture_tracked
from trainctl.trainer.checkpoint.load import Loaded
from trainctl.trainer.checkpoint.sharded import copy_into, moved, same_kind
from trainctl.trainer.checkpoint.state import Accessor, State, Tracked
from trainctl.trainer.checkpoint.tree import decode

_STATE_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class _Host:
    """A host tensor of the checkpoint on its way into the optimizer; `on_cpu`: it lay on the CPU when it was saved."""

    __slots__ = ("on_cpu", "tensor")

    def __init__(self, tensor: torch.Tensor, *, on_cpu: bool) -> None:
        self.tensor = tensor
        self.on_cpu = on_cpu


def commit(state: State, loaded: Loaded, *, restore_overrides: bool) -> None:
    """Make the live state the loaded one, random numbers excepted."""

    @functools.cache
    def live() -> Mapping[str, torch.Tensor]:
        return capture_shared(state).tensors  # not for what is copied in place: it costs as much as many small copies

    def copied(name: str, _device: str) -> torch.Tensor:
        return moved(loaded.tensors[name], live()[name].device if name in live() else "cpu")

    def given(name: str, _device: str) -> torch.Tensor:
        return loaded.tensors[name].clone() if "_extra_state" in name else loaded.tensors[name]

    for index, model in enumerate(state.models):
        # Module.load_state_dict copies into its parameters; it never keeps what it is given, except extra state.
        bare(model).load_state_dict(decode(loaded.shared[f"model.{index}"], given))
    for index, optimizer in enumerate(state.optimizers):
        node = loaded.shared[f"optimizer.{index}"]
        if _keeps_its_state_itself(optimizer):
            optimizer.load_state_dict(decode(node, copied))
        else:
            saved = decode(node, lambda name, device: _Host(loaded.tensors[name], on_cpu=device == "cpu"))
            with torch.no_grad():
                _restore_optimizer(optimizer, saved)
    for name, tracked in state.tracked.items():
        if f"tracked.{name}" in loaded.shared:
            _give(tracked, decode(loaded.shared[f"tracked.{name}"], copied))
    _restore_own(state, loaded, restore_overrides=restore_overrides)


def restore_tracked(loaded: Loaded, name: str, tracked: Tracked) -> bool:
    """Give what is tracked since `loaded` was read its state, whether there is one; no other rank is waited for.

    Raises CheckpointError where it cannot be read, or where what is tracked gives a state that is not data.
    """
    part = f"tracked.{name}"
    if (node := loaded.later.get(part)) is None:
        return False
    live = capture_tracked(name, tracked)
    tensors = loaded.read_later({part: node}, live)

    def copied(tensor: str, _device: str) -> torch.Tensor:
        return moved(tensors[tensor], live.tensors[tensor].device if tensor in live.tensors else "cpu")

    _give(tracked, decode(node, copied))
    return True


def _give(tracked: Tracked, value: Any) -> None:
    if isinstance(tracked, Accessor):
        tracked.set(value)
    else:
        tracked.load_state_dict(value)


def _restore_own(state: State, loaded: Loaded, *, restore_overrides: bool) -> None:
    for index, scheduler in enumerate(state.schedulers):
        if (value := loaded.value(f"scheduler.{index}")) is not None:
            scheduler.load_state_dict(value)
    # A disabled GradScaler has an empty state, which an enabled one would refuse.
    if state.scaler is not None and (value := loaded.value("scaler")):
        state.scaler.load_state_dict(value)
    if restore_overrides:
        if state.overrides is not None and loaded.overrides is not None:
            state.overrides.load_state_dict(loaded.overrides)
        _put(state.tunables, loaded.tunables)
        if state.trials is not None:
            state.trials.load_state_dict(loaded.value("trials") or {"trials": []})
    _put(state.counters, loaded.counters)
    if state.loader is not None and (value := loaded.value("loader")) is not None:
        state.loader.load_state_dict(value)


def _put(target: MutableMapping[str, Any] | Accessor, values: dict[str, Any]) -> None:
    if isinstance(target, Accessor):
        target.set(values)
    else:
        target.clear()
        target.update(values)


def _keeps_its_state_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer gives a state of its own making, which only its own load_state_dict understands."""
    kind = type(optimizer)
    own = kind.state_dict is not Optimizer.state_dict or kind.load_state_dict is not Optimizer.load_state_dict
    return own or any(getattr(optimizer, hooks, None) for hooks in _STATE_HOOKS)


def _restore_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """What Optimizer.load_state_dict does, but in place: that one keeps its tensors, and the next step changes them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_key: dict[Any, Any] = dict(enumerate(parameters))
    stale = set(optimizer.state)
    for key, values in saved["state"].items():
        owner = by_key.get(key, key)
        device = owner.device if isinstance(owner, torch.Tensor) else torch.device("cpu")
        stale.discard(owner)
        # `get`, because the state is a defaultdict and would make up what it does not have.
        optimizer.state[owner] = _assign(optimizer.state.get(owner), values, device)
    for owner in stale:
        del optimizer.state[owner]
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        for name, value in saved_group.items():
            if name not in {"params", "param_names"}:
                group[name] = _assign(group.get(name), value, device)


def _assign(live: Any, saved: Any, device: torch.device) -> Any:
    """`saved` in place of `live`, using live tensors and dicts where they fit."""
    if isinstance(saved, _Host):
        if same_kind(live, saved.tensor):
            copy_into(live, saved.tensor)
            return live
        return moved(saved.tensor, "cpu" if saved.on_cpu else device)
    if isinstance(saved, dict):
        target = live if isinstance(live, dict) else {}
        for gone in target.keys() - saved.keys():
            del target[gone]
        for key, value in saved.items():
            target[key] = _assign(target.get(key), value, device)
        return target
    if isinstance(saved, list | tuple):
        old = live if isinstance(live, list | tuple) and len(live) == len(saved) else [None] * len(saved)
        return type(saved)(_assign(before, value, device) for before, value in zip(old, saved, strict=True))
    return saved
