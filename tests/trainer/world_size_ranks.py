"""One of four processes that are, one after another, jobs of 2, 1, 2 and 4 ranks: `world_size_ranks.py DIRECTORY RANK`.

Two ranks train with mixed precision and accumulation and save; each of the other jobs reads that into a model that was
made with other numbers, and rank 0 compares every tensor with what rank 0 of the first job had.
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from trainctl.trainer.checkpoint import Accessor, Checkpointer, Loaded, State
from trainctl.trainer.checkpoint.rng import capture_rng, restore_rng
from trainctl.trainer.feed import Feed
from trainctl.trainer.parallel import gradient_sync

SAMPLES, STEPS, ACCUMULATE = 48, 3, 3
directory, process = Path(sys.argv[1]), int(sys.argv[2])


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


def ddp(model: nn.Sequential, _ranks: int) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Sequential, ranks: int) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh, mp_policy=policy)  # type: ignore[call-overload]
    return fully_shard(model, mesh=mesh, mp_policy=policy)


class Job:
    """What one rank of a job of `ranks` has. Everything a rank keeps for itself differs between ranks on purpose."""

    def __init__(self, make: Callable[[nn.Sequential, int], nn.Module], rank: int, ranks: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.rank = rank
        bare = nn.Sequential(nn.Linear(6, 17), nn.LayerNorm(17), nn.Dropout(0.4), nn.Linear(17, 3))
        self.model = make(bare, ranks)
        torch.manual_seed(seed + rank)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0 / (1 + step + rank))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0 * (rank + 1), growth_interval=2)
        sampler: DistributedSampler[int] = DistributedSampler(Numbers(), num_replicas=ranks, rank=rank, seed=7)
        loader = DataLoader(Numbers(), batch_size=2, sampler=sampler)
        self.feed = Feed(loader, capture_rng=capture_rng, restore_rng=restore_rng, world_size=ranks)
        self.own: Any = {"rank": rank}
        self.counters: dict[str, Any] = {"step": 0, "rank": rank}
        self.tunables: dict[str, Any] = {"clip": 1.0 + rank}
        self.seen: list[int] = []
        self.checkpointer = Checkpointer(
            directory=directory / make.__name__,
            run_id="resized",
            rank=rank,
            world_size=ranks,
            group=dist.new_group(backend="gloo", timeout=timedelta(seconds=60)),
            state=State(
                models=[self.model],
                optimizers=[self.optimizer],
                schedulers=[self.scheduler],
                scaler=self.scaler,
                loader=self.feed,
                tracked={"own": Accessor(get=lambda: self.own, set=self._take)},
                tunables=self.tunables,
                counters=self.counters,
            ),
        )

    def _take(self, value: Any) -> None:
        self.own = value

    def train(self) -> None:
        for _ in range(STEPS):
            for micro in range(ACCUMULATE):
                self.seen += (batch := self.feed.next()).tolist()
                with gradient_sync(self.model, enabled=micro + 1 == ACCUMULATE):
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not isinstance(self.model, FSDPModule)):
                        loss = self.model(torch.randn(len(batch), 6)).float().pow(2).mean()
                    self.scaler.scale(loss / ACCUMULATE).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.counters["step"] += 1

    def restored(self) -> Loaded:
        loaded = self.checkpointer.load("three")
        self.checkpointer.commit(loaded)
        self.feed.reopen()
        loaded.restore_rng()
        return loaded

    def whole(self) -> dict[str, torch.Tensor]:
        """Every tensor of model and optimizer, whole; a collective."""
        bare = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        found: dict[str, torch.Tensor] = dict(bare.state_dict())
        for index, parameter in enumerate(self.model.parameters()):
            found |= {f"{index}.{name}": value for name, value in self.optimizer.state[parameter].items()}
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
            for name, value in found.items()
        }

    def alone(self) -> dict[str, Any]:
        """What each rank keeps for itself."""
        scheduler = {name: value for name, value in self.scheduler.state_dict().items() if name != "lr_lambdas"}
        parts = {"scheduler": scheduler, "scaler": self.scaler.state_dict(), "own": self.own}
        return parts | {"counters": dict(self.counters), "tunables": dict(self.tunables)}


def joined(ranks: int, name: str) -> bool:
    """Be a rank of a job of that many, if there are enough."""
    if process < ranks:
        meeting = f"file://{directory}/meeting-{name}"
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=meeting, rank=process, world_size=ranks, timeout=limit)
    return process < ranks


def write() -> None:
    for make in (ddp, fsdp):
        job = Job(make, process, 2, seed=1)
        job.train()
        pending = job.checkpointer.begin_save(id="three", step=STEPS, incarnation=1, attempt=1, metrics={})
        assert (error := pending.result(60).error) is None, error
        job.checkpointer.drain()
        whole, seen = job.whole(), [None, None]
        dist.all_gather_object(seen, job.seen)
        if process == 0:
            torch.save({"whole": whole, "alone": job.alone(), "seen": seen}, directory / f"{make.__name__}.pt")
    dist.destroy_process_group()


def read(ranks: int) -> None:
    for make in (ddp, fsdp):
        job = Job(make, process, ranks, seed=50)
        loaded = job.restored()
        first = torch.load(directory / f"{make.__name__}.pt", weights_only=True)
        whole = job.whole()
        assert whole.keys() == first["whole"].keys()
        different = [name for name, value in whole.items() if not torch.equal(value, first["whole"][name])]
        assert different == [], f"{make.__name__}, {ranks} ranks: {different}"
        if ranks == 2:
            assert loaded.notes == ()
            assert job.counters["rank"] == process, "every rank has its own again"
        else:
            # What differed between the ranks that wrote it is rank 0's now.
            assert job.alone() == first["alone"], job.alone()
            assert [note.split(":")[0].split(",")[0] for note in loaded.notes] == [
                f"written by 2 ranks and read by {ranks}",
                f"the data goes on at micro-batch {18 // ranks} of each of {ranks} rank{'s' * (ranks > 1)}",
                f"a step is made of {ranks} micro-batches for 2 before",
            ], loaded.notes
            assert (", after 9 of each of 2 ranks: 2 of all 18 are seen again;" in loaded.notes[1]) == (ranks == 4)
        rest_of_the_epoch(job, ranks, {sample for samples in first["seen"] for sample in samples})
    dist.destroy_process_group()


def rest_of_the_epoch(job: Job, ranks: int, seen: set[int]) -> None:
    """What is left of the epoch is what nobody had seen, but for what is seen again so that nothing is left out."""
    assert len(seen) == 36
    left: list[int] = []
    while job.feed.epoch == 0:
        epoch, batch = job.feed.epoch, job.feed.next().tolist()
        left += batch if job.feed.epoch == epoch else []
    everybody: list[Any] = [None] * ranks
    dist.all_gather_object(everybody, left)
    gathered = [sample for samples in everybody for sample in samples]
    assert set(gathered) | seen == set(range(SAMPLES))
    assert len(set(gathered) & seen) == (4 if ranks == 4 else 0), "two micro-batches of two samples"
    assert len(gathered) == len(set(gathered))


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    if joined(2, "write"):
        write()
    for ranks in (1, 2, 4):
        if joined(ranks, f"read-{ranks}"):
            read(ranks)
    print("all fine", flush=True)


if __name__ == "__main__":
    main()
