"""Every schedule that a script may have, made anew for an optimizer; none of it knows of overrides."""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR
from transformers import optimization as of_transformers

STEPS = 40
Make: TypeAlias = Callable[[Optimizer], Any]


def _lambda(share: Callable[[int], float]) -> Make:
    return lambda optimizer: schedules.LambdaLR(optimizer, share)


# By the class in torch.optim.lr_scheduler, so that one that torch adds cannot be forgotten.
OF_TORCH: dict[str, Make] = {
    "LambdaLR": _lambda(lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda _step: 0.97),
    "StepLR": lambda o: schedules.StepLR(o, 7),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [5, 20]),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.3, 10),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=20),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.95),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 30, 2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 30, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 9, eta_min=0.001),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=6),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.2, STEPS + 2),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=2),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=8), schedules.CosineAnnealingLR(o, 32, eta_min=0.01)], [8]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 10), schedules.ExponentialLR(o, 0.97)]
    ),
}


def classes_of_torch() -> set[str]:
    """Every scheduler that torch.optim.lr_scheduler has, base classes and aliases left out."""
    bases = {"LRScheduler", "_LRScheduler"}
    return {
        name
        for name, found in vars(schedules).items()
        if isinstance(found, type) and issubclass(found, schedules.LRScheduler) and name not in bases
    }


# By the function in transformers.optimization, so that one that the library adds cannot be forgotten either.
OF_TRANSFORMERS: dict[str, Make] = {
    "get_constant_schedule": of_transformers.get_constant_schedule,
    "get_constant_schedule_with_warmup": lambda o: of_transformers.get_constant_schedule_with_warmup(o, 6),
    "get_linear_schedule_with_warmup": lambda o: of_transformers.get_linear_schedule_with_warmup(o, 6, STEPS),
    "get_cosine_schedule_with_warmup": lambda o: of_transformers.get_cosine_schedule_with_warmup(o, 6, STEPS),
    "get_cosine_with_hard_restarts_schedule_with_warmup": lambda o: (
        of_transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, 6, STEPS, num_cycles=3)
    ),
    "get_cosine_with_min_lr_schedule_with_warmup": lambda o: (
        of_transformers.get_cosine_with_min_lr_schedule_with_warmup(o, 6, STEPS, min_lr_rate=0.1)
    ),
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate": lambda o: (
        of_transformers.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            o, 6, STEPS, min_lr=0.01, warmup_lr_rate=0.1
        )
    ),
    "get_polynomial_decay_schedule_with_warmup": lambda o: of_transformers.get_polynomial_decay_schedule_with_warmup(
        o, 6, STEPS, power=2.0
    ),
    "get_inverse_sqrt_schedule": lambda o: of_transformers.get_inverse_sqrt_schedule(o, 6),
    "get_wsd_schedule": lambda o: of_transformers.get_wsd_schedule(o, 6, 10, num_stable_steps=15, min_lr_ratio=0.1),
    "get_reduce_on_plateau_schedule": lambda o: of_transformers.get_reduce_on_plateau_schedule(o, patience=2),
    "get_greedy_schedule": lambda o: of_transformers.get_greedy_schedule(o, patience=2),
}


def schedules_of_transformers() -> set[str]:
    """Every schedule that transformers.optimization makes.

    Left out are the one function that picks among these by name, and Adafactor's, which only tells the rate it takes.
    """
    made = {name for name in vars(of_transformers) if re.fullmatch(r"get_\w*schedule\w*", name)}
    return made - {"get_scheduler", "get_adafactor_schedule"}


class RewritesGroups:
    """As DeepSpeed's schedulers do: no LRScheduler, writes every group's rate at each step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.last = 0

    def step(self) -> None:
        self.last += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / math.sqrt(1 + self.last)


OTHERS: dict[str, Make] = {
    "OneCycleLR without momentum": lambda o: schedules.OneCycleLR(o, 0.2, STEPS + 2, cycle_momentum=False),
    "CyclicLR triangular2": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=4, mode="triangular2"),
    "SWALR": lambda o: SWALR(o, 0.02, anneal_epochs=10),
    "warm-up, then restarts, then exponential": lambda o: schedules.SequentialLR(
        o,
        [
            schedules.LinearLR(o, 0.01, total_iters=5),
            schedules.CosineAnnealingWarmRestarts(o, 6, eta_min=0.001),
            schedules.ExponentialLR(o, 0.9),
        ],
        [5, 20],
    ),
    "chained, one of them of a lambda": lambda o: schedules.ChainedScheduler(
        [schedules.LambdaLR(o, lambda step: 1.0 / (1 + step // 5)), schedules.CosineAnnealingLR(o, 50)]
    ),
    "rewrites the groups, as DeepSpeed's": RewritesGroups,
}

ALL: Mapping[str, Make] = OF_TORCH | {f"transformers: {name}": make for name, make in OF_TRANSFORMERS.items()} | OTHERS


def advance(scheduler: Any, step: int) -> None:
    """One step of a scheduler; one that goes by a metric sees a loss that goes up and down."""
    if "metrics" in inspect.signature(scheduler.step).parameters:
        scheduler.step(1.0 + step % 5)
    else:
        scheduler.step()
