"""Ranks of which only the first tracks something. usage: tracked_alone.py OUTPUT [--steps N]"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from trainctl.trainer import Run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run = Run.attach(
        "alone",
        model=model,
        optimizer=optimizer,
        loader=[torch.ones(2, 4)] * 8,
        total_steps=given.steps,
        checkpoint_every=2,
    )
    seen = {"steps": 0}
    if rank == 0:
        run.track("seen", get=lambda: seen, set=seen.update)
    with run, (given.output / f"rank-{rank}.jsonl").open("a") as record:
        for batch in run.batches():
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen["steps"] += rank == 0
            run.step_done()
            print(json.dumps({"step": run.step, "seen": seen["steps"]}), file=record, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
