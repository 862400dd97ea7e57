"""The checkpoints of one run, as a rank sees them: save, load, commit."""

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainctl.trainer.checkpoint.apart import may_differ
from trainctl.trainer.checkpoint.background import Background, Pace
from trainctl.trainer.checkpoint.budget import fixed_budget, shared_budget
from trainctl.trainer.checkpoint.capture import capture_rank, capture_shared
from trainctl.trainer.checkpoint.errors import CheckpointError
from trainctl.trainer.checkpoint.load import Loaded, read
from trainctl.trainer.checkpoint.memory_tier import MemoryTier, Slot
from trainctl.trainer.checkpoint.ranks import Ranks
from trainctl.trainer.checkpoint.recall import recall
from trainctl.trainer.checkpoint.restore import commit
from trainctl.trainer.checkpoint.retention import sweep
from trainctl.trainer.checkpoint.save import PendingSave, Snapshot, Taken, Writing, stage_script, write
from trainctl.trainer.checkpoint.stage import Layout, layout_of, on_device
from trainctl.trainer.checkpoint.state import State
from trainctl.wire.messages import BestBy, CheckpointInfo
from trainctl.wire.rundir import RUN_ID

MEMORY_CHECKPOINTS = 3
_NOTE = 200
_LEFT_OUT = (
    "left out: the one before it is still being written, and there is no further buffer in host memory to copy this "
    "one to. Save less often, or give Run.attach a larger memory_budget; training did not wait"
)


class Checkpointer:
    """Takes and restores the state of a run; every method is for the main thread at a boundary.

    `memory_checkpoints` states stay in host memory, within `memory_budget` bytes on this rank (None: its share of what
    is free on the node, which `local_ranks` ranks divide among them); 0 keeps none but the one that is being written.
    Where the script saves its own files none is kept: what is in them is on disk alone. `best_by` says by which metric
    the best of those in memory is found.

    `directory` is the run's `checkpoints` directory, `group` a gloo group that nobody else uses (None for one rank).
    What a crash left half-written is removed when rank 0 makes its own. Raises ValueError without a group for ranks.
    """

    def __init__(
        self,
        *,
        directory: Path,
        run_id: str,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup | None,
        state: State,
        memory_checkpoints: int = MEMORY_CHECKPOINTS,
        memory_budget: int | None = None,
        local_ranks: int = 1,
        best_by: BestBy | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.state = state
        self._run_id = run_id
        self._ranks = Ranks(rank=rank, world_size=world_size, group=group)
        budget = shared_budget(local_ranks) if memory_budget is None else fixed_budget(memory_budget)
        self._tier = MemoryTier(keep=memory_checkpoints if state.script is None else 0, budget=budget)
        best_metric = best_by.metric if best_by is not None else None
        self._telling = frozenset({"val_loss", "loss"} if best_metric is None else {"val_loss", "loss", best_metric})
        self._in_memory: list[CheckpointInfo] = []
        self._pace = Pace()
        self._background = Background(self._pace)
        self._warmed: threading.Event | None = None
        self._pending: deque[PendingSave] = deque()  # in the order in which they end
        if self._ranks.first:
            sweep(self.directory)

    def warm(self) -> bool:
        """Make the staging buffers in the background, so that saves do not pay for it: the one that the first save
        takes, and one for a save that begins while that is being written.

        The optimizers' state exists after their first step: call it then. False where one has none yet, which never has
        any or skipped the step (a GradScaler's first ones overflow): call it again after the next step.
        """
        stepped = all(optimizer.state for optimizer in self.state.optimizers)
        if self._warmed is not None and not stepped:
            return False
        tensors = capture_shared(self.state).tensors
        layout, pinned = layout_of(tensors), on_device(tensors)
        warmed = self._warmed = threading.Event()

        def make() -> None:
            try:
                self._grow(layout, pinned=pinned)
            finally:
                warmed.set()
            self._grow(layout, pinned=pinned, empty=2)

        self._background.put(make)
        return stepped

    @property
    def memory_bytes(self) -> int:
        """Host memory of this rank that holds states: buffers for saves and the memory tier, which are the same."""
        return self._tier.held_bytes

    @property
    def in_memory(self) -> list[CheckpointInfo]:
        """The states that every rank had in host memory when the newest save began to be written, oldest first."""
        ids = self._tier.ids
        return [info for info in self._in_memory if info.id in ids]

    @property
    def full(self) -> bool:
        """Whether a save that began now would have to wait for one that is being written."""
        return self._tier.full

    def begin_save(
        self,
        *,
        id: str,  # noqa: A002 - the field's word
        step: int,
        incarnation: int,
        attempt: int,
        metrics: Mapping[str, float],
        note: str | None = None,
        may_leave_out: bool = False,
    ) -> PendingSave:
        """Copy the state into host buffers and write it in the background, after those that are not written yet.

        Call it on every rank. Where every buffer is still being written, `may_leave_out` leaves this save out, told by
        its result, and without it the oldest write is waited for, as part of the stall. So is every write where the
        script saves its own files, which the ranks do together. Whatever fails, a state that is not data or a full
        disk, is told by the result, on all ranks alike. Raises ValueError for an id that is no file name.
        """
        _check_id(id)
        started = time.perf_counter()
        problem = self._stage_script(id) if self.state.script is not None else None
        slot, staged = self._staged(may_leave_out=may_leave_out) if problem is None else (None, problem)
        snapshot = Snapshot(
            id=id,
            run_id=self._run_id,
            step=step,
            incarnation=incarnation,
            attempt=attempt,
            # JSON has no NaN, and a checkpoint is never the best by one.
            metrics={name: float(value) for name, value in metrics.items() if math.isfinite(value)},
            note=note,
            **staged,
        )
        if slot is not None and self.state.script is None:
            slot.state = snapshot
        pending = PendingSave(
            id=id,
            stall_s=time.perf_counter() - started,
            write=lambda: self._write(snapshot, slot),
            background=self._background,
            pace=self._pace,
        )
        self._unfinished().append(pending)
        if slot is not None:
            layout, pinned = slot.buffers.layout, slot.buffers.pinned
            self._background.put(lambda: self._grow(layout, pinned=pinned))
        return pending

    def _stage_script(self, checkpoint_id: str) -> dict[str, Any] | None:
        """Have the script write its files on every rank; what all ranks know then, where it failed."""
        assert self.state.script is not None
        self._settle()  # a write in the background talks over the same group: the ranks would wait for one another
        try:
            stage_script(self.directory, checkpoint_id, self.state.script, self._ranks)
        except CheckpointError as error:
            return {"problem": str(error), "agreed": True}
        return None

    def _write(self, snapshot: Snapshot, slot: Slot | None) -> int:
        """Write what was staged, and leave it in memory where every rank has it, whatever becomes of the files."""
        everywhere = False

        def taken(found: Taken) -> None:
            nonlocal everywhere
            everywhere = True
            known = {info.id: info for info in [*self._in_memory, _info(snapshot, found.bytes, self._telling)]}
            self._in_memory = [known[name] for name in found.in_memory if name in known]

        try:
            writing = Writing(pace=self._pace, held=lambda: self._tier.ids, taken=taken)
            return write(self.directory, snapshot, self._ranks, writing)
        finally:
            if slot is not None:
                self._tier.release(slot, keep=everywhere)

    def _grow(self, layout: Layout, *, pinned: bool, empty: int = 1) -> None:
        # Without the memory fewer states stay, which `memory_bytes` shows, and a save that needs it will tell.
        with contextlib.suppress(MemoryError, OSError, RuntimeError):
            self._tier.grow(layout, pinned=pinned, empty=empty)

    def _staged(self, *, may_leave_out: bool) -> tuple[Slot | None, dict[str, Any]]:
        """A slot with a copy of the state, and the state; without a slot the problem that all ranks are to hear of."""
        slot: Slot | None = None
        try:
            if self.state.overrides is not None:
                self.state.overrides.heal()
            shared = capture_shared(self.state)
            own = capture_rank(self.state)
            apart = may_differ(self.state, shared.tensors) if self._ranks.world_size > 1 else frozenset()
            slot = self._claim(shared.tensors, wait=not may_leave_out)
            if slot is None:
                return None, {"problem": _LEFT_OUT}
            tensors = slot.buffers.stage(shared.tensors)
        except CheckpointError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001 - a state_dict of the user's may raise anything; all ranks are told
            problem = f"the state cannot be taken: {type(error).__name__}: {error}"
        else:
            staged = self.state.script is not None
            parts = {"tensors": tensors, "shared": shared.nodes, "own": own.nodes}
            return slot, {**parts, "may_differ": apart, "staged": staged}
        if slot is not None:
            self._tier.release(slot, keep=False)
        return None, {"problem": problem}

    def _claim(self, tensors: Mapping[str, torch.Tensor], *, wait: bool) -> Slot | None:
        if self._warmed is not None:
            with self._pace.hurried():
                self._warmed.wait()  # never a second set beside one that is being made
        layout, pinned = layout_of(tensors), on_device(tensors)
        while (slot := self._tier.claim(layout, pinned=pinned, make=wait)) is None and wait:
            unfinished = self._unfinished()
            if not unfinished:
                raise CheckpointError("there is no memory to copy the state to: training goes on")
            unfinished[0].result()
        return slot

    def _unfinished(self) -> deque[PendingSave]:
        while self._pending and self._pending[0].done():
            self._pending.popleft()
        return self._pending

    def load(self, id: str) -> Loaded:  # noqa: A002 - the field's word
        """Find a checkpoint in memory, where every rank has it there, else verify it on disk and read it from there.

        Call it on every rank. Nothing live is touched. Saves that still run are waited for. Raises CheckpointError, the
        same on every rank, naming the file or the part that is wrong; ValueError for an id that is no file name.
        """
        _check_id(id)
        self._settle()
        live = self._ranks.together("the state cannot be taken", lambda: capture_shared(self.state))
        slot = self._tier.find(id)
        having = self._ranks.gather(slot is not None)
        if slot is not None and all(having):
            found, size = slot, self._ranks.world_size
            return self._ranks.together(
                f"checkpoint {id} cannot be taken from memory",
                lambda: recall(found, world_size=size, state=self.state, live=live),
            )
        try:
            return read(self.directory, id, ranks=self._ranks, state=self.state, live=live)
        except CheckpointError as error:
            if not any(having):
                raise
            missing = ", ".join(str(rank) for rank, has in enumerate(having) if not has)
            raise CheckpointError(f"{error}; in memory it is not on rank {missing}") from None

    def commit(self, loaded: Loaded, *, restore_overrides: bool = True) -> None:
        """Copy a loaded checkpoint into the live state. No collective, nothing to verify: assignment only.

        Where the script loads its own files, its `load` is called: that is more than assignment, and what it raises
        passes through.
        `restore_overrides=False` leaves the operator's overrides and the tunables as they are now. Afterwards make the
        data iterator anew, then call `loaded.restore_rng()`. Raises CheckpointError, before anything is touched, for
        one from memory that a later save has overwritten.
        """
        if not loaded.whole():
            raise CheckpointError(f"checkpoint {loaded.id} was overwritten in memory by a later save: load it again")
        if self.state.overrides is not None:
            self.state.overrides.heal()
        if loaded.script is not None and self.state.script is not None:
            self.state.script.load(loaded.script)
        commit(self.state, loaded, restore_overrides=restore_overrides)

    def drain(self, timeout_s: float | None = None) -> None:
        """Wait until nothing runs in the background. Raises TimeoutError; what runs goes on."""
        self._background.join(timeout_s)

    def _settle(self) -> None:
        """Wait for the saves that are not written yet; making room for later ones goes on."""
        for pending in list(self._unfinished()):
            pending.result()


def _info(snapshot: Snapshot, size: int, telling: Collection[str]) -> CheckpointInfo:
    """It goes with every heartbeat, so of the metrics only those that tell which is the best."""
    return CheckpointInfo(
        id=snapshot.id,
        step=snapshot.step,
        time=snapshot.time,
        bytes=size,
        incarnation=snapshot.incarnation,
        metrics={name: value for name, value in snapshot.metrics.items() if name in telling},
        where="memory",
        note=snapshot.note[:_NOTE] if snapshot.note is not None else None,
        in_memory=True,
    )


def _check_id(checkpoint_id: str) -> None:
    if not RUN_ID.match(checkpoint_id):
        raise ValueError(f"{checkpoint_id!r} is no checkpoint id: letters, digits, '.', '_' and '-', at most 48")
