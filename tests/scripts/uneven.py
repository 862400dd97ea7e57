"""Ranks with different numbers of batches under torch's `Join`: rank 1's end after SHORT steps, rank 0's after LONG.

usage: uneven.py OUTPUT SHORT LONG
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join

from trainctl.trainer import Run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("steps", type=int, nargs=2, help="of rank 1, and of rank 0")
    given = parser.parse_args()
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = Run.attach("uneven", model=model, optimizer=optimizer, on_rollback=lambda _step: None)
    x = run.tunable("x", 0.0)
    with run, (given.output / f"rank-{rank}.jsonl").open("w") as record, Join([model]):
        for _ in range(given.steps[1 - rank]):
            if run.stopping:
                break
            loss = model(torch.randn(8, 4)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
            time.sleep(0.02)
            run.step_done()
            print(json.dumps({"step": run.step, "x": x.value}), file=record, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
