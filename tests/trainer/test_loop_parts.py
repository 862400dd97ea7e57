"""The parts of the reference loop and the loop itself, without ranks and with trainctl switched off."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainctl.trainer.best_weights import BestWeights
from trainctl.trainer.early_stopping import EarlyStopping
from trainctl.trainer.ema import Ema
from trainctl.trainer.loop import Outcome, TrainConfig, Trainer, parameter_groups, train, warmup_cosine

CPU = torch.device("cpu")


class Regression(nn.Module):
    """Fits a line to points; `forward` gives the mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 1)

    def forward(self, points: Tensor, values: Tensor) -> Tensor:
        return (self.line(points) - values).float().pow(2).mean()


class Unteachable(Regression):
    """Its loss is 1 whatever it learns."""

    def forward(self, points: Tensor, values: Tensor) -> Tensor:
        return super().forward(points, values) * 0.0 + 1.0


def regression_batches(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    points = torch.randn(count, size, 8, generator=draw)
    values = points.sum(dim=2, keepdim=True)
    return list(zip(points, values, strict=True))


def train_off(
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module,
    batches: Sequence[Sequence[Tensor]],
    *,
    measure: Any = None,
    **config: Any,
) -> Outcome:
    """Train with trainctl switched off, without automatic mixed precision unless asked."""
    monkeypatch.setenv("TRAINCTL", "off")
    settings = {"amp": "off", "warmup_steps": 0, "learning_rate": 0.05, "weight_decay": 0.0} | config
    return train(
        "parts",
        model=model,
        loader=batches,
        validation=batches[:2],
        config=TrainConfig(**settings),
        device=CPU,
        measure=measure,
    )


def fresh(kind: type[nn.Module] = Regression) -> nn.Module:
    torch.manual_seed(2)
    return kind()


# --- the loop


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_it_trains_over_as_many_epochs_as_it_needs(monkeypatch: pytest.MonkeyPatch, amp: str) -> None:
    model, batches = fresh(), regression_batches(16)
    before = sum(model(*batch).item() for batch in batches)
    outcome = train_off(monkeypatch, model, batches, total_steps=100, amp=amp, ema_decay=0.9)
    assert outcome == Outcome(step=100, stopped_early=False)
    assert sum(model(*batch).item() for batch in batches) < before / 5


def test_two_small_micro_batches_are_one_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    small = regression_batches(12)
    large = [tuple(map(torch.cat, zip(*small[i : i + 2], strict=True))) for i in range(0, 12, 2)]
    one, other = fresh(), fresh()
    train_off(monkeypatch, one, large, total_steps=6, eval_every=None)
    train_off(monkeypatch, other, small, total_steps=6, eval_every=None, accumulate=2)
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_it_stops_early_when_the_validation_loss_no_longer_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = train_off(
        monkeypatch, fresh(Unteachable), regression_batches(8), total_steps=50, eval_every=2, patience=3
    )
    assert outcome == Outcome(step=8, stopped_early=True)  # the first evaluation is the best, three more bring nothing


def test_it_is_judged_by_a_metric_of_the_scripts_own_that_should_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.5, 0.5, 0.505, 0.52, 0.4])
    seen: list[bool] = []

    def measure(model: nn.Module) -> dict[str, float]:
        seen.append(model.training or torch.is_grad_enabled())
        return {"accuracy": next(scores)}

    outcome = train_off(
        monkeypatch,
        fresh(),
        regression_batches(8),
        measure=measure,
        total_steps=50,
        eval_every=1,
        patience=3,
        metric="accuracy",
        mode="max",
        min_delta=0.1,
        restore_best=True,
    )
    assert outcome == Outcome(step=5, stopped_early=True, restored_step=2)
    assert not any(seen), "as it is evaluated: without dropout and gradients"


def test_a_metric_that_no_evaluation_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"total_steps": 4, "eval_every": 1, "patience": 1, "metric": "accuracy"}
    with pytest.raises(ValueError, match="val_loss: give measure=, which returns 'accuracy'"):
        train_off(monkeypatch, fresh(), regression_batches(4), **asked)
    with pytest.raises(ValueError, match="measure= gave no 'accuracy': there are score, val_loss"):
        train_off(monkeypatch, fresh(), regression_batches(4), measure=lambda _: {"score": 1.0}, **asked)


def test_without_a_validation_batch_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least one validation batch"):
        train_off(monkeypatch, fresh(), [], total_steps=1)


def test_fsdp_without_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="start under torchrun"):
        train_off(monkeypatch, fresh(), regression_batches(2), total_steps=1, sharding="fsdp")


def test_biases_are_not_decayed() -> None:
    decayed, spared = parameter_groups(Regression(), weight_decay=0.3)
    assert [tuple(p.shape) for p in decayed["params"]] == [(1, 8)]
    assert [tuple(p.shape) for p in spared["params"]] == [(1,)]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"accumulate": 0}, "accumulate"),
        ({"eval_every": 0}, "eval_every"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"learning_rate": -1e-3}, "learning rate"),
        ({"learning_rate": math.nan}, "learning rate"),
        ({"lr_floor": 2.0}, "lr_floor"),
        ({"amp": "int8"}, "amp"),
        ({"sharding": "none"}, "sharding"),
        ({"patience": 3, "eval_every": None}, "early stopping"),
        ({"mode": "least"}, "mode is min or max"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainConfig(**({"total_steps": 10} | wrong))


# --- the schedule


@given(warmup=st.integers(0, 50), total=st.integers(1, 300), floor=st.floats(0.0, 1.0), steps=st.integers(0, 400))
def test_the_schedule_rises_then_falls_and_stays_between_its_bounds(
    warmup: int, total: int, floor: float, steps: int
) -> None:
    share = warmup_cosine(warmup_steps=warmup, total_steps=total, floor=floor)
    assert 0.0 <= share(steps) <= 1.0
    if steps + 1 < warmup:
        assert share(steps) < share(steps + 1)
    elif steps >= warmup:
        assert share(steps) >= share(steps + 1) - 1e-12
        assert share(steps) >= floor - 1e-12


def test_the_schedule_meets_its_corners() -> None:
    share = warmup_cosine(warmup_steps=10, total_steps=110, floor=0.1)
    assert [share(0), share(9), share(10), share(60), share(110), share(500)] == pytest.approx(
        [0.1, 1.0, 1.0, 0.55, 0.1, 0.1]
    )


# --- the moving average


def test_the_average_follows_its_formula_and_makes_room_for_the_parameters() -> None:
    model = fresh()
    ema = Ema(model, decay=0.75)
    first = model.line.weight.detach().clone()
    with torch.no_grad():
        model.line.weight.add_(4.0)
    trained = model.line.weight.detach().clone()
    ema.update()
    with ema.in_place_of_parameters():
        torch.testing.assert_close(model.line.weight.detach(), first + 1.0)
    assert torch.equal(model.line.weight, trained)


def test_an_average_restored_twice_from_one_state_is_the_same_both_times() -> None:
    model = fresh()
    ema = Ema(model, decay=0.5)
    state = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    for _ in range(2):
        with torch.no_grad():
            model.line.weight.add_(1.0)
        ema.update()
        ema.load_state_dict(state)
        assert all(torch.equal(ema.state_dict()[name], state[name]) for name in state)


def test_a_decay_outside_of_0_and_1_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Ema(fresh(), decay=1.0)


# --- early stopping


def test_patience_counts_evaluations_without_improvement() -> None:
    stopper = EarlyStopping(patience=2, min_delta=0.1)
    told = []
    for step, value in enumerate([3.0, 2.0, 1.95, 1.8, math.nan, 1.75], start=1):
        stopper.judge(value, step=step)
        told.append(stopper.exhausted)
    assert told == [False, False, False, False, False, True]
    assert stopper.best == 1.8


def test_looking_again_at_the_same_step_costs_no_patience() -> None:
    stopper = EarlyStopping(patience=1)
    for _ in range(5):
        stopper.judge(2.0, step=10)
    assert not stopper.exhausted


def test_its_state_survives_a_rollback() -> None:
    stopper, restored = EarlyStopping(patience=2), EarlyStopping(patience=2)
    stopper.judge(1.0, step=1)
    stopper.judge(1.5, step=2)
    restored.load_state_dict(stopper.state_dict())
    restored.judge(1.5, step=3)
    assert restored.exhausted
    assert not stopper.exhausted


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"patience": 1, "min_delta": -1.0}])
def test_impossible_patience_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="patience"):
        EarlyStopping(**wrong)


def test_a_metric_that_should_rise_is_judged_the_other_way_round() -> None:
    stopper = EarlyStopping(patience=2, mode="max")
    assert [stopper.judge(value, step=step) for step, value in enumerate([0.5, 0.6, 0.6, 0.4])] == [
        True,
        True,
        False,
        False,
    ]
    assert (stopper.best, stopper.exhausted) == (0.6, True)
    again = EarlyStopping(patience=2, mode="max")
    again.load_state_dict(stopper.state_dict())
    assert (again.best, again.judge(0.7, step=9)) == (0.6, True)
    with pytest.raises(ValueError, match="mode is min or max"):
        EarlyStopping(patience=1, mode="least")  # type: ignore[arg-type]


# --- the best weights


def test_the_best_weights_come_back_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = regression_batches(16)
    model, again = fresh(), fresh()
    # Steps that are far too large: the loss leaps about, and the newest weights are not the best.
    settings = {"eval_every": 1, "learning_rate": 3.0, "lr_floor": 1.0}
    outcome = train_off(monkeypatch, model, batches, total_steps=12, restore_best=True, **settings)
    assert outcome.restored_step is not None
    train_off(monkeypatch, again, batches, total_steps=12, **settings)

    def loss(of: nn.Module) -> float:
        return sum(of(*batch).item() for batch in batches[:2])

    assert outcome.restored_step < 12
    assert loss(model) < loss(again)


def test_judged_by_the_average_the_averaged_weights_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = regression_batches(16)
    judged: list[tuple[float, float]] = []
    evaluate = Trainer.evaluate

    def noted(trainer: Trainer, validation: Any) -> dict[str, float]:
        metrics = evaluate(trainer, validation)
        judged.append((metrics["val_loss_ema"], metrics["val_loss"]))
        return metrics

    monkeypatch.setattr(Trainer, "evaluate", noted)
    model = fresh()
    settings = {"eval_every": 1, "learning_rate": 3.0, "lr_floor": 1.0, "ema_decay": 0.7}
    outcome = train_off(
        monkeypatch, model, batches, total_steps=12, restore_best=True, metric="val_loss_ema", **settings
    )
    best, raw = min(judged)
    loss = sum(model(*batch).item() for batch in batches[:2]) / 2
    assert loss == pytest.approx(best)
    assert loss != pytest.approx(raw), "else this shows nothing"
    assert (outcome.restored_step, outcome.restored_average) == (judged.index((best, raw)) + 1, True)
    assert outcome.ema is not None
    with outcome.ema.in_place_of_parameters():
        last = sum(model(*batch).item() for batch in batches[:2]) / 2
    assert last == pytest.approx(judged[-1][0]), "and the average as it was in the end can be had"
    assert sum(model(*batch).item() for batch in batches[:2]) / 2 == loss


def test_judged_by_the_weights_themselves_these_come_back_beside_an_average(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = train_off(
        monkeypatch, fresh(), regression_batches(8), total_steps=4, eval_every=1, restore_best=True, ema_decay=0.7
    )
    assert outcome.restored_step is not None
    assert not outcome.restored_average


def test_best_weights_of_a_checkpoint_that_does_not_say_what_they_are_were_no_average() -> None:
    model = fresh()
    best = BestWeights(model)
    best.keep(step=5, averaged=True)
    again = BestWeights(model)
    again.load_state_dict(best.state_dict())
    assert (again.step, again.averaged) == (5, True)
    again.load_state_dict({name: value for name, value in best.state_dict().items() if name != "averaged"})
    assert (again.step, again.averaged) == (5, False)


def test_the_best_weights_are_state_that_a_rollback_restores() -> None:
    model = fresh()
    best = BestWeights(model)
    best.keep(step=5)
    kept = best.state_dict()
    saved = {"step": kept["step"], "weights": {name: value.clone() for name, value in kept["weights"].items()}}
    with torch.no_grad():
        model.line.weight.add_(1.0)
    best.keep(step=9)
    best.load_state_dict(saved)
    assert best.put_back() == 5
    assert torch.equal(model.line.weight, saved["weights"]["line.weight"])
