"""The operator's learning rate holds at every step, and the schedule never notices it."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import OneRank
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

from trainctl.trainer.figures import lr_state
from trainctl.trainer.override_hooks import UNOBSERVED_BOUNDARIES, Watch
from trainctl.trainer.override_rules import FIELDS, RELEASE
from trainctl.trainer.overrides import Overrides
from trainctl.wire.commands import LARGEST, LrRelease, LrScale, LrSet, SetTunable
from trainctl.wire.messages import LrState

STEPS, AT = 40, 13


class Probe(AdamW):
    """Calls super().step(), which fires the hooks twice, and notes what a step really used."""

    used: dict[str, list[Any]]
    raise_at: int | None = None
    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        group = self.param_groups[0]
        if not hasattr(self, "used"):
            self.used = {"lr": [], "betas": [], "weight_decay": []}
        for name in self.used:
            self.used[name].append(_number(group[name]))
        if self.steps == self.raise_at:
            raise RuntimeError("no step today")
        return super().step(closure)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def make(lr: float | torch.Tensor = 0.1) -> tuple[torch.nn.Parameter, Probe]:
    parameter = torch.nn.Parameter(torch.ones(3))
    if isinstance(lr, torch.Tensor):
        lr = lr.clone()
    return parameter, Probe([parameter], lr=lr)


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda _step: 0.97),
    "step": lambda o: schedules.StepLR(o, 7),
    "multistep": lambda o: schedules.MultiStepLR(o, [5, 20]),
    "constant": lambda o: schedules.ConstantLR(o, 0.3, 10),
    "linear": lambda o: schedules.LinearLR(o, 0.1, total_iters=20),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.95),
    "polynomial": lambda o: schedules.PolynomialLR(o, 30, 2.0),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 30, eta_min=0.01),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 9, eta_min=0.001),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=6, cycle_momentum=False),
    "onecycle": lambda o: schedules.OneCycleLR(o, 0.2, STEPS + 2),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=2),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=8), schedules.CosineAnnealingLR(o, 32, eta_min=0.01)], [8]
    ),
    "chained": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 10), schedules.ExponentialLR(o, 0.97)]
    ),
    "swa": lambda o: SWALR(o, 0.02, anneal_epochs=10),
}


def advance(parameter: torch.nn.Parameter, optimizer: Optimizer, scheduler: Any, step: int) -> Any:
    """One step of a usual loop; the LR that the schedule has afterwards."""
    parameter.grad = torch.full_like(parameter, 0.1)
    try:
        optimizer.step()
    except RuntimeError:
        parameter.grad = None
    if isinstance(scheduler, schedules.ReduceLROnPlateau):
        scheduler.step(1.0 + step % 5)
    else:
        scheduler.step()
    return _number(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_scheduler_keeps_its_schedule_while_every_step_uses_the_scaled_rate(name: str, tensor_lr: bool) -> None:
    first = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    (ours, steered), (theirs, twin) = make(first), make(first)
    for optimizer in (steered, twin):
        optimizer.raise_at = 20
    lr_object = steered.param_groups[0]["lr"]
    overrides = Overrides([steered]) if name != "cosine" else None
    ours_schedule, twins_schedule = SCHEDULES[name](steered), SCHEDULES[name](twin)
    overrides = overrides or Overrides([steered])  # before and after the scheduler was made

    for step in range(STEPS):
        if step == AT:
            overrides.scale_lr(0.5)
        if step == 30:
            overrides.release_lr()
        assert advance(ours, steered, ours_schedule, step) == advance(theirs, twin, twins_schedule, step)
        assert steered.param_groups[0]["betas"] == twin.param_groups[0]["betas"]

    scales = [0.5 if AT <= step < 30 else 1.0 for step in range(STEPS)]
    assert steered.used["lr"] == [lr * scale for lr, scale in zip(twin.used["lr"], scales, strict=True)]
    assert steered.used["betas"] == twin.used["betas"]
    if tensor_lr:
        assert steered.param_groups[0]["lr"] is lr_object


def test_a_pinned_rate_ignores_the_schedule_until_it_is_released() -> None:
    parameter, optimizer = make()
    scheduler = schedules.ExponentialLR(optimizer, 0.9)
    overrides = Overrides([optimizer])
    overrides.set_lr(0.25)
    for step in range(3):
        advance(parameter, optimizer, scheduler, step)
    assert optimizer.used["lr"] == [0.25] * 3
    assert overrides.effective_lr() == 0.25
    assert overrides.scheduled_lr() == optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**3)
    overrides.release_lr()
    assert overrides.effective_lr() == overrides.scheduled_lr()


def test_the_rule_behind_the_first_groups_rate_is_told() -> None:
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    overrides = Overrides([torch.optim.SGD([{"params": [one]} for one in parameters], lr=0.1)])
    free = LrState(scheduled=0.1, effective=0.1, rule="free")
    assert lr_state(overrides, {}) == free
    overrides.scale_lr(0.5)
    overrides.set_lr(0.03, group=1)
    assert lr_state(overrides, {}) == LrState(scheduled=0.1, effective=0.05, rule="scale", value=0.5)
    overrides.set_lr(0.02, group=0)
    assert lr_state(overrides, {}) == LrState(scheduled=0.1, effective=0.02, rule="pin", value=0.02)
    overrides.release_lr(group=0)
    assert lr_state(overrides, {}) == free, "its own rule wins"
    assert lr_state(None, {"lr": 0.3}) == LrState(scheduled=0.3, effective=0.3), "nothing is known of a rule"


def test_a_second_scale_replaces_the_first_because_both_are_relative_to_the_schedule() -> None:
    overrides = Overrides([make()[1]])
    overrides.scale_lr(0.5)
    overrides.scale_lr(0.5)
    assert overrides.effective_lr() == 0.05
    assert overrides.describe() == {"lr": "× 0.5"}


def test_a_script_that_writes_the_rate_itself_each_step_is_scaled_too() -> None:
    parameter, optimizer = make()
    overrides = Overrides([optimizer])
    overrides.scale_lr(0.5)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        parameter.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.used["lr"] == [0.1 / (step + 1) * 0.5 for step in range(5)]


def test_a_rate_that_the_optimizer_writes_within_its_step_is_the_new_schedule() -> None:
    class Decaying(SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.param_groups[0]["lr"] = 0.0625

    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Decaying([parameter], lr=0.1)
    overrides = Overrides([optimizer])
    overrides.scale_lr(0.5)
    optimizer.step()
    assert (overrides.scheduled_lr(), overrides.effective_lr()) == (0.0625, 0.03125)


def test_a_step_that_raises_leaves_the_scheduled_rate_behind_at_once() -> None:
    _parameter, optimizer = make()
    optimizer.raise_at = 1
    overrides = Overrides([optimizer])
    overrides.scale_lr(0.5)
    with pytest.raises(RuntimeError, match="no step today"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.step()
    assert optimizer.used["lr"] == [0.05, 0.05]


def test_a_raising_step_that_by_passed_the_wrapper_is_healed_at_the_boundary() -> None:
    _parameter, optimizer = make()
    optimizer.raise_at = 1
    step_taken_before_attach = optimizer.step
    overrides = Overrides([optimizer])
    overrides.scale_lr(0.5)
    with pytest.raises(RuntimeError):
        step_taken_before_attach()
    assert overrides.scheduled_lr() == 0.1
    overrides.heal()
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_step_that_grad_scaler_skips_changes_nothing() -> None:
    parameter, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    overrides = Overrides([optimizer])
    overrides.scale_lr(0.5)
    for gradient in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((parameter * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.used["lr"] == [0.05]
    assert overrides.observed_steps == 1
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_groups_count_over_all_optimizers_and_one_rule_may_stand_apart() -> None:
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    first = SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:2], "lr": 2.0}], lr=1.0)
    second = SGD(parameters[2:], lr=3.0)
    overrides = Overrides([first, second])
    overrides.scale_lr(0.5, group=2)
    assert [overrides.effective_lr(group) for group in range(3)] == [1.0, 2.0, 1.5]
    overrides.scale_lr(0.25)
    overrides.release_lr(group=0)
    assert [overrides.effective_lr(group) for group in range(3)] == [1.0, 0.5, 0.75]
    first.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 4.0})
    assert [overrides.effective_lr(group) for group in range(4)] == [1.0, 0.5, 1.0, 0.75]
    assert overrides.check(LrScale(factor=0.5, group=4)) == "there is no group 4: the optimizers have 4, counted from 0"
    with pytest.raises(ValueError, match="no group 4"):
        overrides.set_lr(0.1, group=4)


def test_weight_decay_and_one_beta_are_pinned_while_one_cycle_moves_the_other() -> None:
    (ours, steered), (theirs, twin) = make(), make()
    overrides = Overrides([steered])
    schedule, twins = (schedules.OneCycleLR(o, 0.2, STEPS + 2) for o in (steered, twin))
    overrides.set_field("weight_decay", 0.3)
    overrides.set_field("beta2", 0.9)
    for step in range(5):
        advance(ours, steered, schedule, step)
        advance(theirs, twin, twins, step)
    assert steered.used["weight_decay"] == [0.3] * 5
    assert steered.used["betas"] == [(beta1, 0.9) for beta1, _beta2 in twin.used["betas"]]
    assert overrides.fields() == {"weight_decay": 0.3, "beta1": twin.param_groups[0]["betas"][0], "beta2": 0.9}
    overrides.apply(SetTunable(name="beta2", value=RELEASE))
    overrides.release_field("weight_decay")
    assert not overrides.active
    assert steered.param_groups[0]["weight_decay"] == twin.param_groups[0]["weight_decay"]


def test_momentum_of_sgd_is_a_field_and_adamw_says_that_it_has_none() -> None:
    sgd = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    overrides = Overrides([sgd])
    overrides.apply(SetTunable(name="momentum", value=0.5))
    assert overrides.fields() == {"weight_decay": 0.0, "momentum": 0.5}
    assert Overrides([make()[1]]).check(SetTunable(name="momentum", value=0.5)) == "Probe has no momentum"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_decay", -0.1),
        ("weight_decay", 1e300),
        ("beta1", 1.0),
        ("momentum", float("nan")),
        ("beta2", True),
        ("warp", 1.0),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_in_words(name: str, value: float) -> None:
    overrides = Overrides([make()[1]])
    with pytest.raises(ValueError):
        overrides.set_field(name, value)
    assert overrides.check(SetTunable(name=name, value=value))
    assert not overrides.active


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_a_rate_is_a_finite_number_and_not_negative(factor: float) -> None:
    overrides = Overrides([make()[1]])
    with pytest.raises(ValueError, match="factor is"):
        overrides.scale_lr(factor)
    if factor != 0.0:
        with pytest.raises(ValueError, match="learning rate is"):
            overrides.set_lr(factor)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_largest_that_can_be_set_raises_in_no_optimizer(kind: type[torch.optim.Optimizer]) -> None:
    """One that raises would end the training, and each restart of it, for what was set is set again."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = kind([parameter], lr=1e-3, weight_decay=0.1)
    overrides = Overrides([optimizer])
    overrides.set_lr(LARGEST)
    overrides.set_field("weight_decay", LARGEST)
    for _ in range(2):
        parameter.grad = torch.ones(2)
        optimizer.step()
    overrides.scale_lr(LARGEST)
    parameter.grad = torch.ones(2)
    optimizer.step()


def test_rules_survive_saving_and_loading() -> None:
    parameter, optimizer = make()
    overrides = Overrides([optimizer])
    overrides.scale_lr(0.5)
    overrides.set_lr(0.3, group=0)
    overrides.set_field("beta1", 0.5)
    overrides.set_field("weight_decay", 0.6, group=0)
    kept = copy.deepcopy(overrides.state_dict())
    other = Overrides([make()[1]])
    other.load_state_dict(kept)
    assert other.state_dict() == kept
    assert other.effective_lr() == 0.3
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert overrides.state_dict() == kept


def test_commands_map_to_rules() -> None:
    overrides = Overrides([make()[1]])
    for action, effective in ((LrScale(factor=0.5), 0.05), (LrSet(value=0.0), 0.0), (LrRelease(), 0.1)):
        assert overrides.check(action) is None
        overrides.apply(action)
        assert overrides.effective_lr() == effective
    with pytest.raises(ValueError, match="changes nothing"):
        overrides.apply(SetTunable(name="clip", value=1.0))


def test_an_optimizer_that_never_passes_its_hooks_is_named() -> None:
    class Sam(SGD):
        def second_step(self) -> None:
            with torch.no_grad():
                self.param_groups[0]["params"][0].sub_(0.1)

    sam = Sam([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    overrides = Overrides([sam])
    assert overrides.check(LrScale(factor=0.5), boundary=0) is None
    sam.second_step()
    for boundary in (1, 2, 2):
        refused = overrides.check(LrScale(factor=0.5), boundary=boundary)
        assert "Sam changes parameters without passing its step hooks" in str(refused)
    sam.step()
    assert overrides.check(LrScale(factor=0.5), boundary=3) is None


def test_a_rollback_scales_no_rate_that_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = OneRank(tmp_path)
    rank.train(2)
    checkpoint = rank.save()
    monkeypatch.setattr(Watch, "unobserved", lambda *_: True)
    with pytest.raises(AssertionError, match="AdamW changes parameters without passing its step hooks"):
        rank.roll_back(checkpoint, lr_scale=0.5)
    assert rank.core.incarnation == 1
    assert rank.roll_back(checkpoint).ok


@pytest.mark.parametrize("groups", [1, 2, 30], ids=["one group", "two groups", "a group each"])
@pytest.mark.parametrize("moved", [[0], [*range(15)], [*range(15, 29)], [29]])
def test_it_is_named_also_where_some_of_its_parameters_never_get_a_gradient(groups: int, moved: list[int]) -> None:
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(30)]
    parameters[1].requires_grad_(False)
    each = 30 // groups
    optimizer = SGD([{"params": parameters[first : first + each]} for first in range(0, 30, each)], lr=0.1)
    overrides = Overrides([optimizer])
    with torch.no_grad():
        for number in moved:
            parameters[number].sub_(0.1)
    refused = overrides.check(LrScale(factor=0.5), boundary=2)
    assert "SGD changes parameters without passing its step hooks" in str(refused)


def test_boundaries_without_one_step_are_suspect_only_where_a_graph_may_make_them_and_when_there_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = Overrides([make()[1]])
    assert overrides.unobserved(10 * UNOBSERVED_BOUNDARIES) is None, "on the CPU no graph replays a step"
    monkeypatch.setattr(Watch, "may_be_captured", lambda _: True)
    overrides = Overrides([make()[1]])
    assert overrides.unobserved(UNOBSERVED_BOUNDARIES - 1) is None
    assert "Probe" in str(overrides.unobserved(UNOBSERVED_BOUNDARIES))


def test_of_several_optimizers_one_may_be_idle_and_only_the_addressed_one_is_judged() -> None:
    weight, other = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    steps, idles = torch.optim.AdamW([weight]), torch.optim.AdamW([other])
    overrides = Overrides([steps, idles])
    for boundary in range(2 * UNOBSERVED_BOUNDARIES):
        assert overrides.check(LrScale(factor=0.5), boundary=boundary) is None
        weight.grad = torch.ones(1)
        steps.step()
    with torch.no_grad():
        other.sub_(0.1)
    after = 2 * UNOBSERVED_BOUNDARIES
    assert overrides.check(LrScale(factor=0.5, group=0), boundary=after) is None
    for group in (1, None):
        refused = overrides.check(LrScale(factor=0.5, group=group), boundary=after)
        assert "AdamW changes parameters without passing its step hooks" in str(refused)


def test_a_wrapper_that_has_no_hooks_is_refused_by_name_and_left_alone() -> None:
    class Wrapper(Optimizer):
        def __init__(self, inner: Optimizer) -> None:
            self.inner = inner
            self.param_groups = inner.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    overrides = Overrides([Wrapper(make()[1])])
    assert overrides.check(LrScale(factor=0.5)) == (
        "Wrapper runs no step hooks: pass the optimizer that it wraps to Run.attach"
    )


def test_without_an_optimizer_every_change_is_refused() -> None:
    assert "no optimizer" in str(Overrides([]).check(LrSet(value=0.1)))


def test_a_compiled_step_uses_the_scaled_rate() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([parameter], lr=torch.tensor(0.1))
    overrides = Overrides([optimizer])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's own imports
        compiled = torch.compile(optimizer.step, backend="eager")
        for scale in (1.0, 0.5):
            overrides.scale_lr(scale)
            before = parameter.detach().clone()
            parameter.grad = torch.ones(3)
            compiled()
            torch.testing.assert_close(before - parameter.detach(), torch.full((3,), 0.1 * scale))
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1)


def test_detached_optimizers_are_as_they_were() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([parameter], lr=0.1)
    overrides = Overrides([optimizer])
    overrides.set_lr(5.0)
    overrides.detach()
    parameter.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.9))
    assert set(FIELDS) == {"weight_decay", "momentum", "beta1", "beta2"}


def test_a_rate_on_a_device_is_logged_before_and_after_it_is_scaled_and_never_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainctl.trainer.overrides.on_a_device", lambda value: isinstance(value, torch.Tensor))
    optimizer = SGD([torch.nn.Parameter(torch.ones(3))], lr=torch.tensor(0.5))
    overrides = Overrides([optimizer])
    logged: list[tuple[str, float]] = []
    overrides.log_on_device = lambda metric, rate: logged.append((metric, rate.item()))
    overrides.scale_lr(0.25)
    optimizer.step()
    assert logged == [("lr_scheduled", 0.5), ("lr", 0.125)]
    assert (overrides.used_lr, overrides.on_device) == (None, True)
