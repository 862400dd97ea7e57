"""The memory tier: the newest states of a run in host memory, in the very buffers that saves stage into.

A save claims a slot, copies the state into it, and the background writes the slot to disk. Afterwards the slot keeps
the state until a later save needs the room: nothing is copied twice. Each rank keeps its own part, within a budget.

Never more than the budget is held, except that one slot always is: without it nothing can be saved.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainctl.trainer.checkpoint.stage import Buffers, Layout, bytes_for

if TYPE_CHECKING:
    from trainctl.trainer.checkpoint.save import Snapshot


class Slot:
    """Buffers and the state in them. `busy` from its claim to its release; `number` grows with every claim."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self.state: Snapshot | None = None
        self.busy = False
        self.number = 0


class MemoryTier:
    """A ring of at most `keep` slots within `budget(held bytes)` bytes; safe to use from several threads.

    With `keep` 0 there is one slot, which forgets its state as soon as that is written.
    """

    def __init__(self, *, keep: int, budget: Callable[[int], int]) -> None:
        self._keep = keep
        self._budget = budget
        self._lock = threading.Lock()
        self._slots: list[Slot] = []
        self._making_bytes = 0
        self._making = 0
        self._claims = 0
        self._newest: Layout = []

    @property
    def held_bytes(self) -> int:
        """What all slots take."""
        with self._lock:
            return self._held(self._slots)

    @property
    def ids(self) -> list[str]:
        """The checkpoints whose state is here, oldest first."""
        with self._lock:
            return [slot.state.id for slot in sorted(self._slots, key=_age) if slot.state is not None]

    @property
    def full(self) -> bool:
        """Whether every slot for a state such as the newest is being written, so that another one has to wait."""
        with self._lock:
            fitting = self._fitting(self._newest)
            return bool(fitting) and all(slot.busy for slot in fitting)

    def find(self, checkpoint_id: str) -> Slot | None:
        """The slot that has the state of a checkpoint."""
        with self._lock:
            return next((slot for slot in self._slots if slot.state and slot.state.id == checkpoint_id), None)

    def claim(self, layout: Layout, *, pinned: bool, make: bool) -> Slot | None:
        """A slot for a new state: an empty one, else that of the oldest state. None while all are being written.

        One is made, which is slow, where no slot has room for this layout; with `make` also where all that have are
        being written and number and budget allow another: a write may hang, and this cannot. Raises what `Buffers`
        raises.
        """
        with self._lock:
            self._newest = layout
            fitting = self._fitting(layout)
            slot = self._take(fitting, layout)
            if slot is not None or (fitting and not make):
                return slot
            size = bytes_for(layout, pinned=pinned)
            rest = self._room_for(size, layout)
            if rest is None:
                return None
            self._slots = rest
            self._reserve(size)
        self._make(layout, size, pinned=pinned)
        with self._lock:
            return self._take(self._fitting(layout), layout)

    def release(self, slot: Slot, *, keep: bool) -> None:
        """The slot's state is written, or will never be; `keep` says whether it may be rolled back to."""
        with self._lock:
            if not (keep and self._keep):
                slot.state, slot.number = None, 0
            slot.busy = False

    def grow(self, layout: Layout, *, pinned: bool, empty: int = 1) -> bool:
        """Make one more slot where number and budget allow it and fewer than `empty` are empty; whether it did.

        Slow: keep it off the training thread. Of the states it throws away none but those in slots that have no room
        for this layout: no save would claim them, and the newest states would be fewer for ever.
        """
        size = bytes_for(layout, pinned=pinned)
        with self._lock:
            waiting = [slot for slot in self._fitting(layout) if slot.state is None and not slot.busy]
            rest = self._room_for(size, layout) if len(waiting) < empty else None
            if rest is None:
                return False
            self._slots = rest
            self._reserve(size)
        self._make(layout, size, pinned=pinned)
        return True

    def _fitting(self, layout: Layout) -> list[Slot]:
        return [slot for slot in self._slots if slot.buffers.fits(layout)]

    def _room_for(self, size: int, layout: Layout) -> list[Slot] | None:
        """The slots that stay where one more of `size` is made for `layout`; None where there cannot be one more."""
        fitting = self._fitting(layout)
        others = [slot for slot in self._slots if slot not in fitting and not slot.busy]
        rest = [slot for slot in self._slots if slot not in others or slot.state is not None]
        for slot in sorted((slot for slot in others if slot.state is not None), key=_age):
            if self._fits(size, rest):
                break
            rest.remove(slot)
        return rest if self._fits(size, rest) else None

    def _take(self, slots: list[Slot], layout: Layout) -> Slot | None:
        idle = [slot for slot in slots if not slot.busy]
        if not idle:
            return None
        slot = min(idle, key=_age)
        self._claims += 1
        slot.state, slot.busy, slot.number = None, True, self._claims
        slot.buffers.lay_out(layout)
        return slot

    def _held(self, slots: list[Slot]) -> int:
        return sum(slot.buffers.bytes for slot in slots) + self._making_bytes

    def _fits(self, size: int, slots: list[Slot]) -> bool:
        if not slots and not self._making:
            return True
        held = self._held(slots)
        return len(slots) + self._making < max(1, self._keep) and held + size <= self._budget(held)

    def _reserve(self, size: int) -> None:
        self._making += 1
        self._making_bytes += size

    def _make(self, layout: Layout, size: int, *, pinned: bool) -> None:
        made: list[Slot] = []
        try:
            made.append(Slot(Buffers(layout, pinned=pinned)))
        finally:
            with self._lock:
                self._making -= 1
                self._making_bytes -= size
                self._slots += made


def _age(slot: Slot) -> int:
    return slot.number
