"""How long a checkpoint stops training: our staging against the bare copy into warm buffers and against torch.save.

    python bench/checkpoint_stall.py [--megabytes 400] [--rounds 5]

State: a model with AdamW on the CPU; all three move the same bytes in the same call. Prints one JSON line; times are
medians in seconds, `ratio` is ours over the warm copy, `best_ratio` that of the fastest rounds, which a busy machine
disturbs least.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from trainctl.trainer.checkpoint import Checkpointer, State

_WIDTH = 1024


def build(megabytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A stack of layers that with its two moments takes about `megabytes`."""
    layers = max(1, round(megabytes * 1e6 / (3 * 4 * _WIDTH * (_WIDTH + 1))))
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for entry in optimizer.state.values() for value in entry.values()]
    return [*model.state_dict().values(), *moments]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model, optimizer = build(options.megabytes)
    live = tensors_of(model, optimizer)
    buffers = [torch.empty_like(tensor).fill_(0) for tensor in live]

    def copy() -> None:
        for buffer, tensor in zip(buffers, live, strict=True):
            buffer.copy_(tensor)

    with tempfile.TemporaryDirectory() as scratch:
        checkpointer = Checkpointer(
            directory=Path(scratch) / "checkpoints",
            run_id="bench",
            rank=0,
            world_size=1,
            group=None,
            state=State(models=[model], optimizers=[optimizer]),
        )

        def save(number: int) -> tuple[float, float]:
            pending = checkpointer.begin_save(id=f"save-{number}", step=number, incarnation=1, attempt=1, metrics={})
            result = pending.result()
            if result.error is not None:
                raise SystemExit(result.error)
            return result.stall_s, result.write_s

        cold, _ = save(0)
        checkpointer.warm()
        ours, writes, bare, plain = [], [], [], []
        for number in range(1, options.rounds + 1):
            stall_s, write_s = save(number)
            ours.append(stall_s)
            writes.append(write_s)
            bare.append(timed(copy))
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            plain.append(timed(lambda state=state: torch.save(state, Path(scratch) / "plain.pt")))
    medians = {
        "stall_s": statistics.median(ours),
        "warm_copy_s": statistics.median(bare),
        "torch_save_s": statistics.median(plain),
        "write_s": statistics.median(writes),
    }
    print(
        json.dumps(
            {
                "bench": "checkpoint_stall",
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in live),
                "rounds": options.rounds,
                "first_stall_s": round(cold, 4),
                **{name: round(value, 4) for name, value in medians.items()},
                "ratio": round(medians["stall_s"] / medians["warm_copy_s"], 3),
                "best_ratio": round(min(ours) / min(bare), 3),
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
