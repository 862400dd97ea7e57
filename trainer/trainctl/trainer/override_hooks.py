"""The hooks on one optimizer: an effective value goes into the groups before its step, the scheduled one back after it.

- Only the outermost of nested steps counts: a subclass that calls `super().step()` fires the hooks twice.
- A step that raises fires no post hook: `step` is wrapped on the instance, as torch's own schedulers do, only to heal
  there. Where the wrapper is by-passed (a step compiled before attach), `heal()` at the next boundary does it.
- A value is put back only if nobody wrote to the group in between.
- Tensor values are changed in place, because compiled and captured steps hold on to the tensor.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from trainctl.trainer.override_rules import FIELDS, LR, Rule

# A GradScaler that starts at 2**16 may skip up to sixteen steps before its first: fewer boundaries prove nothing.
UNOBSERVED_BOUNDARIES = 20
_LOOKED_AT = 8  # parameters, spread over all groups
_KEYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (LR, (LR,)),
    *((name, (name,)) for name in FIELDS[:2]),
    ("betas", FIELDS[2:]),
)


@dataclass(frozen=True, kw_only=True)
class Swap:
    """One value that was replaced for the duration of a step."""

    group: dict[str, Any]
    key: str
    scheduled: Any
    effective: Any
    version: int | None = None  # of a tensor that was filled in place, right afterwards

    def undo(self) -> None:
        now = self.group.get(self.key)
        if now is not self.effective:
            return  # somebody wrote a new scheduled value
        if self.version is None:
            self.group[self.key] = self.scheduled
        elif now._version == self.version:
            with torch.no_grad():
                now.copy_(self.scheduled)


@dataclass(kw_only=True)
class Seen:
    """What was known of an optimizer's steps when one was last seen."""

    observed: int = 0
    boundary: int = 0
    problem: bool = False


def _spread(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """One trainable parameter of each of a few stretches of all, where a stretch has one."""
    found = []
    for part in range(_LOOKED_AT):
        begin, end = (len(parameters) * edge // _LOOKED_AT for edge in (part, part + 1))
        stretch = parameters[begin:end][:: -1 if part % 2 else 1]
        found += [parameter for parameter in stretch if parameter.requires_grad][:1]
    return found


@dataclass(kw_only=True, eq=False)
class Watch:
    """One optimizer: its hooks, how deep in nested steps it is, and what is replaced meanwhile."""

    optimizer: Optimizer
    phase: AbstractContextManager[Any] | None = None  # times the outermost step
    hooked: bool = False
    handles: list[RemovableHandle] = field(default_factory=list)
    depth: int = 0
    timing: bool = False
    observed: int = 0
    swaps: list[Swap] = field(default_factory=list)
    after: int = 0  # version of the parameters at the end of the last observed step
    seen: Seen = field(default_factory=Seen)
    _made_of: tuple[tuple[int, int, int], ...] = ()
    _looked_at: list[torch.Tensor] = field(default_factory=list)

    def hook(self, begin: Callable[[], None]) -> None:
        """Set the hooks; `begin` is called where an outermost step begins, to replace what is to be replaced."""
        # A wrapper that did not call super().__init__() has no table of hooks and runs none.
        self.hooked = hasattr(self.optimizer, "_optimizer_step_pre_hooks")
        if self.hooked:
            # Not to be traced: a compiled step that took them in was compiled anew at each change and, in torch 2.13,
            # put the scheduled value back wrongly. The making of the optimizer has imported the compiler already.
            before = torch.compiler.disable(lambda _o, _a, _k: self._before(begin))
            after = torch.compiler.disable(lambda _o, _a, _k: self._after())
            self.handles.append(self.optimizer.register_step_pre_hook(before))
            self.handles.append(self.optimizer.register_step_post_hook(after))
            self._heal_when_raising()
        self.after = self.version()

    def undo(self) -> None:
        """The outermost step is over, however it ended."""
        swaps, self.swaps = self.swaps, []
        if self.phase is not None and self.timing:
            self.timing = False
            self.phase.__exit__(None, None, None)
        for swap in swaps:
            swap.undo()
        self.after = self.version()

    def heal(self) -> None:
        """End a step that never ended. No step may be running."""
        if self.depth:
            self.depth = 0
            self.undo()

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def version(self) -> int:
        """How often the parameters that are looked at were written to, by anybody.

        Those are one trainable one in each of a few stretches of all, the first and the last among them: one alone may
        never get a gradient.
        """
        # Asked at each step: which they are is found out only where the groups are not what they were.
        groups = [group["params"] for group in self.optimizer.param_groups]
        made_of = tuple((len(group), id(group[0]), id(group[-1])) for group in groups if group)
        version = 0
        if made_of == self._made_of and self._looked_at:
            for parameter in self._looked_at:
                if not parameter.requires_grad:
                    break
                version += parameter._version
            else:
                return version
        self._made_of, self._looked_at = made_of, _spread([parameter for group in groups for parameter in group])
        return sum(parameter._version for parameter in self._looked_at)

    def may_be_captured(self) -> bool:
        """Whether a CUDA graph could make this optimizer's steps."""
        return any(parameter.is_cuda for group in self.optimizer.param_groups for parameter in group["params"])

    @contextlib.contextmanager
    def expected_writes(self) -> Iterator[None]:
        """Parameters are written to for a good reason: not to be taken for a step."""
        before = self.version()
        try:
            yield
        finally:
            self.after += self.version() - before

    def begin_anew(self, boundary: int) -> None:
        """The run stands at `boundary` now, after a restart or a rollback: what was seen before says nothing."""
        self.after = self.version()
        self.seen = Seen(observed=self.observed, boundary=boundary)

    def unobserved(self, boundary: int) -> bool:
        """Whether parameters are changed by steps that pass no hook, judged from what happened since the last call.

        Written to without one observed step: SAM's second step, foreign wrappers. No step at all in many boundaries, on
        CUDA: a captured graph, whose replay counts no writes. Elsewhere an optimizer that makes no step is just idle:
        frozen, or the other one's turn, as in a GAN. Within one step nothing new can be known: the last answer holds.
        """
        seen, observed, after = self.seen, self.observed, self.after
        passed = boundary - seen.boundary
        if observed > seen.observed or self.depth:
            self.seen = Seen(observed=observed, boundary=boundary)
        elif passed >= 2 or (observed == 0 and passed >= 1):
            # A clean look needs a whole step: one that began before the last look has ended since then.
            replayed = passed >= UNOBSERVED_BOUNDARIES and self.may_be_captured()
            seen.problem = self.version() != after or replayed
        return self.seen.problem

    def _before(self, begin: Callable[[], None]) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        self.observed += 1
        if self.phase is not None:
            self.timing = True
            self.phase.__enter__()
        begin()

    def _after(self) -> None:
        # Never below 0: heal() may have run between the two hooks.
        self.depth = max(0, self.depth - 1)
        if self.depth == 0:
            self.undo()

    def _heal_when_raising(self) -> None:
        """Wrap `step` of this one object, so that a step that raises leaves the scheduled values behind."""
        optimizer, step = self.optimizer, self.optimizer.step

        @functools.wraps(step)
        def healing(_self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return step(*args, **kwargs)
            except BaseException:
                self.depth = 0
                self.undo()
                raise

        # A bound method, because a scheduler that is made later takes `step.__func__`.
        optimizer.step = types.MethodType(healing, optimizer)  # type: ignore[method-assign]


def swaps_of(groups: Sequence[dict[str, Any]], rule: Callable[[str, int], Rule | None]) -> list[Swap]:
    """Replace every value for which `rule(name, number of the group)` gives a rule; return how to put them back."""
    swaps: list[Swap] = []
    for key, names in _KEYS:
        found = []
        for number, group in enumerate(groups):
            if group.get(key) is not None:
                found.append((group, [rule(name, number) for name in names]))
        if any(one is not None for _, rules in found for one in rules):
            swaps += _swaps_of_key(key, found)
    return swaps


def _swaps_of_key(key: str, found: Sequence[tuple[dict[str, Any], list[Rule | None]]]) -> Iterator[Swap]:
    # Groups share one tensor where torch gave them the optimizer's default: it is filled once, and not at all where
    # they are to differ now.
    wanted: dict[int, list[Rule | None]] = {}
    apart = {id(group[key]) for group, rules in found if wanted.setdefault(id(group[key]), rules) != rules}
    filled: dict[int, Swap] = {}
    for group, rules in found:
        value = group[key]
        if all(rule is None for rule in rules):
            continue
        if not isinstance(value, torch.Tensor) or id(value) in apart:
            yield _replace(group, key, rules)
        elif id(value) in filled:
            yield dataclasses.replace(filled[id(value)], group=group)
        else:
            filled[id(value)] = swap = _fill(group, key, rules[0])
            yield swap


def _replace(group: dict[str, Any], key: str, rules: Sequence[Rule | None]) -> Swap:
    scheduled = group[key]
    effective: Any
    if key == "betas":
        effective = tuple(_replaced(value, rule) for value, rule in zip(scheduled, rules, strict=True))
    else:
        effective = _replaced(scheduled, rules[0])
    group[key] = effective
    return Swap(group=group, key=key, scheduled=scheduled, effective=effective)


def _fill(group: dict[str, Any], key: str, rule: Rule | None) -> Swap:
    assert rule is not None
    tensor: torch.Tensor = group[key]
    with torch.no_grad():
        kept = tensor.clone()
        _ = tensor.mul_(rule.value) if rule.kind == "scale" else tensor.fill_(rule.value)
    return Swap(group=group, key=key, scheduled=kept, effective=tensor, version=tensor._version)


def _replaced(value: Any, rule: Rule | None) -> Any:
    if rule is None:
        return value
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, rule.effective(float(value)))
    return rule.effective(value)
