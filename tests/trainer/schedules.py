"""Every schedule that a script may have, made anew for an optimizer; none of it knows of overrides."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

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


# --- the schedules of Transformers, by their formulas: shares of the learning rate, after `warmup` steps up a line.
# There they are LambdaLRs, too; the library itself is large, and is not installed for this.


def with_warmup(share: Callable[[int], float], warmup: int = 6) -> Make:
    return _lambda(lambda step: step / warmup if step < warmup else share(step))


def progress(step: int, warmup: int = 6) -> float:
    return (step - warmup) / max(1, STEPS - warmup)


def _polynomial(step: int, *, end: float = 1e-7, initial: float = 0.1, power: float = 2.0) -> float:
    if step > STEPS:
        return end / initial
    return ((initial - end) * (1 - progress(step)) ** power + end) / initial


def _warmup_stable_decay(step: int, *, stable: int = 15, decay: int = 10, floor: float = 0.1) -> float:
    if step < 6 + stable:
        return 1.0
    if step < 6 + stable + decay:
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * (step - 6 - stable) / decay))
    return floor


OF_TRANSFORMERS: dict[str, Make] = {
    "constant": _lambda(lambda _step: 1.0),
    "constant with warm-up": with_warmup(lambda _step: 1.0),
    "linear": with_warmup(lambda step: max(0.0, 1.0 - progress(step))),
    "cosine": with_warmup(lambda step: max(0.0, 0.5 * (1.0 + math.cos(math.pi * 2.0 * 0.5 * progress(step))))),
    "cosine with hard restarts": with_warmup(
        lambda step: 0.0 if progress(step) >= 1 else 0.5 * (1.0 + math.cos(math.pi * ((3 * progress(step)) % 1.0)))
    ),
    "cosine with a floor": with_warmup(
        lambda step: max(0.0, 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress(step))))
    ),
    "polynomial": with_warmup(_polynomial),
    "inverse square root": with_warmup(lambda step: 1.0 / math.sqrt((step + 6) / 6)),
    "warm-up, stable, decay": with_warmup(_warmup_stable_decay),
}


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
    """One step of a scheduler; the plateau's sees a loss that goes up and down."""
    if isinstance(scheduler, schedules.ReduceLROnPlateau):
        scheduler.step(1.0 + step % 5)
    else:
        scheduler.step()
