"""What the reference loop needs of torch.distributed: the process group, DDP or FSDP2, and means over the ranks."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

Sharding: TypeAlias = Literal["ddp", "fsdp"]


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the launcher's job, if there is one, and leave it at the end; gives the device of this rank.

    NCCL moves the tensors of GPUs and gloo those of CPUs. A single process forms no group.
    """
    device = training_device()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield device
    # Not in a finally: a rank that raised must not wait here for collectives that its peers have not finished.
    dist.destroy_process_group()


def training_device() -> torch.device:
    """This rank's GPU, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def world() -> tuple[int, int]:
    """Rank and world size of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def distribute(model: nn.Module, sharding: Sharding, *, blocks: Iterable[nn.Module] = ()) -> nn.Module:
    """The model as all ranks train it together: replicated (DDP), or sharded block by block (FSDP2).

    A single process trains the model as it is. Raises `ValueError` for FSDP without a process group.
    """
    if not dist.is_initialized():
        if sharding == "fsdp":
            raise ValueError("FSDP shards a model over ranks and there is one only: start under torchrun, or use DDP")
        return model
    if sharding == "ddp":
        return DistributedDataParallel(model)
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def warm_reducer(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Run forward and backward twice and drop the gradients, so that DDP has its final buckets.

    DDP orders its buckets anew after the first step of a process. Other buckets sum in another order: on four ranks a
    resumed run would differ in the last bits from one that was never interrupted.
    """
    if isinstance(model, DistributedDataParallel):
        for _ in range(2):
            loss().backward()
        model.zero_grad(set_to_none=True)


def bare(model: nn.Module) -> nn.Module:
    """The module to call outside of training: without DDP, whose hooks have no business in an evaluation."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: gradients travel with the last one of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean over all ranks, the same to the bit on each of them. Changes `values`; no wait on a GPU."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
