"""Run by test_memory_ranks.py as one rank of two: `memory_ranks.py DIRECTORY RANK WORLD_SIZE`."""

import os
import shutil
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainctl.trainer.checkpoint import Accessor, Checkpointer, CheckpointError, State

directory, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def bare_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 17), nn.BatchNorm1d(17), nn.Dropout(0.4), nn.Linear(17, 3))


def sharded() -> nn.Module:
    model = bare_model()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world_size,))
    fully_shard(model, mesh=mesh)
    return model


class Training:
    """`value` is this rank's own, as RNG and loader are."""

    def __init__(self, model: nn.Module, group: Any, *, name: str, memory_checkpoints: int = 2) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.counters: dict[str, Any] = {"rank": rank}
        self.average = torch.zeros(5)
        self.checkpointer = Checkpointer(
            directory=directory / name,
            run_id="test",
            rank=rank,
            world_size=world_size,
            group=group,
            state=State(
                models=[model],
                optimizers=[self.optimizer],
                tracked={"average": Accessor(get=lambda: self.average, set=self._set)},
                counters=self.counters,
            ),
            memory_checkpoints=memory_checkpoints,
        )

    def _set(self, value: Any) -> None:
        self.average = value

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = self.model(torch.randn(4, 6)).pow(2).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.average += 1
            losses.append(loss.item())
        return losses

    def save(self, checkpoint: str) -> str | None:
        pending = self.checkpointer.begin_save(id=checkpoint, step=2, incarnation=1, attempt=1, metrics={})
        error = pending.result(60).error
        self.checkpointer.drain()
        return error

    def restore(self, checkpoint: str) -> bool:
        """Whether it was from memory."""
        self.counters["rank"] = None
        loaded = self.checkpointer.load(checkpoint)
        self.checkpointer.commit(loaded)
        loaded.restore_rng()
        assert loaded.notes == ()
        assert self.counters["rank"] == rank
        return loaded.from_memory


def remove_files(group: Any, name: str, checkpoint: str) -> None:
    if rank == 0:
        shutil.rmtree(directory / name / checkpoint)
    dist.barrier(group=group)


def exact(make: Callable[[], nn.Module], group: Any, name: str) -> None:
    """Back and on, three times, without a file to read from: always as if the run had never left."""
    training = Training(make(), group, name=name)
    torch.manual_seed(100 + rank)
    training.run(2)
    assert training.save("two") is None
    remove_files(group, name, "two")
    expected = training.run(3)
    for _ in range(3):
        assert training.restore("two")
        assert training.run(3) == expected


def decided_together(group: Any) -> None:
    """A state that one rank has no more is read from disk by all, and is no state at all where it is not on disk."""
    keeps = 2 if rank == 0 else 1
    training = Training(DistributedDataParallel(bare_model()), group, name="together", memory_checkpoints=keeps)
    torch.manual_seed(100 + rank)
    training.run(1)
    assert training.save("a") is None
    expected = training.run(2)
    assert training.save("b") is None
    assert [info.id for info in training.checkpointer.in_memory] == ["b"], "what not all have is not listed"
    assert not training.restore("a")
    assert training.run(2) == expected
    remove_files(group, "together", "a")
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    problem = ""
    try:
        training.checkpointer.load("a")
    except CheckpointError as refused:
        problem = str(refused)
    told: list[Any] = [None] * world_size
    dist.all_gather_object(told, problem, group=group)
    assert len(set(told)) == 1, told
    assert problem.endswith("in memory it is not on rank 1"), problem
    assert all(torch.equal(p, old) for p, old in zip(training.model.parameters(), before, strict=True))


def left_out_together(group: Any) -> None:
    """Where one rank has no buffer to spare, no rank saves: they need not agree before, and nobody waits."""
    training = Training(DistributedDataParallel(bare_model()), group, name="left-out")
    training.run(1)
    assert training.save("a") is None
    if rank == 1:  # its two buffers are being written, as far as it knows
        layout = training.checkpointer._tier.find("a").buffers.layout  # type: ignore[union-attr]
        while training.checkpointer._tier.claim(layout, pinned=False, make=False) is not None:
            pass
    pending = training.checkpointer.begin_save(id="b", step=2, incarnation=1, attempt=1, metrics={}, may_leave_out=True)
    assert str(pending.result(60).error).startswith("rank 1: left out"), pending.result().error
    assert not (directory / "left-out" / "b").exists()
    training.checkpointer.drain()  # making room goes on behind a save: a thread inside torch would abort the exit


def waited_for() -> None:
    """A rank that is late for a save or a load, or has a disk that hangs, is waited for, and the next save works."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    _set_pg_timeout(timedelta(seconds=0.5), group)  # for the half hour that gloo gives
    training = Training(DistributedDataParallel(bare_model()), group, name="late")
    late_s = 1.0 if rank == 0 else 0.0
    for checkpoint in "ab":
        threading.Event().wait(late_s)
        assert (problem := training.save(checkpoint)) is None, problem
    threading.Event().wait(late_s)
    training.restore("a")
    dist.barrier()


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/meeting",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    exact(lambda: DistributedDataParallel(bare_model()), group, "ddp")
    exact(sharded, group, "fsdp")
    decided_together(group)
    left_out_together(group)
    waited_for()
    print("all fine", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
