"""Whatever a script hands to the run, its own classes' exceptions never reach the training loop."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from one_rank import OneRank
from torch.nn.parameter import UninitializedParameter

from trainctl.trainer.actions import evaluate
from trainctl.trainer.attach import _plain
from trainctl.trainer.buffer import NotANumber, Rewind, RowBuffer, StepMark
from trainctl.trainer.core import Callbacks
from trainctl.trainer.device import Pools, ScalarPool
from trainctl.trainer.off import OffRun
from trainctl.trainer.phases import Phases
from trainctl.trainer.run import Run


class Unwilling:
    """Raises at whatever it is asked."""

    def __getattribute__(self, name: str) -> Any:
        raise ArithmeticError(name)

    def __hash__(self) -> int:
        raise ArithmeticError("hash")

    def __eq__(self, other: object) -> bool:
        raise ArithmeticError("eq")

    def __bool__(self) -> bool:
        raise ArithmeticError("bool")

    def __str__(self) -> str:
        raise ArithmeticError("str")

    __repr__ = __str__

    def __float__(self) -> float:
        raise ArithmeticError("float")


class RaisingFunctions(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise LookupError("no function")


class RaisingCopies(torch.Tensor):
    """A device's scalar with nothing to say against it until it is copied."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            raise LookupError("no copies")
        return super().__torch_function__(func, types, args, kwargs or {})


class RaisingDispatch(torch.Tensor):
    @staticmethod
    def __new__(cls) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(cls, ())  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise LookupError("no dispatch")


def strided_nested() -> torch.Tensor:
    with pytest.warns(UserWarning, match="nested tensors"):
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.strided)


def logged(buffer: RowBuffer, **values: Any) -> dict[str, Any]:
    buffer.log(1, values)
    (entry,) = buffer.take(10)
    assert not isinstance(entry, StepMark | Rewind)
    return entry[1]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (strided_nested, "Tensor"),
        (UninitializedParameter, "UninitializedParameter"),
        (lambda: torch.zeros(()).as_subclass(RaisingFunctions), "RaisingFunctions"),
        (RaisingDispatch, "RaisingDispatch"),
    ],
)
def test_a_tensor_whose_own_code_raises_is_no_number_and_the_others_are(make: Any, what: str) -> None:
    found = logged(RowBuffer(), odd=make(), loss=torch.tensor(1.5), acc=0.5)
    assert isinstance(found["odd"], NotANumber)
    assert found["odd"].what.startswith(what)
    assert (found["loss"], found["acc"]) == (1.5, 0.5)


def test_an_object_that_raises_at_everything_is_taken_without_a_word() -> None:
    found = logged(RowBuffer(), odd=Unwilling(), loss=torch.tensor(1.5))
    assert found["loss"] == 1.5
    assert "odd" in found


class Copier:
    """A device that copies at once by torch's own `copy_`."""

    def __init__(self) -> None:
        self.slots = [torch.zeros(()) for _ in range(8)]

    def copy(self, value: torch.Tensor, slot: int) -> None:
        # The number is not there on `meta`; what matters is whose code runs.
        torch.zeros((), device="meta").copy_(value)
        self.slots[slot] = torch.tensor(2.0)

    def read(self, slot: int) -> float:
        return float(self.slots[slot])

    def event(self) -> "Copier":
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Copier") -> float:
        raise NotImplementedError

    def record(self, event: Any) -> None:
        pass

    def capturing(self) -> bool:
        return False


def test_a_devices_scalar_that_cannot_be_copied_takes_no_other_with_it() -> None:
    pools = Pools()
    pools._pools[torch.device("meta")] = ScalarPool(Copier(), slots=8, calls=4)
    odd = torch.empty((), device="meta").as_subclass(RaisingCopies)
    found = logged(RowBuffer(pools=pools), odd=odd, loss=torch.empty((), device="meta"))
    assert found["loss"] == 2.0
    assert isinstance(found["odd"], NotANumber)


def test_a_device_whose_driver_raises_is_one_that_cannot_be_read() -> None:
    class Broken(Pools):
        def of(self, device: torch.device) -> ScalarPool | None:
            raise OSError(f"no driver for {device}")

    found = logged(RowBuffer(pools=Broken()), loss=torch.empty((), device="meta"), acc=0.5)
    assert isinstance(found["loss"], NotANumber)
    assert found["acc"] == 0.5


@pytest.mark.parametrize("make", [list, dict, Unwilling, lambda: None, lambda: 7])
def test_a_phase_may_be_named_by_anything(make: Callable[[], Any]) -> None:
    phases = Phases()
    with phases.get(make()):
        pass
    with phases.get("forward"):
        pass
    assert "forward" in phases._known


class Unresolved(Mapping[str, Any]):
    """A configuration with a value that is missing, as OmegaConf's are."""

    def __getitem__(self, name: str) -> Any:
        if name == "missing":
            raise LookupError("missing mandatory value")
        return {"lr": 0.1, "odd": Unwilling()}[name]

    def __iter__(self) -> Iterator[str]:
        return iter(["missing", "lr", "odd"])

    def __len__(self) -> int:
        return 3


def test_a_configuration_is_shown_as_far_as_it_can_be_read() -> None:
    assert _plain(Unresolved()) == {
        "missing": "(cannot be read: LookupError)",
        "lr": 0.1,
        "odd": "(Unwilling, cannot be shown: ArithmeticError)",
    }


def test_a_configuration_without_readable_names_is_empty() -> None:
    class Nameless(Unresolved):
        def __iter__(self) -> Iterator[str]:
            raise ArithmeticError

    assert _plain(Nameless()) == {}


@pytest.mark.parametrize("make", [lambda: torch.zeros(3), lambda: 0.5, Unwilling, lambda: [1.0]])
def test_an_evaluation_that_returns_no_metrics_is_told_of(tmp_path: Path, make: Callable[[], Any]) -> None:
    one, returned = OneRank(tmp_path), make()
    one.core.callbacks = Callbacks(on_eval=lambda: returned)
    evaluate(one.core, lambda: None)
    (told,) = [event for event in one.core.events if getattr(event, "what", "") == "metric"]
    assert f"on_eval returned a {type(returned).__name__}, no metrics by name" in told.text  # type: ignore[union-attr]


def test_an_evaluations_numbers_are_kept_beside_what_is_none(tmp_path: Path) -> None:
    one = OneRank(tmp_path)
    metrics: dict[str, Any] = {"val": 0.5, "odd": Unwilling(), "many": torch.zeros(3)}
    one.core.callbacks = Callbacks(on_eval=lambda: metrics)
    evaluate(one.core, lambda: None)
    assert one.core.last_metrics == {"val": 0.5}
    assert len(one.core.events) == 2


@pytest.mark.parametrize("log", [Run.log, OffRun.log])
def test_a_metric_may_be_called_self(log: Callable[..., None]) -> None:
    """On the ranks that publish nothing, and with TRAINCTL=off, `log` is a method and not the closure of rank 0."""
    taken: list[dict[str, Any]] = []
    log(SimpleNamespace(_log=taken.append), self=1.0)
    assert taken in ([{"self": 1.0}], [])
