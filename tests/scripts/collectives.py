"""Ranks that meet in a collective each step. Told to, one of them goes into a collective that the others leave out.

usage: collectives.py OUTPUT [--steps N] [--sleep S] [--checkpoint-every N] [--eval-every N] [--batches N]
           [--exit-75] [--term CODE]

--term CODE: SIGTERM ends a rank by sys.exit(CODE), as scripts do that clean up.

OUTPUT/raise: once it is there, rank 1 raises.
OUTPUT/alone: once it is there, rank 1 waits for the others in vain.
OUTPUT/left-behind: the same, behind the optimizer's step, so that the others complete theirs.
OUTPUT/alone-in-batch: the same in the fifth of the `--batches` of an evaluation, which has a collective in each.
OUTPUT/long: while it is there, an evaluation does not end; OUTPUT/evaluating says that one began.
"""

import argparse
import datetime as dt
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from trainctl.trainer import Run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--sleep", type=float, default=0.05)
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--eval-every", type=int, default=0)
    parser.add_argument("--batches", type=int, default=0, help="of an evaluation")
    parser.add_argument("--exit-75", action="store_true", help="ask to be requeued, where no `trainctl run` does")
    parser.add_argument("--term", type=int)
    given = parser.parse_args()
    if given.term is not None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(given.term))
    # Long, so that whatever is noticed is noticed before it.
    dist.init_process_group("gloo", timeout=dt.timedelta(minutes=30))
    rank = dist.get_rank()
    apart = dist.new_group(backend="gloo")
    torch.manual_seed(1)
    model = nn.parallel.DistributedDataParallel(nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def evaluate() -> dict[str, float]:
        (given.output / "evaluating").touch()
        while (given.output / "long").exists():
            time.sleep(0.02)
        for batch in run.eval_batches(range(given.batches)):
            if rank == 1 and batch == 4 and (given.output / "alone-in-batch").exists():
                dist.all_reduce(torch.zeros(1), group=apart)
            dist.all_reduce(torch.zeros(1))
            time.sleep(0.3)
        return {"val_loss": 1.0}

    run = Run.attach(
        "collectives",
        model=model,
        optimizer=optimizer,
        total_steps=given.steps,
        checkpoint_every=given.checkpoint_every,
        on_rollback=lambda step: None,
        on_eval=evaluate if given.eval_every else None,
        eval_every=given.eval_every or None,
    )
    with run, (given.output / f"rank-{rank}.jsonl").open("a") as record:
        while run.step < given.steps and not run.stopping:
            with run.phase("forward"):
                loss = model(torch.randn(4, 8)).pow(2).mean()
            if rank == 1 and (given.output / "raise").exists():
                raise RuntimeError("a sample cannot be read")
            if rank == 1 and (given.output / "alone").exists():
                with run.phase("communication"):
                    dist.all_reduce(torch.zeros(1), group=apart)
            with run.phase("backward"):
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            if rank == 1 and (given.output / "left-behind").exists():
                with run.phase("communication"):
                    dist.all_reduce(torch.zeros(1), group=apart)
            run.log(loss=loss)
            time.sleep(given.sleep)
            run.step_done()
            line = {"step": run.step, "attempt": run.attempt, "incarnation": run.incarnation, "pid": os.getpid()}
            print(json.dumps(line), file=record, flush=True)
        if given.exit_75 and run.preempted:
            sys.exit(75)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
