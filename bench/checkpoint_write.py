"""What the background write of a checkpoint does to the steps of training, with and without its limits.

    python bench/checkpoint_write.py [--megabytes 400] [--saves 3] [--ranks 2]

Ranks train a small model with DistributedDataParallel over gloo, one thread each, so that two ranks keep two cores busy
with steps of about 10 ms; the state carries a tensor of `--megabytes` besides. Each way of writing runs in a job of its
own, in this call. Prints one JSON line. Of each way: mean, median and 99th percentile of rank 0's steps alone and while
a checkpoint is written, `slower` the ratio of the means, `extra_s` what all steps of one write lost together, and
`write_s`. The ways:

ours        the lowest priority, and rests for half of the time
unlimited   the same code without priority and rests
dcp_async   torch.distributed.checkpoint.async_save
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.nn.parallel import DistributedDataParallel

from trainctl.trainer.checkpoint import Accessor, Checkpointer, State, background

WAYS = ("ours", "unlimited", "dcp_async")
_WIDTH = 512
_LAYERS = 6
_BATCH = 16
_QUIET_STEPS = 150


class Training:
    """Steps, and their times by whether a checkpoint was being written."""

    def __init__(self, ballast_bytes: int) -> None:
        layers = [part for _ in range(_LAYERS) for part in (nn.Linear(_WIDTH, _WIDTH), nn.GELU())]
        self.model = DistributedDataParallel(nn.Sequential(*layers))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        pieces = max(1, ballast_bytes // (16 * 1024 * 1024))
        self.ballast = [torch.ones(4 * 1024 * 1024) for _ in range(pieces)]

    def step(self) -> float:
        started = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(torch.randn(_BATCH, _WIDTH)).pow(2).mean().backward()
        self.optimizer.step()
        return time.perf_counter() - started

    def state(self) -> dict[str, Any]:
        ballast = {f"ballast.{number}": tensor for number, tensor in enumerate(self.ballast)}
        return {"model": self.model.module.state_dict(), "optimizer": self.optimizer.state_dict(), **ballast}


def saver(way: str, training: Training, directory: Path, group: Any) -> tuple[Callable[[int], Callable[[], bool]], Any]:
    """A function that begins a save and returns whether it is done, and what has to be ended at last."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if way == "dcp_async":
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        stager = DefaultStager(options)

        def begin_dcp(number: int) -> Callable[[], bool]:
            writer = FileSystemWriter(directory / str(number))
            going: Any = dcp.async_save(
                training.state(), storage_writer=writer, process_group=group, async_stager=stager
            )
            future = going if hasattr(going, "result") else going.upload_completion
            return lambda: bool(future.done())

        return begin_dcp, stager
    if way == "unlimited":
        background.SHARE, background.NICE = 1.0, 0
    checkpointer = Checkpointer(
        directory=directory,
        run_id="bench",
        rank=rank,
        world_size=world_size,
        group=group,
        state=State(
            models=[training.model],
            optimizers=[training.optimizer],
            tracked={"ballast": Accessor(get=lambda: training.ballast, set=lambda _: None)},
        ),
        memory_checkpoints=1,
    )

    def begin(number: int) -> Callable[[], bool]:
        return checkpointer.begin_save(id=f"save-{number}", step=number, incarnation=1, attempt=1, metrics={}).done

    return begin, checkpointer


def rank_main(way: str, directory: Path, megabytes: int, saves: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/meeting",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    group = dist.new_group(backend="gloo")
    training = Training(megabytes * 1_000_000)
    begin, used = saver(way, training, directory / "checkpoints", group)
    quiet: list[float] = []
    busy: list[float] = []
    writes: list[float] = []
    for _ in range(20):
        training.step()
    for number in range(saves + 1):
        measured = number > 0  # the first makes the buffers
        quiet += [training.step() for _ in range(_QUIET_STEPS)] if measured else []
        done, began = begin(number), time.perf_counter()
        everywhere = torch.zeros(1)
        while not everywhere.item():
            took = training.step()
            busy += [took] if measured else []
            everywhere = torch.tensor([float(done())])
            dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)  # all ranks make as many steps
        writes += [time.perf_counter() - began] if measured else []
    if isinstance(used, Checkpointer):
        used.drain()
    if dist.get_rank() == 0:
        print(json.dumps({"quiet": quiet, "busy": busy, "writes": writes}))
    dist.destroy_process_group()


def judged(told: dict[str, list[float]], saves: int) -> dict[str, object]:
    quiet, busy = told["quiet"], told["busy"]
    alone, beside = statistics.fmean(quiet), statistics.fmean(busy)
    middle = {"alone": statistics.median(quiet), "while_writing": statistics.median(busy)}
    return {
        "step_s": {"alone": round(alone, 5), "while_writing": round(beside, 5)},
        "median_s": {name: round(value, 5) for name, value in middle.items()},
        "p99_s": {"alone": round(_p99(quiet), 5), "while_writing": round(_p99(busy), 5)},
        "slower": round(beside / alone, 3),
        "median_slower": round(middle["while_writing"] / middle["alone"], 3),
        "extra_s": round((beside - alone) * len(busy) / saves, 3),
        "write_s": round(statistics.median(told["writes"]), 3),
    }


def _p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def run_way(way: str, options: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as scratch:
        ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    __file__,
                    "--way",
                    way,
                    "--directory",
                    scratch,
                    "--megabytes",
                    str(options.megabytes),
                    "--saves",
                    str(options.saves),
                ],
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(options.ranks), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(options.ranks)
        ]
        told = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"a rank of {way} failed")
    return judged(json.loads(told[0].strip().splitlines()[-1]), options.saves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        rank_main(options.way, options.directory, options.megabytes, options.saves)
        return
    found = {way: run_way(way, options) for way in options.ways}
    print(json.dumps({"bench": "checkpoint_write", "ranks": options.ranks, "megabytes": options.megabytes, **found}))


if __name__ == "__main__":
    main()
