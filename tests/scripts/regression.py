"""Trains a small network on noise: dropout, shuffling, several epochs. Writes each step's loss, bit by bit.

usage: regression.py OUTPUT [--steps N] [--sleep S] [--hold]
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from trainctl.trainer import Run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--checkpoint-every", type=int, default=20)
    parser.add_argument("--memory-checkpoints", type=int, default=3)
    given = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.2), nn.ReLU(), nn.Linear(64, 1))
    data = TensorDataset(torch.randn(1024, 16), torch.randn(1024, 1))
    if ranks > 1:
        model = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(100 + rank)
    sampler: DistributedSampler[object] = DistributedSampler(data, num_replicas=ranks, rank=rank, seed=3)
    loader = DataLoader(data, batch_size=16, sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    run = Run.attach(
        "regression",
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        total_steps=given.steps,
        checkpoint_every=given.checkpoint_every,
        memory_checkpoints=given.memory_checkpoints,
        on_eval=lambda: {"val_loss": float(sum(p.abs().sum() for p in model.parameters()))},
    )
    clip = run.tunable("clip", 1.0, min=0.1, max=10.0)
    with run, (given.output / f"rank-{rank}.jsonl").open("w") as record:
        for inputs, targets in run.batches():
            with run.phase("forward"):
                loss = (model(inputs) - targets).pow(2).mean()
            with run.phase("backward"):
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), clip.value)
            optimizer.step()
            lr_scheduled = optimizer.param_groups[0]["lr"]
            scheduler.step()
            run.log(loss=loss, grad_norm=norm)
            trained, incarnation = run.step + 1, run.incarnation
            if given.sleep:
                time.sleep(given.sleep)
            run.step_done(tokens=16 * ranks)
            line = {"step": trained, "incarnation": incarnation, "loss": loss.item().hex(), "clip": clip.value}
            print(json.dumps(line | {"lr_scheduled": lr_scheduled, "now": run.step}), file=record, flush=True)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
