"""Host buffers that a save copies into: allocated and touched once, used again by every later save.

Touching fresh memory for the first time costs about twenty times the copy itself (bench/checkpoint_stall.py).
Tensors share slabs: pinning thousands of small ones would cost more than copying them.
"""

import contextlib
import mmap
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn

from trainctl.trainer.checkpoint.sharded import local_part, twin

# A power of two, because the allocator of pinned memory rounds up to one.
SLAB_BYTES = 256 * 1024 * 1024
_ALIGN = 64
# madvise(2), Linux 4.14; `mmap` has no name for it.
_MADV_WIPEONFORK = 18
# What a tracked tensor may grow by, a history of losses say, before there have to be new buffers.
_SPARE_BYTES = 64 * 1024
_SPARE_PART = 64

_PLAIN = frozenset({torch.Tensor, nn.Parameter})

Layout: TypeAlias = list[tuple[str, torch.Size, torch.dtype]]
_Place: TypeAlias = tuple[int, int, torch.Size, torch.dtype]  # slab, offset, and what lies there


class Buffers:
    """Host memory for one state of `layout`, and for any that fits in its place. Making it is slow: keep that off the
    training thread.

    `bytes` is what it takes. Raises MemoryError, OSError or RuntimeError where there is no memory to be had.
    """

    def __init__(self, layout: Layout, *, pinned: bool) -> None:
        self.pinned = pinned
        self._sizes = _slabs(layout, pinned=pinned)
        self.bytes = sum(self._sizes)
        self._memory = [_pinned(size) if pinned else _pages(size) for size in self._sizes]
        self.layout: Layout = []
        self._places: list[_Place] = []
        self._parts: list[torch.Tensor] = []
        self.lay_out(layout)

    def fits(self, layout: Layout) -> bool:
        """Whether a state of `layout` has room here, as one has whose tracked tensors have grown a little."""
        return layout == self.layout or _places(layout, self._sizes) is not None

    def lay_out(self, layout: Layout) -> None:
        """Be for a state of `layout`, which `fits`. What the calls of `stage` before gave is as good as overwritten."""
        if layout == self.layout:
            return
        places = _places(layout, self._sizes)
        assert places is not None
        before = dict(zip(self._places, self._parts, strict=True))
        self._parts = [before[place] if place in before else self._part(*place) for place in places]
        self.layout, self._places = layout, places

    def _part(self, slab: int, start: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return _part(self._memory[slab], start, dtype, shape)

    def stage(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of `tensors`, which have this layout; sharded ones as their local part, a device is waited for once.

        What the call before gave is overwritten.
        """
        parts = [local_part(tensor) for tensor in tensors.values()]
        on_cuda = any(part.is_cuda for part in parts)
        with torch.no_grad():
            _copy(self._parts, parts, non_blocking=on_cuda)
        if on_cuda:
            torch.cuda.current_stream().synchronize()
        return {name: twin(tensor, part) for (name, tensor), part in zip(tensors.items(), self._parts, strict=True)}


def _copy(buffers: Sequence[torch.Tensor], parts: Sequence[torch.Tensor], *, non_blocking: bool) -> None:
    """Thousands of small ones in one call. A subclass, a quantised optimizer's state, need not know that call."""
    plain: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for buffer, part in zip(buffers, parts, strict=True):
        if type(part) in _PLAIN:
            plain[0].append(buffer)
            plain[1].append(part)
        else:
            buffer.copy_(part, non_blocking=non_blocking)
    if plain[0]:
        torch._foreach_copy_(*plain, non_blocking=non_blocking)


def layout_of(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Name, local shape and dtype of every tensor, in order."""
    return [(name, local_part(tensor).shape, tensor.dtype) for name, tensor in tensors.items()]


def on_device(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether any of them lies on a CUDA device, which pinned memory is copied from three times as fast."""
    return any(tensor.is_cuda for tensor in tensors.values())


def bytes_for(layout: Layout, *, pinned: bool) -> int:
    """What `Buffers` of that layout would take."""
    return sum(_slabs(layout, pinned=pinned))


def _room(shape: torch.Size, dtype: torch.dtype) -> int:
    return -(-shape.numel() * dtype.itemsize // _ALIGN) * _ALIGN


def _slabs(layout: Layout, *, pinned: bool) -> list[int]:
    """The sizes of the slabs for a state of `layout`, with some room for it to grow."""
    slabs = [0]
    for room in sorted((_room(shape, dtype) for _name, shape, dtype in layout), reverse=True):
        if slabs[-1] and slabs[-1] + room > SLAB_BYTES:
            slabs.append(0)
        slabs[-1] += room
    spare = max(_SPARE_BYTES, sum(slabs) // _SPARE_PART)
    if not pinned:
        slabs[-1] += spare
        return [-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in slabs]
    taken = [_power_of_two(size) for size in slabs if size]
    return taken if taken and taken[-1] - slabs[-1] >= spare else [*taken, _power_of_two(spare)]


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _places(layout: Layout, slabs: list[int]) -> list[_Place] | None:
    """Where every tensor lies, the large ones first, so that a small one that grows moves few; None: no room."""
    places: dict[int, _Place] = {}
    rooms = [_room(shape, dtype) for _name, shape, dtype in layout]
    slab = start = 0
    for index in sorted(range(len(layout)), key=lambda index: -rooms[index]):
        while slab < len(slabs) and start + rooms[index] > slabs[slab]:
            slab, start = slab + 1, 0
        if slab == len(slabs):
            return None
        _name, shape, dtype = layout[index]
        places[index] = (slab, start, shape, dtype)
        start += rooms[index]
    return [places[index] for index in range(len(layout))]


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
