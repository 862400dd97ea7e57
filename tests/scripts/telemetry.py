"""Trains a line through noise, with what a careless or unlucky script does to its telemetry.

usage: telemetry.py OUTPUT [--steps N] [--sleep S] [--workers fork|forkserver|spawn] [--bad] [--uneven]
"""

import argparse
import json
import os
import threading
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trainctl.trainer import Run


class Points(Dataset[Tensor]):
    def __init__(self, output: Path) -> None:
        self.output = output

    def __len__(self) -> int:
        return 640

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((8,), index / 640)

    def started(self, worker: int) -> None:
        """A worker tells what it runs on."""
        names = [thread.name for thread in threading.enumerate()]
        rank = os.environ.get("RANK", "0")
        made = self.output / f"worker-{rank}-{worker}.new"
        made.write_text(json.dumps({"pid": os.getpid(), "threads": names}))
        made.rename(made.with_suffix(".json"))  # whoever sees it sees all of it


def sockets() -> set[str]:
    """As the kernel names them."""
    targets = (str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
    return {target for target in targets if target.startswith("socket:")}


def ports() -> set[int]:
    """On which this process listens."""
    return {known.laddr.port for known in psutil.Process().net_connections("tcp") if known.status == "LISTEN"}


def odd(step: int) -> dict[str, object]:
    """What no script should log, and some do."""
    values: dict[str, object] = {f"name_of_step_{step}_{number}": 1.0 for number in range(250)}
    values |= {"text": "much", "many": torch.zeros(3), "nothing": None, "col\x1b[31mour": 0.5, "\x00": 1.0}
    return values | {"huge": 10**400, "hole": float("nan"), "over": float("inf"), "step": 100 - step}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--workers", choices=["fork", "forkserver", "spawn"])
    parser.add_argument("--bad", action="store_true")
    parser.add_argument("--uneven", action="store_true", help="rank r makes a step of 2 + r micro-batches")
    given = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    data = Points(given.output)
    workers = (
        {"num_workers": 2, "multiprocessing_context": given.workers, "persistent_workers": True}
        if given.workers
        else {}
    )
    loader = DataLoader(data, batch_size=16, worker_init_fn=data.started if given.workers else None, **workers)
    own_sockets, own_ports = sockets(), ports()
    run = Run.attach(
        "telemetry",
        model=model,
        optimizer=optimizer,
        loader=loader,
        total_steps=given.steps,
        on_eval=lambda: {"val_loss": 1.0},
        eval_every=10,
        checkpoint_every=20,
        peak_flops=1e9,
    )
    made = {"attach": sorted(sockets() - own_sockets), "ports": sorted(ports() - own_ports)}
    (given.output / f"sockets-{rank}.json").write_text(json.dumps({"script": sorted(own_sockets)} | made))
    clip = run.tunable("clip", 1e-6, min=0.0)
    with run, (given.output / f"rank-{rank}.jsonl").open("w") as record:
        for micro_batch, inputs in enumerate(run.batches(), start=1):
            with run.measure_flops():
                with run.phase("forward"):
                    loss = (model(inputs) - inputs.mean(dim=1, keepdim=True)).pow(2).mean() + rank
                with run.phase("backward"):
                    (loss / 2).backward()
            if micro_batch % (2 + rank * given.uneven):
                continue
            with run.phase("communication"):
                norm = nn.utils.clip_grad_norm_(model.parameters(), clip.value)
                if ranks > 1:  # so that they keep step, as in any real job
                    dist.all_reduce(norm)
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(given.sleep)
            run.log(loss=loss, grad_norm=norm)
            if given.bad:
                run.log(**odd(run.step + 1))
            run.step_done(tokens=32 * ranks, samples=32 * ranks)
            line = {"step": run.step, "loss": loss.item(), "data": run.data_range(run.step)}
            print(json.dumps(line), file=record, flush=True)
        began = time.monotonic()
        run.close()
        (given.output / f"closing-{rank}.json").write_text(json.dumps(time.monotonic() - began))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
