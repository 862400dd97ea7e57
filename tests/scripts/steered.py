"""Trains next to nothing, in step with the other ranks, and writes down every command as it is applied.

usage: steered.py OUTPUT [--sleep S] [--steps N] [--eval-every N] [--long-evaluation] [--timeout S] [--store-line]
                         [--rank-0-evaluates] [--checkpoint-every N]

Where it is started again it goes on writing: applied-R.jsonl what rank R applied, rank-R.jsonl with what it trained
each step, begun-R.jsonl where it began each attempt.

--rank-0-evaluates: for all; the others return from on_eval at once.
--timeout S: of the process group and of the store that it is made through.
--store-line: rank 1 reaches the job's store through relay.py, whose pid is in OUTPUT/store-line.pid.
"""

import argparse
import datetime as dt
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainctl.trainer import Run
from trainctl.trainer.actions import Actions, Staged
from trainctl.trainer.agreement import Outcome, Proposal


def record_what_is_applied(path: Path, run_of: "list[Run]") -> None:
    """Wrap the one place where a command takes effect, so that the record does not depend on what is told."""
    file = path.open("a", buffering=1)
    carry_out = Actions._apply

    def apply(self: Actions, proposal: Proposal, staged: Staged) -> Outcome:
        outcome = carry_out(self, proposal, staged)
        if outcome.ok:
            run = run_of[0]
            line = {"id": proposal.command.id, "step": outcome.step, "incarnation": run.incarnation}
            line |= {"attempt": run.attempt, "after": outcome.after, "time": time.time()}
            print(json.dumps(line), file=file, flush=True)
        return outcome

    Actions._apply = apply  # type: ignore[method-assign]


def until_enough(output: Path) -> Iterator[int]:
    """Batches for as long as there is no file `enough`: ranks see it at different batches."""
    for batch in itertools.count():
        if (output / "enough").exists():
            return
        yield batch


def evaluate(run: Run, output: Path, rank: int, *, alone: bool) -> dict[str, float]:
    """Batches of 50 ms, whose number is then summed over the ranks; `alone`: rank 0 evaluates for all."""
    seen = torch.zeros(1)
    if alone and rank:
        return {}
    with (output / f"eval-{rank}.jsonl").open("a") as file:
        for batch in run.eval_batches(until_enough(output)):
            time.sleep(0.05)
            seen += 1
            print(json.dumps({"step": run.step, "batch": batch, "time": time.time()}), file=file, flush=True)
    if not alone:
        dist.all_reduce(seen)
    return {"val_loss": float(seen)}


def reach_the_store_by_a_relay(output: Path) -> subprocess.Popen[str]:
    """It ends with this process, whose end closes its input."""
    command = [sys.executable, str(Path(__file__).with_name("relay.py")), os.environ["MASTER_PORT"]]
    relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert relay.stdout is not None
    os.environ["MASTER_PORT"] = relay.stdout.readline().strip()
    (output / "store-line.pid").write_text(str(relay.pid))
    return relay


def record_the_beginning(path: Path, run: Run) -> None:
    line = {"attempt": run.attempt, "step": run.step, "incarnation": run.incarnation, "run": run.id}
    with path.open("a") as file:
        print(json.dumps(line | {"time": time.time()}), file=file, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--sleep", type=float, default=0.01)
    parser.add_argument("--eval-every", type=int)
    parser.add_argument("--checkpoint-every", type=int)
    parser.add_argument("--long-evaluation", action="store_true")
    parser.add_argument("--rank-0-evaluates", action="store_true")
    parser.add_argument("--timeout", type=float, default=1800.0)
    parser.add_argument("--store-line", action="store_true")
    given = parser.parse_args()
    rank = int(os.environ["RANK"])
    relay = reach_the_store_by_a_relay(given.output) if given.store_line and rank == 1 else None
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=given.timeout))
    runs: list[Run] = []
    record_what_is_applied(given.output / f"applied-{rank}.jsonl", runs)
    torch.manual_seed(1)
    model: nn.Module = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = Run.attach(
        "steered",
        model=model,
        optimizer=optimizer,
        loader=DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=8),
        total_steps=given.steps,
        on_eval=lambda: (
            evaluate(runs[0], given.output, rank, alone=given.rank_0_evaluates)
            if given.long_evaluation
            else {"val_loss": 1.0}
        ),
        eval_every=given.eval_every,
        checkpoint_every=given.checkpoint_every,
    )
    runs.append(run)
    x = run.tunable("x", 0.0)
    rates = [0.0]  # what the newest step used, as the optimizer itself sees it: a hook behind those of Run.attach
    optimizer.register_step_pre_hook(lambda stepping, *_: rates.__setitem__(0, stepping.param_groups[0]["lr"]))
    record_the_beginning(given.output / f"begun-{rank}.jsonl", run)
    with run, (given.output / f"rank-{rank}.jsonl").open("a") as record:
        for (inputs,) in run.batches():
            loss = model(inputs).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
            time.sleep(given.sleep)
            line = {"step": run.step + 1, "attempt": run.attempt, "incarnation": run.incarnation}
            line |= {"x": x.value, "lr": rates[0]}
            run.step_done()
            print(json.dumps(line | {"time": time.time()}), file=record, flush=True)
    dist.destroy_process_group()
    if relay is not None:
        relay.kill()
        relay.wait()


if __name__ == "__main__":
    main()
