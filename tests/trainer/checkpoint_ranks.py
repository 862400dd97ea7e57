"""Run by test_checkpoint_ranks.py as one rank of two: `checkpoint_ranks.py DIRECTORY RANK WORLD_SIZE SCENARIO`."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import trainctl.trainer.checkpoint.load as loading
from trainctl.trainer.checkpoint import Accessor, Checkpointer, CheckpointError, State
from trainctl.trainer.checkpoint.capture import bare
from trainctl.wire import manifest
from trainctl.wire.manifest import list_checkpoints

directory, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def bare_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 17), nn.BatchNorm1d(17), nn.Dropout(0.4), nn.Linear(17, 3))


class Training:
    def __init__(self, model: nn.Module, group: Any, *, name: str) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.value: Any = rank
        self.generator = torch.Generator().manual_seed(rank)
        self.seen = torch.zeros(2 + rank)
        self.checkpointer = Checkpointer(
            directory=directory / name,
            run_id="test",
            rank=rank,
            world_size=world_size,
            group=group,
            state=State(
                models=[model],
                optimizers=[self.optimizer],
                tracked={
                    "value": Accessor(get=lambda: self.value, set=self._set),
                    "generator": Accessor(get=self.generator.get_state, set=self.generator.set_state),
                    "seen": Accessor(get=lambda: self.seen, set=self._set_seen),
                },
            ),
            memory_checkpoints=0,  # what is on disk is what is tested here
        )

    def _set(self, value: Any) -> None:
        self.value = value

    def _set_seen(self, seen: Any) -> None:
        self.seen = seen

    def own(self) -> list[list[float]]:
        """What no other rank has: statistics of its own batches, what it noted, what it will draw."""
        drawn = torch.rand(3, generator=torch.Generator().set_state(self.generator.get_state()))
        buffers = [full(buffer).reshape(-1) for buffer in bare(self.model).buffers()]
        return [tensor.tolist() for tensor in (*buffers, self.seen, drawn)]

    def run(self, steps: int) -> list[float]:
        self.seen = self.seen + rank + torch.rand(1, generator=self.generator)
        losses = []
        for _ in range(steps):
            loss = self.model(torch.randn(4, 6)).pow(2).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def save(self, checkpoint: str) -> str | None:
        pending = self.checkpointer.begin_save(id=checkpoint, step=2, incarnation=1, attempt=1, metrics={})
        result = pending.result(60)
        assert pending.done()
        return result.error

    def restore(self, checkpoint: str) -> tuple[str, ...]:
        loaded = self.checkpointer.load(checkpoint)
        self.checkpointer.commit(loaded)
        loaded.restore_rng()
        return loaded.notes


def wrapped_in_ddp() -> nn.Module:
    return DistributedDataParallel(bare_model())


def sharded() -> nn.Module:
    model = bare_model()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world_size,))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)  # type: ignore[call-overload]
    fully_shard(model, mesh=mesh)
    return model


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All ranks' parts. A collective for a sharded one."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def exact(make: Callable[[], nn.Module], group: Any, name: str) -> None:
    """Roll back in process twice, then resume into a model and an optimizer that never took a step."""
    training = Training(make(), group, name=name)
    torch.manual_seed(100 + rank)
    training.run(2)
    assert training.save("two") is None
    whole = {name: full(tensor) for name, tensor in bare(training.model).state_dict().items()}
    if rank == 0:
        torch.save(whole, directory / f"{name}-weights.pt")
    own = training.own()
    alike: list[Any] = [None] * world_size
    dist.all_gather_object(alike, own, group=group)
    differ = [mine != theirs for mine, theirs in zip(*alike, strict=True)]
    assert differ == [True, True, False, True, True], "each but the count of batches: else this shows nothing"
    expected = training.run(3)
    for _ in range(2):
        assert training.restore("two") == ()
        assert training.value == rank
        assert training.own() == own
        assert training.run(3) == expected
    fresh = Training(make(), group, name=name)
    if name == "ddp":  # its reducer rebuilds the buckets after the first step
        fresh.run(2)
    fresh.restore("two")
    assert fresh.own() == own
    assert fresh.run(3) == expected


def alike(group: Any, text: str | None) -> str:
    """The text, once all ranks have the same."""
    told: list[Any] = [None] * world_size
    dist.all_gather_object(told, text, group=group)
    assert len(set(told)) == 1, told
    return str(text)


def refused_where_rank_1_cannot_read(training: Training) -> str:
    """Why nobody loads, though every other rank has read its part; and that nothing was touched on any."""
    now = [parameter.detach().clone() for parameter in training.model.parameters()]
    intact = loading._read_tensors

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if rank == 1:
        loading._read_tensors = fails
    try:
        training.checkpointer.load("b")
    except CheckpointError as refused:
        problem = str(refused)
    finally:
        loading._read_tensors = intact
    assert all(torch.equal(p, old) for p, old in zip(training.model.parameters(), now, strict=True))
    assert list_checkpoints(training.checkpointer.directory)[-1].verified is True, "its files are as the manifest says"
    return problem


def refused_where_the_disk_of_rank_1_fails(training: Training) -> str:
    """Why nobody loads what rank 1 could not hash; and that nobody takes it for damaged."""
    intact = manifest._hash

    def fails(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if rank == 1:
        manifest._hash = fails
    try:
        training.checkpointer.load("b")
    except CheckpointError as refused:
        problem = str(refused)
    finally:
        manifest._hash = intact
    assert list_checkpoints(training.checkpointer.directory)[-1].verified is None
    return problem


def failures(group: Any) -> None:
    """One rank's trouble is everybody's, in the same words, and the next save works."""
    training = Training(wrapped_in_ddp(), group, name="failures")
    training.value = object() if rank == 1 else rank
    error = alike(group, training.save("a"))
    assert error.startswith("rank 1: tracked.value holds a builtins.object"), error
    training.value = rank
    if rank == 1:
        training.checkpointer.directory.joinpath(".b.stage", "rank-00001.pt").mkdir(parents=True)
    assert training.save("b") is None  # rank 0 begins with an empty stage
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    training.run(1)
    error = alike(group, refused_where_the_disk_of_rank_1_fails(training))
    assert error.startswith("rank 1: b/"), error
    assert "could not be read: Input/output error" in error, error
    error = alike(group, refused_where_rank_1_cannot_read(training))
    assert error.startswith("rank 1: checkpoint b cannot be read"), error
    assert "Input/output error" in error, error
    if rank == 0:
        damaged = training.checkpointer.directory / "b" / "rank-00001.pt"
        damaged.write_bytes(damaged.read_bytes()[:-1])
    dist.barrier(group=group)
    try:
        training.checkpointer.load("b")
    except CheckpointError as refused:
        error = alike(group, str(refused))
    assert "b/rank-00001.pt has" in error, error
    assert not all(torch.equal(p, old) for p, old in zip(training.model.parameters(), before, strict=True))


def lost(group: Any) -> None:
    """A rank dies while a checkpoint is verified: the other is told, by it and by every save, and nothing is blamed."""
    training = Training(wrapped_in_ddp(), group, name="lost")
    assert training.save("a") is None
    if rank == 1:
        loading.verify = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    try:
        training.checkpointer.load("a")
    except CheckpointError as refused:
        error = str(refused)
    assert "lost touch" in error, error
    assert list_checkpoints(training.checkpointer.directory)[0].verified is None, "nothing was found to be damaged"
    error = str(training.save("b"))
    assert "lost touch" in error, error
    assert [path.name for path in training.checkpointer.directory.iterdir()] == ["a"]


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
    exact(wrapped_in_ddp, group, "ddp")
    exact(sharded, group, "fsdp")
    failures(group)
    lost(group)
    print("all fine", flush=True)
    # Rank 1 is dead, so the groups cannot be taken down together.
    os._exit(0)


if __name__ == "__main__":
    main()
