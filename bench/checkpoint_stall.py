"""How long a checkpoint stops training, beside the bare copy of the same bytes and what else there is; and how long a
rollback to a state in memory takes, beside the bare copy back.

    python bench/checkpoint_stall.py [--millions 10 100 500] [--rounds 5] [--peer-rounds 2] [--threads 1] [--gate]
                                     [--width 2048]

State: linear layers of `--width` (narrower ones are more tensors) on the CPU with AdamW, at 500 M parameters with
plain SGD, so that every peer's buffers fit into 24 GB. One JSON line for all sizes; times are in seconds, `best` of
the fastest round, which a busy machine disturbs least, and `median`. All run in one process with the same number of
threads:

warm_copy    into buffers that were allocated and touched before      cold_copy    into new ones
torch_save   torch.save of the state dicts, without fsync             dcp_save     torch.distributed.checkpoint.save
dcp_async    dcp.async_save with DefaultStager, all its flags off: the configuration that reuses its buffers on a CPU
ours         Checkpointer.begin_save, on one rank                     ours_write   what then happens in the background
ours_forked  the same while a process forked since the save before lives, as a DataLoader's workers do in each epoch
copy_back    from warm buffers into the live tensors                  rollback     load and commit, from memory

`ratio` is ours / warm_copy, `forked_ratio` ours_forked / warm_copy and `rollback_ratio` rollback / copy_back, each of
the medians and of the best.

`--gate` holds the design's promise: for every size from 100 M parameters on, the best of the `--rounds` rounds of ours
takes at most 1.1 times the best of the bare copies between them. Where it does not, a sentence says so, and the exit
code is 1. Enough for that: `--millions 100 --peer-rounds 0 --gate`, which leaves the peers out. It is no part of `make
test` and of CI: their machines are shared, and what a neighbour does to the memory bus is no fault of the code.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from trainctl.trainer.checkpoint import Checkpointer, State
from trainctl.trainer.checkpoint.save import SaveResult

_LEAN_FROM_MILLIONS = 300
GATED_FROM_PARAMETERS = 100_000_000
GATED_RATIO = 1.1

Times = dict[str, list[float]]


def build(millions: int, width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A stack of layers with about so many parameters, and an optimizer that has taken a step."""
    width = width if millions >= 50 else width // 2
    layers = max(1, round(millions * 1e6 / (width * (width + 1))))
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    lean = millions >= _LEAN_FROM_MILLIONS
    optimizer = torch.optim.SGD(model.parameters()) if lean else torch.optim.AdamW(model.parameters())
    if not lean:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for entry in optimizer.state.values() for value in entry.values()]
    return [*model.state_dict().values(), *moments]


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    into.append(time.perf_counter() - started)


def copied(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def saved(checkpointer: Checkpointer, name: str) -> SaveResult:
    """A save, once it is written."""
    result = checkpointer.begin_save(id=name, step=1, incarnation=1, attempt=1, metrics={}).result()
    if result.error is not None:
        raise SystemExit(result.error)
    checkpointer.drain()
    return result


@contextmanager
def forked() -> Iterator[None]:
    """A process forked from this one, which lives meanwhile and does nothing."""
    ended, end = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(end)
        os.read(ended, 1)
        os._exit(0)
    try:
        yield
    finally:
        os.close(end)
        os.close(ended)
        os.waitpid(worker, 0)


def measure_ours(scratch: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rounds: int, times: Times) -> int:
    """Ours and the bare copies in turns, so that both see the same machine; the bytes that ours holds."""
    live = tensors_of(model, optimizer)
    buffers = [torch.empty_like(tensor).fill_(0) for tensor in live]
    checkpointer = Checkpointer(
        directory=scratch / "checkpoints",
        run_id="bench",
        rank=0,
        world_size=1,
        group=None,
        state=State(models=[model], optimizers=[optimizer]),
        memory_checkpoints=1,
    )
    checkpointer.warm()
    for number in range(rounds):
        name = f"save-{number}"
        checkpointer.drain()
        with timed(times["warm_copy"]):
            copied(buffers, live)
        result = saved(checkpointer, name)
        times["ours"].append(result.stall_s)
        times["ours_write"].append(result.write_s)
        with timed(times["copy_back"]):
            copied(live, buffers)
        with timed(times["rollback"]):
            loaded = checkpointer.load(name)
            checkpointer.commit(loaded)
        if not loaded.from_memory:
            raise SystemExit("the rollback was not from memory")
        del loaded
        shutil.rmtree(scratch / "checkpoints")
    with timed(times["cold_copy"]):
        fresh = [torch.empty_like(tensor) for tensor in live]
        copied(fresh, live)
    for number in range(rounds):  # last, because the bare copies' buffers would be shared with the worker
        with forked():
            times["ours_forked"].append(saved(checkpointer, f"forked-{number}").stall_s)
        shutil.rmtree(scratch / "checkpoints")
    return checkpointer.memory_bytes


def measure_peers(scratch: Path, state: Callable[[], dict[str, Any]], rounds: int, times: Times) -> None:
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    for number in range(rounds):
        place = scratch / "peer"
        with timed(times["torch_save"]):
            torch.save(state(), scratch / "plain.pt")
        (scratch / "plain.pt").unlink()
        with timed(times["dcp_save"]):
            dcp.save(state(), storage_writer=FileSystemWriter(place))
        shutil.rmtree(place)
        with timed(times["dcp_async"]):
            going: Any = dcp.async_save(state(), storage_writer=FileSystemWriter(place), async_stager=stager)
        (going if hasattr(going, "result") else going.upload_completion).result()
        shutil.rmtree(place)
        if not number:
            times["dcp_async_first"].append(times["dcp_async"].pop())  # its buffers were made in there
    stager.close()


def measure(millions: int, rounds: int, peer_rounds: int, width: int) -> dict[str, object]:
    model, optimizer = build(millions, width)
    live = tensors_of(model, optimizer)
    names = ("warm_copy", "cold_copy", "ours", "ours_forked", "ours_write", "copy_back", "rollback")
    peers = ("torch_save", "dcp_save", "dcp_async", "dcp_async_first")
    times: Times = {name: [] for name in (*names, *peers)}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as scratch:
        held = measure_ours(Path(scratch), model, optimizer, rounds, times)
        gc.collect()
        state = lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()}  # noqa: E731
        if peer_rounds:
            measure_peers(Path(scratch), state, peer_rounds + 1, times)
    best = {name: min(values) for name, values in times.items() if values}
    median = {name: statistics.median(values) for name, values in times.items() if values}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "optimizer": type(optimizer).__name__,
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in live),
        "tensors": len(live),
        "held_bytes": held,
        "best": {name: round(value, 4) for name, value in best.items()},
        "median": {name: round(value, 4) for name, value in median.items()},
        "ratio": {"median": _over(median, "ours", "warm_copy"), "best": _over(best, "ours", "warm_copy")},
        "forked_ratio": {
            "median": _over(median, "ours_forked", "warm_copy"),
            "best": _over(best, "ours_forked", "warm_copy"),
        },
        "rollback_ratio": {
            "median": _over(median, "rollback", "copy_back"),
            "best": _over(best, "rollback", "copy_back"),
        },
    }


def _over(times: dict[str, float], one: str, other: str) -> float:
    return round(times[one] / times[other], 3)


def beyond(sizes: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each gated size whose stall is longer than promised. Raises ValueError where none is gated."""
    gated = [size for size in sizes if size["parameters"] >= GATED_FROM_PARAMETERS]
    if not gated:
        raise ValueError(f"nothing to gate: no size has {GATED_FROM_PARAMETERS // 10**6} M parameters or more")
    return [
        f"a checkpoint of {size['parameters'] / 1e6:.0f} M parameters stops training for {best['ours']:.3f} s at best, "
        f"{best['ours'] / best['warm_copy']:.2f} times the bare copy ({best['warm_copy']:.3f} s): "
        f"at most {GATED_RATIO} is promised"
        for size in gated
        if (best := size["best"])["ours"] > GATED_RATIO * best["warm_copy"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[10, 100, 500])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=2)
    parser.add_argument("--width", type=int, default=2048, help="of a layer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gate", action="store_true", help="fail where a checkpoint stalls longer than promised")
    options = parser.parse_args()
    if options.gate and max(options.millions) * 10**6 < GATED_FROM_PARAMETERS:
        parser.error(f"--gate needs a size of {GATED_FROM_PARAMETERS // 10**6} million parameters or more")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as meeting:
        dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=0, world_size=1)
        sizes = [measure(millions, options.rounds, options.peer_rounds, options.width) for millions in options.millions]
        dist.destroy_process_group()
    threads = torch.get_num_threads()
    print(json.dumps({"bench": "checkpoint_stall", "rounds": options.rounds, "threads": threads, "sizes": sizes}))
    if options.gate and (slow := beyond(sizes)):
        raise SystemExit("\n".join(slow))


if __name__ == "__main__":
    main()
