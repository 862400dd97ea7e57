"""Values that the operator may change while the script trains: the script's own, and the optimizers' fields."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from trainctl.wire.messages import Tunable

log = logging.getLogger(__name__)

Value: TypeAlias = bool | int | float | str
Kind: TypeAlias = Literal["float", "int", "bool", "str"]


class TunableValue:
    """A value that changes at boundaries only: read `value` wherever the script needs it."""

    __slots__ = ("kind", "maximum", "minimum", "name", "on_change", "unit", "value")

    def __init__(
        self,
        name: str,
        value: Value,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
        unit: str | None = None,
        on_change: Callable[[Value], None] | None = None,
    ) -> None:
        self.name = name
        self.value = value
        self.kind = _kind(value)
        self.minimum = minimum
        self.maximum = maximum
        self.unit = unit
        self.on_change = on_change
        if (problem := self.problem_with(value)) is not None:
            raise ValueError(f"the first value of the tunable {name!r} does not fit it: {problem}")

    def __repr__(self) -> str:
        return f"TunableValue({self.name}={self.value!r})"

    def problem_with(self, value: Value) -> str | None:
        """Why a value does not fit, or None."""
        if self.kind in {"bool", "str"} or isinstance(value, bool | str):
            fits = isinstance(value, bool if self.kind == "bool" else str) and self.kind in {"bool", "str"}
            return None if fits else f"{self.name} takes a {_WORDS[self.kind]}, not {value!r}"
        if self.kind == "int" and not float(value).is_integer():
            return f"{self.name} takes a whole number, not {value!r}"
        if not math.isfinite(value):
            return f"{self.name} takes a finite number, not {value!r}"
        if (self.minimum is not None and value < self.minimum) or (self.maximum is not None and value > self.maximum):
            return f"{self.name} = {value} is out of range: {_range(self.minimum, self.maximum)}"
        return None

    def fit(self, value: Value) -> Value:
        """The value as this tunable's own type. Only for what `problem_with` found right."""
        match self.kind:
            case "int":
                return int(value)
            case "float":
                return float(value)
            case _:
                return value

    def message(self) -> Tunable:
        return Tunable(
            name=self.name,
            value=self.value,
            kind=self.kind,
            minimum=self.minimum,
            maximum=self.maximum,
            unit=self.unit,
        )


class Tunables:
    """The script's tunables, by name, and which of them an operator has set."""

    def __init__(self) -> None:
        self._values: dict[str, TunableValue] = {}
        self.complain: Callable[[str], None] = log.warning
        self._steered: frozenset[str] = frozenset()

    def add(self, tunable: TunableValue) -> TunableValue:
        if tunable.name in self._values:
            raise ValueError(f"there is a tunable {tunable.name!r} already: names are given once")
        self._values[tunable.name] = tunable
        return tunable

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def problem_with(self, name: str, value: Value) -> str | None:
        """Why `name` cannot become `value`, or None."""
        if (found := self._values.get(name)) is None:
            known = ", ".join(sorted(self._values)) or "none"
            return f"there is no tunable {name!r}; this script has: {known}"
        return found.problem_with(value)

    def apply(self, name: str, value: Value, *, steered: bool = True) -> tuple[Value, Value]:
        """Set a value that `problem_with` found right; return it before and after. `steered`: an operator wants it."""
        found = self._values[name]
        self._steered = self._steered | {name} if steered else self._steered - {name}
        before, found.value = found.value, found.fit(value)
        self._tell(found)
        return before, found.value

    def may_raise(self, name: str) -> bool:
        """Whether the script has a callback of its own for this value, which is then tried on every rank first."""
        return name in self._values and self._values[name].on_change is not None

    def try_out(self, name: str, value: Value) -> str | None:
        """Set a value, for `apply` or `take_back` to follow; why the script's callback did not take it, or None."""
        found = self._values[name]
        found.value = found.fit(value)
        try:
            if found.on_change is not None:
                found.on_change(found.value)
        except Exception as error:  # noqa: BLE001 - the script's own
            return f"on_change of {name} raised {type(error).__name__}: {error}"
        return None

    def take_back(self, name: str, value: Value) -> None:
        """Put the value back that was there before `try_out`."""
        found = self._values[name]
        found.value = value
        self._tell(found)

    def take(self, name: str, before: Value) -> tuple[Value, Value]:
        """Keep what was tried out, where it was `before`; return it before and after."""
        self._steered = self._steered | {name}
        return before, self._values[name].value

    def _tell(self, found: TunableValue) -> None:
        """A callback that raises costs no run: the value is set all the same."""
        try:
            if found.on_change is not None:
                found.on_change(found.value)
        except Exception as error:  # noqa: BLE001 - the script's own
            self.complain(f"on_change of {found.name} raised {type(error).__name__} for {found.value!r}: {error}")

    def messages(self) -> list[Tunable]:
        return [tunable.message() for tunable in list(self._values.values())]

    def values(self) -> dict[str, Value]:
        return {name: tunable.value for name, tunable in list(self._values.items())}

    def steered(self) -> dict[str, Value]:
        """The values that an operator has set, by name."""
        steered = self._steered
        return {name: tunable.value for name, tunable in list(self._values.items()) if name in steered}

    def is_steered(self, name: str) -> bool:
        return name in self._steered

    def restore(self, values: Mapping[str, Value], *, steered: bool | None = None) -> None:
        """Take values that were kept, as far as they still fit what the script registered.

        `steered`: whether an operator had set them; None: as it is known of each.
        """
        for name, value in values.items():
            if name in self._values and self.problem_with(name, value) is None:
                self.apply(name, value, steered=self.is_steered(name) if steered is None else steered)


_WORDS = {"bool": "true or false", "str": "text", "int": "whole number", "float": "number"}


def _kind(value: Value) -> Kind:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int"
    return "float" if isinstance(value, float) else "str"


def _range(minimum: float | None, maximum: float | None) -> str:
    if minimum is None:
        return f"at most {maximum}"
    return f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
