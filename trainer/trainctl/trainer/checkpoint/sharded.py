"""Sharded tensors (DTensor) seen as this rank's part of them, and host twins that describe the same part."""

import torch
from torch.distributed.tensor import DTensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, or the tensor itself; it shares memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def twin(like: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`part` as the local part of a tensor sharded as `like` is; `part` itself where `like` is not sharded.

    The mesh may be of another device than `part`: checkpoint planners only read the layout from it, and
    `DTensor.from_local` would move the part to the mesh's device.
    """
    if not isinstance(like, DTensor):
        return part
    return DTensor(part, like._spec, requires_grad=False)


def copy_into(live: torch.Tensor, saved: torch.Tensor) -> None:
    """Overwrite `live` with `saved`, which has the same shape, dtype and layout. For use under `torch.no_grad()`."""
    local_part(live).copy_(local_part(saved))


def same_kind(live: object, saved: torch.Tensor) -> bool:
    """Whether `saved` fits into `live` as it is."""
    if not isinstance(live, torch.Tensor) or live.shape != saved.shape or live.dtype != saved.dtype:
        return False
    if type(saved) is torch.Tensor and type(live) is torch.Tensor:
        return True
    return isinstance(live, DTensor) == isinstance(saved, DTensor) and local_part(live).shape == local_part(saved).shape


def moved(saved: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy of `saved` whose local part lies on `device`."""
    return twin(saved, local_part(saved).to(device, copy=True))
