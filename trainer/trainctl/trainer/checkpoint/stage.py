"""Host buffers that a save copies into: allocated and touched once, used again by every later save.

Touching fresh memory for the first time costs about twenty times the copy itself (bench/checkpoint_stall.py).
Tensors share slabs: pinning thousands of small ones would cost more than copying them.
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch

from trainctl.trainer.checkpoint.sharded import local_part, twin

# A power of two, because the allocator of pinned memory rounds up to one.
SLAB_BYTES = 256 * 1024 * 1024
_ALIGN = 64

_Layout: TypeAlias = list[tuple[str, torch.Size, torch.dtype]]


class Stager:
    """Copies tensors to the host. One user at a time: what `stage` gave is overwritten by the next call."""

    def __init__(self) -> None:
        self._layout: _Layout = []
        self._buffers: list[torch.Tensor] = []

    def prepare(self, layout: _Layout, *, pinned: bool) -> None:
        """Allocate and touch the buffers for `layout`, unless they are there. Slow: keep it off the training thread."""
        if layout == self._layout:
            return
        self._layout, self._buffers = [], []  # free first: two sets may not fit
        self._buffers = _allocate(layout, pinned=pinned)
        self._layout = layout

    def stage(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of `tensors` in host memory, sharded ones as their local part; the device is waited for once."""
        parts = [local_part(tensor) for tensor in tensors.values()]
        on_cuda = any(part.is_cuda for part in parts)
        self.prepare(layout_of(tensors), pinned=on_cuda)
        with torch.no_grad():
            for buffer, part in zip(self._buffers, parts, strict=True):
                buffer.copy_(part, non_blocking=on_cuda)
        if on_cuda:
            torch.cuda.current_stream().synchronize()
        return {
            name: twin(tensor, buffer) for (name, tensor), buffer in zip(tensors.items(), self._buffers, strict=True)
        }


def layout_of(tensors: Mapping[str, torch.Tensor]) -> _Layout:
    """Name, local shape and dtype of every tensor, in order."""
    return [(name, local_part(tensor).shape, tensor.dtype) for name, tensor in tensors.items()]


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """What the local parts take in memory."""
    return sum(local_part(tensor).numel() * tensor.element_size() for tensor in tensors.values())


def _allocate(layout: _Layout, *, pinned: bool) -> list[torch.Tensor]:
    sizes = [shape.numel() * dtype.itemsize for _name, shape, dtype in layout]
    slabs: list[int] = []
    places: list[tuple[int, int]] = []
    for size in sizes:
        room = -(-size // _ALIGN) * _ALIGN
        if not slabs or slabs[-1] + room > SLAB_BYTES:
            slabs.append(0)
        places.append((len(slabs) - 1, slabs[-1]))
        slabs[-1] += room
    # fill_ and not zeros: fresh zero pages are only promised, and the first copy would pay for them.
    memory = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned).fill_(0) for size in slabs]
    return [
        memory[slab][start : start + size].view(dtype).view(shape)
        for (slab, start), size, (_name, shape, dtype) in zip(places, sizes, layout, strict=True)
    ]
