"""What an operator set for the optimizers' groups, as plain rules. Pure: no optimizer, no tensor.

A rule says how a value that the schedule has becomes the one that a step uses. It stands for all groups (`None`) or for
one, and the one for a single group wins over the one for all.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from trainctl.wire.commands import LARGEST, Act, LrRelease, LrScale, LrSet, SetTunable

LR = "lr"
FIELDS: tuple[str, ...] = ("weight_decay", "momentum", "beta1", "beta2")
RELEASE = "release"  # as the value of `set NAME`: give it back to the script

Kind: TypeAlias = Literal["scale", "pin", "free"]
Place: TypeAlias = tuple[int, int]  # optimizer, group within it
Row: TypeAlias = list[Any]  # name, optimizer, group, kind, value


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`scale`: times the scheduled value; `pin`: this value; `free`: scheduled, whatever is set for all groups."""

    kind: Kind
    value: float = 1.0

    def effective(self, scheduled: float) -> float:
        match self.kind:
            case "scale":
                return scheduled * self.value
            case "pin":
                return self.value
            case _:
                return scheduled

    def words(self) -> str:
        """`× 0.5`, `= 0.0001` or `scheduled`."""
        sign = {"scale": "×", "pin": "=", "free": "scheduled"}[self.kind]
        return sign if self.kind == "free" else f"{sign} {self.value:g}"


FREE = Rule(kind="free")

RulesOfName: TypeAlias = dict[Place | None, Rule]
Rules: TypeAlias = dict[str, RulesOfName]


def rows_of(rules: Mapping[str, RulesOfName]) -> list[Row]:
    """The rules as lists of numbers and words, fit for a checkpoint and for JSON."""
    return [
        [name, *(place if place is not None else (None, None)), rule.kind, rule.value]
        for name, places in rules.items()
        for place, rule in places.items()
    ]


def rules_from(rows: Iterable[Sequence[Any]]) -> Rules:
    rules: Rules = {}
    for name, optimizer, group, kind, value in rows:
        place = None if optimizer is None else (int(optimizer), int(group))
        rules.setdefault(str(name), {})[place] = Rule(kind=kind, value=float(value))
    return rules


def undone(now: Rules, *, before: Rules, after: Rules) -> Rules:
    """`now` without the change that led from `before` to `after`; what was changed since then stays as it is.

    Only the names in `before` and `after` are looked at, the others are as they are in `now`.
    """
    result = {name: dict(places) for name, places in now.items()}
    for name in before.keys() | after.keys():
        was, became, found = before.get(name, {}), after.get(name, {}), now.get(name, {})
        places: RulesOfName = {}
        for place in [None, *sorted({*was, *became, *found} - {None}, key=str)]:
            newest = found.get(place)
            rule = was.get(place) if newest == became.get(place) else newest
            if rule is not None and not (place is None and rule.kind == "free"):
                places[place] = rule
        if places:
            result[name] = places
        else:
            result.pop(name, None)
    return result


def names_in(action: Act) -> tuple[str, ...]:
    """The rules that an action changes, by name; none where it changes nothing in an optimizer."""
    match action:
        case LrScale() | LrSet() | LrRelease():
            return (LR,)
        case SetTunable(name=name) if name in FIELDS:
            return (name,)
        case _:
            return ()


def group_of(action: Act) -> int | None:
    """The single group that an action is for, None for all."""
    return action.group if isinstance(action, LrScale | LrSet | LrRelease | SetTunable) else None


def key_of(name: str) -> str:
    """The key under which an optimizer's group has a field."""
    return "betas" if name in {"beta1", "beta2"} else name


def part_of(name: str, value: Any) -> Any:
    """A field's own part of what a group has under its key."""
    return value if value is None or key_of(name) != "betas" else value[0 if name == "beta1" else 1]


def problem_with(name: str, value: object) -> str | None:
    """Why a field cannot become `value`, or None."""
    if name not in FIELDS:
        return f"{name} is no field of an optimizer that can be set: there are {', '.join(FIELDS)}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return f"{name} is {value}: give a finite number, 0 or more, or `{RELEASE}`"
    if name != "weight_decay" and value >= 1:
        return f"{name} is {value}: give a number below 1"
    if value > LARGEST:
        return f"{name} is {value:g}: give a number up to {LARGEST:g}"
    return None
