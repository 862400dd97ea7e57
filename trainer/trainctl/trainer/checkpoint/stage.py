"""Host buffers that a save copies into: allocated and touched once, used again by every later save.

Touching fresh memory for the first time costs about twenty times the copy itself (bench/checkpoint_stall.py).
Tensors share slabs: pinning thousands of small ones would cost more than copying them.
"""

import contextlib
import mmap
from collections.abc import Mapping
from typing import TypeAlias

import torch

from trainctl.trainer.checkpoint.sharded import local_part, twin

# A power of two, because the allocator of pinned memory rounds up to one.
SLAB_BYTES = 256 * 1024 * 1024
_ALIGN = 64
# madvise(2), Linux 4.14; `mmap` has no name for it.
_MADV_WIPEONFORK = 18

Layout: TypeAlias = list[tuple[str, torch.Size, torch.dtype]]


class Buffers:
    """Host memory for one state of `layout`. Making it is slow: keep that off the training thread.

    `bytes` is what it takes. Raises MemoryError, OSError or RuntimeError where there is no memory to be had.
    """

    def __init__(self, layout: Layout, *, pinned: bool) -> None:
        self.layout = layout
        self.pinned = pinned
        places, slabs = _places(layout)
        self.bytes = _taken(slabs, pinned=pinned)
        memory = [_pinned(size) if pinned else _pages(size) for size in slabs]
        self._parts = [
            _part(memory[slab], start, dtype, shape)
            for (slab, start), (_name, shape, dtype) in zip(places, layout, strict=True)
        ]

    def stage(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of `tensors`, which have this layout; sharded ones as their local part, a device is waited for once.

        What the call before gave is overwritten.
        """
        parts = [local_part(tensor) for tensor in tensors.values()]
        on_cuda = any(part.is_cuda for part in parts)
        with torch.no_grad():
            for buffer, part in zip(self._parts, parts, strict=True):
                buffer.copy_(part, non_blocking=on_cuda)
        if on_cuda:
            torch.cuda.current_stream().synchronize()
        return {name: twin(tensor, part) for (name, tensor), part in zip(tensors.items(), self._parts, strict=True)}


def layout_of(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Name, local shape and dtype of every tensor, in order."""
    return [(name, local_part(tensor).shape, tensor.dtype) for name, tensor in tensors.items()]


def on_device(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether any of them lies on a CUDA device, which pinned memory is copied from three times as fast."""
    return any(tensor.is_cuda for tensor in tensors.values())


def bytes_for(layout: Layout, *, pinned: bool) -> int:
    """What `Buffers` of that layout would take."""
    return _taken(_places(layout)[1], pinned=pinned)


def _places(layout: Layout) -> tuple[list[tuple[int, int]], list[int]]:
    """Slab and offset of every tensor, and the sizes of the slabs."""
    slabs: list[int] = []
    places: list[tuple[int, int]] = []
    for _name, shape, dtype in layout:
        room = -(-shape.numel() * dtype.itemsize // _ALIGN) * _ALIGN
        if not slabs or slabs[-1] + room > SLAB_BYTES:
            slabs.append(0)
        places.append((len(slabs) - 1, slabs[-1]))
        slabs[-1] += room
    return places, slabs


def _taken(slabs: list[int], *, pinned: bool) -> int:
    if pinned:
        return sum(1 << (size - 1).bit_length() for size in slabs if size)
    return sum(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in slabs)


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).fill_(0)


def _pages(size: int) -> torch.Tensor:
    """Pages of our own, in huge ones where the kernel gives them, which are touched and copied into faster.

    A forked process (every DataLoader worker) has zeros there. Were the pages shared with it, the next save would have
    to break each of them, at many times the copy's cost, and hold all memory twice (bench/checkpoint_stall.py). Where
    the kernel refuses, that is what happens, and the states are the same.
    Not MADV_DONTFORK: a forked worker that frees its copy of this object would unmap what it has there instead.
    """
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    with contextlib.suppress(OSError):
        pages.madvise(_MADV_WIPEONFORK)
    # fill_, because fresh pages are only promised, and the first copy would pay for them.
    return torch.frombuffer(pages, dtype=torch.uint8).fill_(0)


def _part(slab: torch.Tensor, start: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """A tensor with a storage of its own that is just as large: one that is a view of a slab is copied when written."""
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(slab.numpy(), dtype=dtype, count=shape.numel(), offset=start).view(shape)
