"""The reference training loop: what a careful script looks like with trainctl in it, and nothing private used.

    with process_group() as device:
        train("my-run", model=model, loader=loader, validation=batches, config=TrainConfig(total_steps=2000))

It trains any module whose `forward(*batch)` returns the loss: DDP or FSDP2, automatic mixed precision, gradient
accumulation, clipping, AdamW with warm-up and cosine decay, evaluation and checkpoints on an interval, a moving
average of the weights, early stopping, and resume.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from trainctl.trainer import Run
from trainctl.trainer.best_weights import BestWeights
from trainctl.trainer.early_stopping import EarlyStopping, Mode
from trainctl.trainer.ema import Ema
from trainctl.trainer.parallel import Sharding, bare, distribute, gradient_sync, mean_over_ranks, warm_reducer, world

Amp: TypeAlias = Literal["off", "bf16", "fp16"]
Batch: TypeAlias = Sequence[Tensor]
_AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_OF_AVERAGE = "val_loss_ema"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Raises `ValueError` for what cannot be meant.

    A step is one optimizer step of `accumulate` micro-batches on every rank. `eval_every` and `checkpoint_every` are
    steps, `patience` is evaluations; None switches a thing off. An evaluation is judged by `metric`, which should fall
    or rise (`mode`); `min_delta` is what it has to improve by to count. `restore_best` leaves the model with the
    weights of the best evaluation, whichever way the training ended: those that were judged, so the averaged ones where
    `metric` is `val_loss_ema`.
    """

    total_steps: int
    accumulate: int = 1
    amp: Amp = "bf16"
    sharding: Sharding = "ddp"
    learning_rate: float = 1e-3
    lr_floor: float = 0.1  # the schedule ends at this share of the learning rate
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    eval_every: int | None = 50
    checkpoint_every: int | None = 100
    patience: int | None = None
    metric: str = "val_loss"
    mode: Mode = "min"
    min_delta: float = 0.0
    restore_best: bool = False
    ema_decay: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts: dict[str, int | None] = {"total_steps": self.total_steps, "accumulate": self.accumulate}
        counts |= {"eval_every": self.eval_every, "checkpoint_every": self.checkpoint_every, "patience": self.patience}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, not {value}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is at least 0, not {self.warmup_steps}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0.0):
            raise ValueError(f"the learning rate is a positive number, not {self.learning_rate}")
        if not 0.0 <= self.lr_floor <= 1.0:
            raise ValueError(f"lr_floor is a share between 0 and 1, not {self.lr_floor}")
        if self.amp not in {"off", *_AMP_TYPES} or self.sharding not in {"ddp", "fsdp"}:
            raise ValueError(f"amp is off, bf16 or fp16 and sharding ddp or fsdp, not {self.amp} and {self.sharding}")
        if self.patience is not None and self.eval_every is None:
            raise ValueError("early stopping judges evaluations: give eval_every, or no patience")
        if self.restore_best and self.eval_every is None:
            raise ValueError("the best weights are those of an evaluation: give eval_every, or no restore_best")
        if not (math.isfinite(self.min_delta) and self.min_delta >= 0.0):
            raise ValueError(f"min_delta is at least 0, not {self.min_delta}")
        if self.mode not in {"min", "max"}:
            raise ValueError(f"mode is min or max, not {self.mode!r}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a training ended: after `step` steps, early when the metric had stopped improving.

    `restored_step`: the step of the evaluation whose weights the model has now, None where it has the newest.
    `restored_average`: those are the averaged ones. `ema`: the average after the last step, where there was one; `with
    outcome.ema.in_place_of_parameters():` the model has it.
    """

    step: int
    stopped_early: bool
    restored_step: int | None = None
    restored_average: bool = False
    ema: Ema | None = field(default=None, compare=False, repr=False)


def warmup_cosine(*, warmup_steps: int, total_steps: int, floor: float) -> Callable[[int], float]:
    """The share of the learning rate at a step: a line up from 1/warmup, then half a cosine down to `floor`."""

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return share


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed; biases and the scales of norms are not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


class Trainer:
    """The parts of one training, and the three things done with them: accumulate gradients, update, evaluate."""

    def __init__(
        self, *, model: nn.Module, blocks: Iterable[nn.Module], config: TrainConfig, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self.model = distribute(model.to(device), config.sharding, blocks=blocks)
        groups = parameter_groups(self.model, weight_decay=config.weight_decay)
        self.optimizer = AdamW(groups, lr=config.learning_rate, betas=config.betas)
        schedule = warmup_cosine(
            warmup_steps=config.warmup_steps, total_steps=config.total_steps, floor=config.lr_floor
        )
        self.scheduler = LambdaLR(self.optimizer, schedule)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.ema = None if config.ema_decay is None else Ema(bare(self.model), decay=config.ema_decay)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=_AMP_TYPES.get(self.config.amp), enabled=self.config.amp != "off")

    def forward_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with self.autocast():
            loss: Tensor = model(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
        return loss

    def update(self, *, clip: float) -> Tensor:
        """One optimizer step from the gradients at hand; returns their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # a smaller scale says that the step was skipped: fp16 overflowed
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def evaluate(self, batches: Callable[[], Iterable[Batch]]) -> dict[str, float]:
        """The mean loss over every rank's validation batches, also with the averaged weights where there are any.

        `batches()` begins them anew.
        """
        metrics = {"val_loss": self._mean_loss(batches())}
        if self.ema is not None:
            with self.ema.in_place_of_parameters():
                metrics[_OF_AVERAGE] = self._mean_loss(batches())
        return metrics

    @torch.no_grad()
    def measured(self, measure: Callable[[nn.Module], Mapping[str, float]]) -> dict[str, float]:
        """What `measure` says of the model as it is evaluated."""
        model = bare(self.model)
        model.eval()
        try:
            return dict(measure(model))
        finally:
            model.train()

    def _mean_loss(self, batches: Iterable[Batch]) -> float:
        model = bare(self.model)
        model.eval()
        try:
            losses = [self.forward_loss(model, batch) for batch in batches]
        finally:
            model.train()
        return float(mean_over_ranks(torch.stack(losses).double().mean()))


def train(
    name: str,
    *,
    model: nn.Module,
    loader: Iterable[Batch],
    validation: Sequence[Batch],
    config: TrainConfig,
    device: torch.device,
    blocks: Iterable[nn.Module] = (),
    described: dict[str, Any] | None = None,
    measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
) -> Outcome:
    """Train `model` on the micro-batches of `loader` (this rank's) until `config.total_steps` or an earlier end.

    `blocks` are the submodules that FSDP shards one by one; `described` joins the config in what the run shows.
    `measure(model)` gives further metrics of an evaluation, such as an accuracy, the same on every rank. Raises
    ValueError for a `config.metric` that no evaluation has.
    """
    if not validation:
        raise ValueError("train() needs at least one validation batch")
    own = ["val_loss"] if config.ema_decay is None else ["val_loss", _OF_AVERAGE]
    if measure is None and config.metric not in own:
        raise ValueError(f"an evaluation has {' and '.join(own)}: give measure=, which returns {config.metric!r}")
    trainer = Trainer(model=model, blocks=blocks, config=config, device=device)
    judges = config.patience is not None or config.restore_best
    stopper = EarlyStopping(patience=config.patience, min_delta=config.min_delta, mode=config.mode) if judges else None
    best = BestWeights(bare(trainer.model)) if config.restore_best else None
    warm_reducer(trainer.model, lambda: trainer.forward_loss(trainer.model, validation[0]))
    # Weights are alike on every rank, dropout is not.
    torch.manual_seed(config.seed + world()[0])

    def evaluate() -> dict[str, float]:
        metrics = trainer.evaluate(lambda: run.eval_batches(validation))
        if measure is not None and not run.stopping:
            metrics |= trainer.measured(measure)
        if stopper is not None and not run.stopping:  # a stopped evaluation saw a part of the batches
            if config.metric not in metrics:
                raise ValueError(f"measure= gave no {config.metric!r}: there are {', '.join(sorted(metrics))}")
            improved = stopper.judge(metrics[config.metric], step=run.step)
            if improved and best is not None:
                keep_best(best, trainer.ema if config.metric == _OF_AVERAGE else None, step=run.step)
        return metrics

    run = Run.attach(
        name,
        model=trainer.model,
        optimizer=trainer.optimizer,
        scheduler=trainer.scheduler,
        scaler=trainer.scaler if trainer.scaler.is_enabled() else None,
        loader=loader,
        config=dataclasses.asdict(config) | (described or {}),
        total_steps=config.total_steps,
        on_eval=evaluate,
        eval_every=config.eval_every,
        checkpoint_every=config.checkpoint_every,
    )
    with run:
        if trainer.ema is not None:
            run.track("ema", trainer.ema)
        if stopper is not None:
            run.track("early_stopping", stopper)
        if best is not None:
            run.track("best_weights", best)
        stopped_early = _steps(run, trainer, stopper)
    restored = best.put_back() if best is not None else None  # after the run: its checkpoints have the newest weights
    return Outcome(
        step=run.step,
        stopped_early=stopped_early,
        restored_step=restored,
        restored_average=best is not None and restored is not None and best.averaged,
        ema=trainer.ema,
    )


def keep_best(best: BestWeights, judged: Ema | None, *, step: int) -> None:
    """Keep the weights that were judged: the model's, or those of the average."""
    with judged.in_place_of_parameters() if judged is not None else nullcontext():
        best.keep(step=step, averaged=judged is not None)


def _steps(run: Run, trainer: Trainer, stopper: EarlyStopping | None) -> bool:
    """The loop itself. Returns whether it ended because the metric no longer improves."""
    clip = run.tunable("clip", trainer.config.clip, min=0.1, max=100.0)
    accumulate = run.tunable("accumulate", trainer.config.accumulate, min=1, max=1024, unit="micro-batches")
    losses: list[Tensor] = []
    tokens = 0
    for batch in run.batches():
        completes_step = len(losses) + 1 == accumulate.value
        with gradient_sync(trainer.model, enabled=completes_step), run.measure_flops():
            with run.phase("forward"):
                loss = trainer.forward_loss(trainer.model, batch)
            with run.phase("backward"):
                trainer.scaler.scale(loss / int(accumulate.value)).backward()
        losses.append(loss.detach())
        tokens += batch[0].numel() * world()[1]
        if not completes_step:
            continue
        with run.phase("communication"):
            mean_loss = mean_over_ranks(torch.stack(losses).mean())
        with run.phase("optimizer"):
            norm = trainer.update(clip=float(clip.value))
        run.log(loss=mean_loss, grad_norm=norm, clipped=norm > float(clip.value))
        run.step_done(tokens=tokens)
        losses, tokens = [], 0
        if stopper is not None and stopper.exhausted:
            return True
    return False
