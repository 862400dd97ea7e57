"""Learning rate, weight decay, momentum and betas set by the operator, outside the schedule.

A hook before the optimizer's step puts the effective value into the parameter groups, a hook after it puts the
scheduled value back before the scheduler moves (`override_hooks`): schedulers never see an override, whatever they do
to the groups. What is set is a rule for each value and group (`override_rules`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.optim import SGD, Optimizer

from trainctl.trainer.override_hooks import Watch, swaps_of
from trainctl.trainer.override_rules import (
    FIELDS,
    FREE,
    LR,
    RELEASE,
    Place,
    Row,
    Rule,
    Rules,
    group_of,
    key_of,
    part_of,
    problem_with,
    rows_of,
    rules_from,
    undone,
)
from trainctl.wire.commands import LARGEST, Act, LrRelease, LrScale, LrSet, SetTunable


class Overrides:
    """The operator's values for every group of every optimizer; a group's number counts over all optimizers in order.

    `group=None` means all groups, those added later included, and replaces what was set for single ones. A weight decay
    or momentum for all groups leaves out those where the script has 0 while others have not: it wants none there. Call
    the methods that change something at a boundary, on the main thread.
    """

    def __init__(self, optimizers: Sequence[Optimizer], *, phase: AbstractContextManager[Any] | None = None) -> None:
        """`phase` is entered around each outermost step, to time it."""
        self._rules: Rules = {}
        # (scheduled, effective) LR of the first group in the last step that ran: what a step's row is logged with.
        self.used_lr: tuple[float, float] | None = None
        # Where that LR lies on a device it is handed to this instead, by the metric's name, without waiting for it.
        self.log_on_device: Callable[[str, torch.Tensor], None] | None = None
        self._watches = [Watch(optimizer=optimizer, phase=phase) for optimizer in optimizers]
        for index, watch in enumerate(self._watches):
            watch.hook(lambda index=index, watch=watch: self._begin(index, watch))  # type: ignore[misc]

    # --- changes

    def scale_lr(self, factor: float, group: int | None = None) -> None:
        """Effective LR = scheduled × `factor`: relative to the schedule, so a second scale replaces the first.

        A pinned LR is released. Raises ValueError, also in the other setters, for what `check` names.
        """
        right = 0 < factor <= LARGEST
        _refuse(not right, f"the factor is {factor}: give a number above 0, up to {LARGEST:g}")
        self._put(LR, group, Rule(kind="scale", value=factor))

    def set_lr(self, value: float, group: int | None = None) -> None:
        """Pin the LR to `value` whatever the schedule says; a scale is replaced."""
        _refuse(not 0 <= value <= LARGEST, f"the learning rate is {value}: give 0 or more, up to {LARGEST:g}")
        self._put(LR, group, Rule(kind="pin", value=value))

    def release_lr(self, group: int | None = None) -> None:
        """Give the LR back to the schedule."""
        self._put(LR, group, FREE)

    def set_field(self, name: str, value: float, group: int | None = None) -> None:
        """Pin `weight_decay`, `momentum`, `beta1` or `beta2`."""
        reason = problem_with(name, value)
        _refuse(reason is not None, str(reason))
        self._put(name, group, Rule(kind="pin", value=float(value)))

    def release_field(self, name: str, group: int | None = None) -> None:
        """Give a field back to the script."""
        _refuse(name not in FIELDS, f"{name} is no field of an optimizer that can be set")
        self._put(name, group, FREE)

    def apply(self, action: Act) -> None:
        """Carry out an LR command, or `set` of a field. Raises ValueError for any other."""
        match action:
            case LrScale():
                self.scale_lr(action.factor, action.group)
            case LrSet():
                self.set_lr(action.value, action.group)
            case LrRelease():
                self.release_lr(action.group)
            case SetTunable(name=name, value=value) if name in FIELDS and value == RELEASE:
                self.release_field(name, action.group)
            case SetTunable(name=name, value=int() | float() as value) if name in FIELDS:
                self.set_field(name, float(value), action.group)
            case _:
                raise ValueError(f"{action} changes nothing in an optimizer")

    def check(self, action: Act, *, boundary: int = 0) -> str | None:
        """Why `action` cannot be carried out, or None. `boundary`: how many steps are completed.

        Any thread may call it; it looks at the groups and changes nothing in them.
        """
        if not self._watches:
            return "no optimizer was given to Run.attach: pass optimizer="
        group = group_of(action)
        if group is not None and group >= self.groups:
            return f"there is no group {group}: the optimizers have {self.groups}, counted from 0"
        if isinstance(action, SetTunable) and (problem := self._field_problem(action)) is not None:
            return problem
        return self.unobserved(boundary, group=group)

    def unobserved(self, boundary: int, *, group: int | None = None) -> str | None:
        """Why an override would have no effect, or None: an optimizer whose steps do not pass its hooks.

        `group`: only the optimizer to which it belongs is looked at.
        """
        first = 0
        for watch in self._watches:
            groups = range(first, first + len(watch.optimizer.param_groups))
            first = groups.stop
            if group is not None and group not in groups:
                continue
            name = type(watch.optimizer).__name__
            if not watch.hooked:
                return f"{name} runs no step hooks: pass the optimizer that it wraps to Run.attach"
            if watch.unobserved(boundary):
                return (
                    f"{name} changes parameters without passing its step hooks (SAM, a CUDA graph, a wrapper): its "
                    "learning rate is out of reach; pass the optimizer whose step() is called to Run.attach"
                )
        return None

    @contextlib.contextmanager
    def expected_writes(self) -> Iterator[None]:
        """Parameters are written to for a good reason (an evaluation swaps weights): do not take it for a step."""
        with contextlib.ExitStack() as stack:
            for watch in self._watches:
                stack.enter_context(watch.expected_writes())
            yield

    def begin_anew(self, boundary: int) -> None:
        """The run stands at `boundary` after a restart or a rollback."""
        for watch in self._watches:
            watch.begin_anew(boundary)

    # --- what is true now

    @property
    def groups(self) -> int:
        """How many parameter groups there are in all optimizers together."""
        return sum(len(watch.optimizer.param_groups) for watch in self._watches)

    @property
    def observed_steps(self) -> int:
        """Outermost optimizer steps that passed the hooks, of all optimizers together."""
        return sum(watch.observed for watch in self._watches)

    @property
    def on_device(self) -> bool:
        """Whether the first group's LR lies on a device: reading it waits, and breaks a graph that is captured."""
        return bool(self._watches) and on_a_device(self._watches[0].optimizer.param_groups[0][LR])

    @property
    def active(self) -> bool:
        """Whether any override is set."""
        return bool(self._rules)

    def scheduled_lr(self, group: int = 0) -> float:
        """The LR as the schedule has it, also while a step runs. Raises IndexError for a group that does not exist."""
        return float(self._scheduled(self._place(group), LR))

    def effective_lr(self, group: int = 0) -> float:
        """The LR that the next step will use. Raises IndexError for a group that does not exist."""
        return self.effective(LR, group)

    def lr_rule(self) -> Rule:
        """What is set for the first group's LR, by itself or for all groups."""
        return self._rule(LR, self._place(0)) or FREE

    def effective(self, name: str, group: int | None = None) -> float:
        """What the next step will use; without `group` that of the first which has it and takes what is set for all.

        Raises IndexError where there is none.
        """
        place = self._place(group) if group is not None else self._representative(name)
        scheduled = float(self._scheduled(place, name))
        rule = self._rule(name, place)
        return scheduled if rule is None else rule.effective(scheduled)

    def fields(self) -> dict[str, float]:
        """The effective value of every field that an optimizer has, by name."""
        return {name: self.effective(name) for name in FIELDS if self._places_with(name)}

    def describe(self) -> dict[str, str]:
        """Every override in words, by name: `{"lr": "× 0.5, group 2 = 0.0001"}`."""
        found = {}
        for name, rules in list(self._rules.items()):
            words = [
                rule.words() if place is None else f"group {self._number(place)} {rule.words()}"
                for place, rule in list(rules.items())
            ]
            found[name] = ", ".join(words)
        return found

    # --- keeping

    def rows(self, names: Sequence[str]) -> list[Row]:
        """The rules of these names, for `undo`."""
        return rows_of({name: self._rules[name] for name in names if name in self._rules})

    def undo(self, *, before: Sequence[Row], after: Sequence[Row]) -> None:
        """Undo the change that led from `before` to `after`; what was changed since then stays."""
        self.heal()
        self._rules = undone(self._rules, before=rules_from(before), after=rules_from(after))

    def state_dict(self) -> dict[str, Any]:
        """The rules, as plain lists and numbers."""
        return {"rules": rows_of(self._rules)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the rules. Those for a group that does not exist do nothing."""
        rules = rules_from(state["rules"])
        self.heal()
        self._rules = rules

    def heal(self) -> None:
        """Put scheduled values back after a step that never ended. Call at a boundary: no step may be running."""
        for watch in self._watches:
            watch.heal()

    def detach(self) -> None:
        """Take the hooks away; the optimizers are as they were."""
        self.heal()
        for watch in self._watches:
            watch.detach()

    # --- inside

    def _begin(self, index: int, watch: Watch) -> None:
        groups = watch.optimizer.param_groups
        if index == 0:
            self._note_lr(groups[0][LR], "lr_scheduled")
        if self._rules:
            watch.swaps = swaps_of(groups, lambda name, number: self._rule(name, (index, number)))
        if index == 0 and self.used_lr is None:
            self._note_lr(groups[0][LR], "lr")

    def _note_lr(self, scheduled: Any, metric: str) -> None:
        if not on_a_device(scheduled):
            number = float(scheduled)
            rule = self._rule(LR, (0, 0)) if self._rules else None
            self.used_lr = (number, number if rule is None else rule.effective(number))
            return
        self.used_lr = None
        capturing = scheduled.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.log_on_device is not None and not capturing:
            self.log_on_device(metric, scheduled)

    def _put(self, name: str, group: int | None, rule: Rule) -> None:
        self.heal()
        rules: dict[Place | None, Rule] = {}
        if group is not None:
            try:
                place = self._place(group)
            except IndexError as error:
                raise ValueError(str(error)) from None
            rules = {**self._rules.get(name, {}), place: rule}
            if rule.kind == "free" and None not in rules:
                del rules[place]
        elif rule.kind != "free":
            rules = {None: rule}
        others = {other: found for other, found in self._rules.items() if other != name}
        # A new dict each time, because the sender thread reads the rules while they are changed.
        self._rules = {**others, name: rules} if rules else others

    def _rule(self, name: str, place: Place) -> Rule | None:
        rules = self._rules.get(name)
        if rules is None:
            return None
        own = rules.get(place)
        rule = own if own is not None else rules.get(None)
        if rule is None or rule.kind == "free" or (own is None and self._spared(name, place)):
            return None
        return rule

    def _spared(self, name: str, place: Place) -> bool:
        """Whether a value for all groups leaves this one out, because the script wants none here."""
        if name not in {"weight_decay", "momentum"} or float(self._scheduled(place, name) or 0.0) != 0.0:
            return False
        return any(float(self._scheduled(other, name)) != 0.0 for other in self._places_with(name))

    def _places_with(self, name: str) -> list[Place]:
        return [
            (index, number)
            for index, watch in enumerate(self._watches)
            for number, group in enumerate(watch.optimizer.param_groups)
            if group.get(key_of(name)) is not None
        ]

    def _representative(self, name: str) -> Place:
        places = self._places_with(name)
        if not places:
            raise IndexError(f"no optimizer has {name}")
        return next((place for place in places if not self._spared(name, place)), places[0])

    def _place(self, group: int) -> Place:
        left = group
        for index, watch in enumerate(self._watches):
            if 0 <= left < len(watch.optimizer.param_groups):
                return index, left
            left -= len(watch.optimizer.param_groups)
        raise IndexError(f"there is no group {group}: the optimizers have {self.groups}, counted from 0")

    def _number(self, place: Place) -> int:
        return sum(len(watch.optimizer.param_groups) for watch in self._watches[: place[0]]) + place[1]

    def _scheduled(self, place: Place, name: str) -> Any:
        watch = self._watches[place[0]]
        group, key = watch.optimizer.param_groups[place[1]], key_of(name)
        for swap in watch.swaps:
            if swap.group is group and swap.key == key:
                return part_of(name, swap.scheduled)
        return part_of(name, group.get(key))

    def _field_problem(self, action: SetTunable) -> str | None:
        name, value = action.name, action.value
        if name in FIELDS and value == RELEASE:
            return None
        if (problem := problem_with(name, value)) is not None:
            return problem
        places = self._places_with(name)
        if action.group is not None:
            places = [place for place in places if place == self._place(action.group)]
        if not places:
            names = sorted({type(watch.optimizer).__name__ for watch in self._watches})
            return f"{', '.join(names)} has no {name}" + (f" in group {action.group}" if action.group else "")
        if name == "momentum" and value:
            # RMSprop makes its buffer with its first step, and would fail in the next one.
            off = [place for place in places if float(self._scheduled(place, name)) == 0.0]
            wanted = [place for place in off if action.group is not None or not self._spared(name, place)]
            kinds = [type(self._watches[index].optimizer) for index, _ in wanted]
            for kind in kinds:
                if not issubclass(kind, SGD):
                    return f"{kind.__name__} was made without momentum: it cannot be switched on"
        return None


def on_a_device(value: Any) -> bool:
    """Whether reading a number would wait for a device."""
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _refuse(bad: bool, reason: str) -> None:
    if bad:
        raise ValueError(reason)
