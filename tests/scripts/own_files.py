"""Trains a small model whose checkpoints the script itself writes and reads, one file a rank.

usage: own_files.py OUTPUT [--steps N] [--sleep S]

Once there is a file OUTPUT/break, loading fails on rank 1.
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

from trainctl.trainer import Retention, Run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--sleep", type=float, default=0.02)
    given = parser.parse_args()
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    torch.manual_seed(5)
    model: nn.Module = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs = torch.randn(64, 4)
    torch.manual_seed(50 + rank)  # the ranks drop out differently

    def save(directory: Path) -> None:
        (directory / "parts").mkdir(exist_ok=True)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, directory / f"parts/{rank}.pt")

    def load(directory: Path) -> None:
        if rank == 1 and (given.output / "break").exists():
            raise RuntimeError("the script cannot load today")
        mine = torch.load(directory / f"parts/{rank}.pt", weights_only=True)
        model.load_state_dict(mine["model"])
        optimizer.load_state_dict(mine["optimizer"])

    run = Run.attach(
        "own-files",
        model=model,
        optimizer=optimizer,
        loader=DataLoader(TensorDataset(inputs), batch_size=8, shuffle=True),
        total_steps=given.steps,
        on_eval=lambda: {"score": 1.0} if run.step == 30 else None,  # the first that has it stays the best
        eval_every=10,
        checkpoint_every=10,
        save=save,
        load=load,
        keep=Retention(last=2, best=1, metric="score", mode="max", every=20),
    )
    with run, (given.output / f"rank-{rank}.jsonl").open("w") as record:
        for (batch,) in run.batches():
            loss = model(batch).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step, incarnation = run.step + 1, run.incarnation
            run.log(loss=loss)
            time.sleep(given.sleep)
            run.step_done()
            line = {"step": step, "incarnation": incarnation, "loss": loss.item()}
            print(json.dumps(line), file=record, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
