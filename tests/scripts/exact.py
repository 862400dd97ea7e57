"""Trains with everything at once that a rollback has to put back: a GradScaler whose scale falls and grows, fp16
autocast, dropout, a shuffling sampler, loader workers, accumulation over the end of an epoch, a schedule, an average of
the weights and early stopping. The data depend on the index alone; some indices overflow.

usage: exact.py OUTPUT [--steps N] [--sleep S] [--drawn] [--readable EPOCHS]

Each rank writes, for each step, the indices of its data and a hash of all of its state, bit by bit.
"""

import argparse
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from trainctl.trainer import Run
from trainctl.trainer.early_stopping import EarlyStopping
from trainctl.trainer.ema import Ema
from trainctl.trainer.parallel import gradient_sync, warm_reducer

BATCH = 4
BATCHES = 15  # of an epoch, on each rank; odd, so that every other epoch ends within a step of two micro-batches
SAVE_EVERY = 5  # steps: 10 and 20 lie in the middle of an epoch, 15 and 30 at its end
OVERFLOWING = frozenset({5, 130})


class Points(Dataset[tuple[int, Tensor]]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        point = torch.randn(16, generator=torch.Generator().manual_seed(index))
        return index, point * 1e30 if index in OVERFLOWING else point


class Readable(DistributedSampler[Any]):
    """Cannot be asked for an epoch that is not among the first `epochs`."""

    epochs = math.inf

    def __iter__(self) -> Iterator[Any]:
        if self.epoch >= self.epochs:
            raise OSError(f"epoch {self.epoch} is not there")
        return super().__iter__()


def digest(*parts: Any) -> str:
    """Of tensors, plain values, and lists and dicts of them."""
    sha = hashlib.sha256()

    def take(part: Any) -> None:
        if isinstance(part, Tensor):
            sha.update(part.detach().numpy().tobytes())
        elif isinstance(part, dict):
            for key in part:
                sha.update(repr(key).encode())
                take(part[key])
        elif isinstance(part, list | tuple):
            for one in part:
                take(one)
        elif isinstance(part, np.ndarray):
            sha.update(part.tobytes())
        else:
            sha.update(repr(part).encode())

    take(parts)
    return sha.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--drawn", action="store_true", help="the order is drawn anew for each epoch, by new workers")
    parser.add_argument("--readable", type=int, help="epochs that the last rank has; the others have all")
    given = parser.parse_args()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    bare = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.2), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    model = nn.parallel.DistributedDataParallel(bare)
    ema = Ema(bare, decay=0.9)
    if given.drawn:
        loader = DataLoader(Points(BATCH * BATCHES), batch_size=BATCH, shuffle=True, num_workers=2)
    else:
        data = Points(BATCH * BATCHES * ranks)
        sampler = Readable(data, num_replicas=ranks, rank=rank, seed=3)
        if given.readable is not None and rank == ranks - 1:
            sampler.epochs = given.readable
        loader = DataLoader(data, batch_size=BATCH, sampler=sampler, num_workers=2, persistent_workers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=4)
    stopper = EarlyStopping(patience=1000)
    warm_reducer(model, lambda: model(torch.zeros(BATCH, 16)).mean())
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(100 + rank)
    run = Run.attach(
        "exact",
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        loader=loader,
        total_steps=given.steps,
        checkpoint_every=SAVE_EVERY,
        memory_checkpoints=2,
    )
    checkpoints = Path(os.environ["TRAINCTL_RUN_DIR"]) / "checkpoints"
    run.track("ema", ema)
    run.track("early_stopping", stopper)
    with run, (given.output / f"rank-{rank}.jsonl").open("w") as record:
        taken: list[int] = []
        for indices, inputs in run.batches():
            taken += indices.tolist()
            last = len(taken) == 2 * BATCH
            with gradient_sync(model, enabled=last), torch.autocast("cpu", dtype=torch.float16):
                loss = (model(inputs) - inputs.mean(dim=1, keepdim=True)).float().pow(2).mean() / 2
                scaler.scale(loss).backward()
            if not last:
                continue
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
            ema.update()
            draws = (random.random(), float(np.random.rand()), float(torch.rand(1)))  # noqa: NPY002 - the global one
            step, incarnation = run.step + 1, run.incarnation
            stopper.judge(abs(step % 7 - 3), step=step)
            line = {"step": step, "incarnation": incarnation, "indices": taken, "loss": loss.item().hex()}
            line |= {"scale": scaler.get_scale(), "draws": draws, "waited": stopper.waited}
            line["parameters"] = digest(bare.state_dict())
            line["optimizer"] = digest(optimizer.state_dict(), scheduler.state_dict())
            line["others"] = digest(scaler.state_dict(), ema.state_dict(), stopper.state_dict())
            line["random"] = digest(torch.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002
            taken = []
            time.sleep(given.sleep)
            run.log(loss=loss)
            while step % SAVE_EVERY == 0 and list(checkpoints.glob(".*.stage")):
                time.sleep(0.01)  # on a machine that is too slow to have written the last one, this one is not left out
            run.step_done()
            line["data"] = run.data_range(step)  # None where this very step was rolled back
            print(json.dumps(line), file=record, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
