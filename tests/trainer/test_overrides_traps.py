"""Ways of stepping an optimizer that would lose an override, apply it twice or leave it behind (facts, second table).

Each row halves the learning rate and measures how far a parameter moves against a twin that was left alone: 0.5, and
afterwards the schedule's own rate is in the group. What is out of reach is refused by name instead.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
import torch
import torch.distributed as dist
from torch import optim
from torch.optim import SGD, AdamW, Optimizer

from trainctl.trainer.overrides import Overrides
from trainctl.wire.commands import LrScale

LR = 0.25
Step: TypeAlias = Callable[[], object]
Made: TypeAlias = tuple[Optimizer, Step]
Trap: TypeAlias = Callable[[torch.nn.Parameter], Made]


class CallsSuper(SGD):
    """Fires the hooks twice: torch wraps `step` of every subclass."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Sam(Optimizer):
    """Sharpness-aware minimisation as its users write it: shares its groups with the optimizer that it wraps."""

    def __init__(self, parameters: Any, base: type[Optimizer], **options: Any) -> None:
        super().__init__(parameters, options)
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.clone()
                parameter.add_(0.05 * parameter.grad)

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["old"])
        self.base.step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first_step()
        if closure is not None:
            closure()
        self.second_step()


class Wrapper(Optimizer):
    """A foreign wrapper without `super().__init__()`."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def plain(parameter: torch.nn.Parameter) -> Made:
    optimizer = SGD([parameter], lr=LR)
    return optimizer, optimizer.step


def twice(parameter: torch.nn.Parameter) -> Made:
    optimizer = CallsSuper([parameter], lr=LR)
    return optimizer, optimizer.step


def raises_first(parameter: torch.nn.Parameter) -> Made:
    optimizer = SGD([parameter], lr=LR)

    def refuse() -> float:
        raise RuntimeError("out of memory")

    def step() -> None:
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(refuse)
        optimizer.step()

    return optimizer, step


def sam_steps_at_once(parameter: torch.nn.Parameter) -> Made:
    sam = Sam([parameter], SGD, lr=LR)
    return sam, sam.step


def sam_by_its_base(parameter: torch.nn.Parameter) -> Made:
    sam = Sam([parameter], SGD, lr=LR)

    def step() -> None:
        sam.first_step()
        sam.second_step()

    return sam.base, step


def by_the_wrapped(parameter: torch.nn.Parameter) -> Made:
    wrapper = Wrapper(SGD([parameter], lr=LR))
    return wrapper.inner, wrapper.step


def in_backward(parameter: torch.nn.Parameter) -> Made:
    optimizer = SGD([parameter], lr=LR)

    def arrived(accumulated: torch.Tensor) -> None:
        optimizer.step()
        accumulated.grad = None

    parameter.register_post_accumulate_grad_hook(arrived)
    return optimizer, lambda: parameter.sum().backward()  # type: ignore[no-untyped-call]


def lbfgs(parameter: torch.nn.Parameter) -> Made:
    optimizer = optim.LBFGS([parameter], lr=LR, max_iter=1)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = parameter.sum()
        found.backward()
        return found

    return optimizer, lambda: optimizer.step(loss)


def scaled_by_grad_scaler(parameter: torch.nn.Parameter) -> Made:
    """A step that overflowed is skipped first."""
    optimizer, scaler = SGD([parameter], lr=LR), torch.amp.GradScaler("cpu", init_scale=4.0)

    def step() -> None:
        for gradient in (float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale((parameter * gradient).sum()).backward()
            scaler.step(optimizer)
            scaler.update()

    return optimizer, step


def zero_redundancy(parameter: torch.nn.Parameter) -> Made:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns where it is imported

    optimizer = ZeroRedundancyOptimizer([parameter], optimizer_class=SGD, lr=LR)
    return optimizer, optimizer.step


def compiled(parameter: torch.nn.Parameter) -> Made:
    optimizer = SGD([parameter], lr=torch.tensor(LR))
    return optimizer, torch.compile(optimizer.step, backend="eager")


def tensor_shared_by_groups(parameter: torch.nn.Parameter) -> Made:
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([{"params": [other]}, {"params": [parameter]}], lr=torch.tensor(LR))
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    return optimizer, optimizer.step


def foreach(parameter: torch.nn.Parameter) -> Made:
    optimizer = SGD([parameter], lr=LR, foreach=True)
    return optimizer, optimizer.step


def fused(parameter: torch.nn.Parameter) -> Made:
    optimizer = SGD([parameter], lr=LR, fused=True)
    return optimizer, optimizer.step


HOLDS: dict[str, Trap] = {
    "a plain step": plain,
    "a subclass whose step calls super().step()": twice,
    "a step that raises": raises_first,
    "SAM through its step(closure)": sam_steps_at_once,
    "SAM's two steps, its base optimizer attached": sam_by_its_base,
    "a wrapper, the wrapped optimizer attached": by_the_wrapped,
    "an optimizer stepped in backward": in_backward,
    "LBFGS": lbfgs,
    "GradScaler's skipped step": scaled_by_grad_scaler,
    "ZeroRedundancyOptimizer": zero_redundancy,
    "a compiled step": compiled,
    "one tensor as the rate of two groups": tensor_shared_by_groups,
    "foreach": foreach,
    "fused": fused,
}


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def moved(trap: Trap, factor: float | None) -> tuple[float, float]:
    """How far the parameter moved with the rate scaled, and the rate in its group afterwards."""
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer, step = trap(parameter)
    if factor is not None:
        Overrides([optimizer]).scale_lr(factor)
    step()
    return float(1.0 - parameter.detach()[0]), float(optimizer.param_groups[0]["lr"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own imports
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("row", HOLDS)
def test_half_the_rate_moves_half_as_far_and_leaves_the_schedule(row: str) -> None:
    alone, steered = moved(HOLDS[row], None), moved(HOLDS[row], 0.5)
    assert alone[0] != 0.0
    assert steered[0] / alone[0] == pytest.approx(0.5)
    assert steered[1] == alone[1] == LR


def sam_in_two_steps(parameter: torch.nn.Parameter) -> Made:
    sam = Sam([parameter], SGD, lr=LR)

    def step() -> None:
        sam.first_step()
        sam.second_step()

    return sam, step


def wrapped(parameter: torch.nn.Parameter) -> Made:
    wrapper = Wrapper(SGD([parameter], lr=LR))
    return wrapper, wrapper.step


def written_by_hand(parameter: torch.nn.Parameter) -> Made:
    def step() -> None:
        with torch.no_grad():
            parameter.sub_(LR * torch.ones(3))

    return AdamW([parameter], lr=LR), step


@pytest.mark.parametrize(
    ("trap", "says"),
    [(sam_in_two_steps, "Sam changes"), (wrapped, "Wrapper runs no step hooks"), (written_by_hand, "AdamW changes")],
)
def test_what_passes_no_hook_is_refused_by_name(trap: Trap, says: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer, step = trap(parameter)
    overrides = Overrides([optimizer])
    for boundary in range(1, 4):
        step()
        for _ in range(2):  # however often it is asked for
            assert says in str(overrides.check(LrScale(factor=0.5), boundary=boundary))


def test_two_commands_within_one_step_see_the_same_and_weights_clamped_by_the_script_are_no_step() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([parameter], lr=LR)
    overrides = Overrides([optimizer])
    for boundary in range(1, 6):
        parameter.grad = torch.ones(3)
        within: list[str | None] = []
        handle = optimizer.register_step_pre_hook(
            lambda *_, at=boundary, found=within: found.append(  # type: ignore[misc]
                overrides.check(LrScale(factor=0.5), boundary=at - 1)
            )
        )
        optimizer.step()
        handle.remove()
        with torch.no_grad():
            parameter.clamp_(-0.5, 0.5)
        assert within == [None]
        assert overrides.check(LrScale(factor=0.5), boundary=boundary) is None
        assert overrides.check(LrScale(factor=0.5), boundary=boundary) is None


def test_an_evaluation_that_swaps_weights_is_no_step() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    overrides = Overrides([SGD([parameter], lr=LR)])
    with overrides.expected_writes(), torch.no_grad():
        parameter.add_(1.0)
    assert overrides.check(LrScale(factor=0.5), boundary=3) is None
    with torch.no_grad():
        parameter.add_(1.0)
    assert "SGD changes parameters" in str(overrides.check(LrScale(factor=0.5), boundary=3))


# --- compiled steps


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("rate", "compilations"), [(torch.tensor(0.1), 1), (0.1, 2)], ids=["tensor", "number"])
def test_a_changed_rate_does_not_compile_a_step_anew_each_time(rate: Any, compilations: int) -> None:
    """A number is compiled in, and again once as a variable when it first changes; a tensor never."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    parameter, counter = torch.nn.Parameter(torch.ones(3)), CompileCounter()
    optimizer = AdamW([parameter], lr=rate)
    overrides = Overrides([optimizer])
    step = torch.compile(optimizer.step, backend=counter)
    for number in range(20):
        if number >= 5:
            overrides.scale_lr(1.0 / number)
        parameter.grad = torch.ones(3)
        step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert counter.frame_count == compilations
    assert overrides.observed_steps == 20


# --- every optimizer of torch


def optimizers_of_torch() -> dict[str, dict[str, Any]]:
    """By name, the options with which each is tried. SparseAdam wants sparse gradients, LBFGS has a row above."""
    with_matrices_only = {"Muon"}
    return {
        name: ({"matrix": True} if name in with_matrices_only else {})
        for name, found in vars(optim).items()
        if isinstance(found, type)
        and issubclass(found, Optimizer)
        and found not in {Optimizer, optim.SparseAdam, optim.LBFGS}
    }


@pytest.mark.parametrize("name", sorted(optimizers_of_torch()))
def test_every_optimizer_trains_to_the_bit_as_one_made_with_that_rate(name: str) -> None:
    """Two steps at the first rate, four at a quarter of it, exact in binary."""
    shape = (4, 4) if optimizers_of_torch()[name].get("matrix") else (6,)
    ours, theirs = (
        torch.nn.Parameter(torch.linspace(-1, 1, 16)[: shape[0] * (*shape, 1)[1]].reshape(shape)) for _ in "12"
    )
    steered: Any = getattr(optim, name)([ours], lr=0.5)
    by_hand: Any = getattr(optim, name)([theirs], lr=0.5)
    overrides = Overrides([steered])
    for number in range(6):
        ours.grad, theirs.grad = torch.sin(ours.detach() + number), torch.sin(theirs.detach() + number)
        if number == 2:
            overrides.scale_lr(0.25)
            by_hand.param_groups[0]["lr"] *= 0.25
        steered.step()
        by_hand.step()
        assert torch.equal(ours, theirs)
    assert steered.param_groups[0]["lr"] == 0.5
