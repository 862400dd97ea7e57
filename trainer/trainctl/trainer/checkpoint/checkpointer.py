"""The checkpoints of one run, as a rank sees them: save, load, commit."""

import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainctl.trainer.checkpoint.capture import capture_rank, capture_shared
from trainctl.trainer.checkpoint.errors import CheckpointError
from trainctl.trainer.checkpoint.load import Loaded, read
from trainctl.trainer.checkpoint.ranks import Ranks
from trainctl.trainer.checkpoint.restore import commit
from trainctl.trainer.checkpoint.retention import sweep
from trainctl.trainer.checkpoint.save import PendingSave, Snapshot, stage_script, write
from trainctl.trainer.checkpoint.stage import Stager, layout_of
from trainctl.trainer.checkpoint.state import State
from trainctl.wire.rundir import RUN_ID


class Checkpointer:
    """Takes and restores the state of a run; every method is for the main thread at a boundary.

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
    ) -> None:
        self.directory = Path(directory)
        self.state = state
        self._run_id = run_id
        self._ranks = Ranks(rank=rank, world_size=world_size, group=group)
        self._stager = Stager()
        self._warming: threading.Thread | None = None
        self._pending: PendingSave | None = None
        if self._ranks.first:
            sweep(self.directory)

    def warm(self) -> None:
        """Allocate and touch the staging buffers in the background, so that the first save does not pay for it.

        The optimizer's state exists after the first step: call it then.
        """
        if self._warming is None and self._pending is None:
            tensors = capture_shared(self.state).tensors
            layout, pinned = layout_of(tensors), any(tensor.is_cuda for tensor in tensors.values())
            self._warming = threading.Thread(
                target=lambda: self._stager.prepare(layout, pinned=pinned), name="trainctl-warm", daemon=True
            )
            self._warming.start()

    def begin_save(
        self,
        *,
        id: str,  # noqa: A002 - the field's word
        step: int,
        incarnation: int,
        attempt: int,
        metrics: Mapping[str, float],
        note: str | None = None,
    ) -> PendingSave:
        """Copy the state into host buffers and write it in the background; call it on every rank.

        A save that still runs is waited for, as part of the stall. Whatever fails, a state that is not data or a full
        disk, is told by the result, on all ranks alike. Raises ValueError for an id that is no file name.
        """
        _check_id(id)
        started = time.perf_counter()
        self.drain()
        snapshot = Snapshot(
            id=id,
            run_id=self._run_id,
            step=step,
            incarnation=incarnation,
            attempt=attempt,
            # JSON has no NaN, and a checkpoint is never the best by one.
            metrics={name: float(value) for name, value in metrics.items() if math.isfinite(value)},
            note=note,
            **self._staged(id),
        )
        self._pending = PendingSave(
            id=id,
            stall_s=time.perf_counter() - started,
            write=lambda: write(self.directory, snapshot, self._ranks),
        )
        return self._pending

    def _staged(self, checkpoint_id: str) -> dict[str, Any]:
        if self.state.script is not None:
            try:
                stage_script(self.directory, checkpoint_id, self.state.script, self._ranks)
            except CheckpointError as error:
                return {"problem": str(error), "agreed": True}
        try:
            if self.state.overrides is not None:
                self.state.overrides.heal()
            shared = capture_shared(self.state)
            return {
                "tensors": self._stager.stage(shared.tensors),
                "shared": shared.nodes,
                "own": capture_rank(self.state).nodes,
                "staged": self.state.script is not None,
            }
        except CheckpointError as error:
            return {"problem": str(error)}
        except Exception as error:  # noqa: BLE001 - a state_dict of the user's may raise anything; all ranks are told
            return {"problem": f"the state cannot be taken: {type(error).__name__}: {error}"}

    def load(self, id: str) -> Loaded:  # noqa: A002 - the field's word
        """Verify a checkpoint and read it into new host memory; call it on every rank. Nothing live is touched.

        A save that still runs is waited for. Raises CheckpointError, the same on every rank, naming the file or the
        part that is wrong; ValueError for an id that is no file name.
        """
        _check_id(id)
        self.drain()
        live = self._ranks.together("the state cannot be taken", lambda: capture_shared(self.state))
        return read(self.directory, id, ranks=self._ranks, state=self.state, live=live)

    def commit(self, loaded: Loaded, *, restore_overrides: bool = True, script: bool = True) -> None:
        """Copy a loaded checkpoint into the live state. No collective, nothing to verify: assignment only.

        Where the script loads its own files, its `load` is called, unless `script` is false: that is more than
        assignment, and what it raises passes through.
        `restore_overrides=False` leaves the operator's overrides and the tunables as they are now. Afterwards make the
        data iterator anew, then call `loaded.restore_rng()`.
        """
        if self.state.overrides is not None:
            self.state.overrides.heal()
        if script and loaded.script is not None and self.state.script is not None:
            self.state.script.load(loaded.script)
        devices = {name: tensor.device for name, tensor in capture_shared(self.state).tensors.items()}
        commit(self.state, loaded, devices=devices, restore_overrides=restore_overrides)

    def drain(self, timeout_s: float | None = None) -> None:
        """Wait for what runs in the background. Raises TimeoutError; what runs goes on."""
        if self._warming is not None:
            self._warming.join(timeout_s)
            if self._warming.is_alive():
                raise TimeoutError("the staging buffers are still being made")
            self._warming = None
        if self._pending is not None:
            self._pending.result(timeout_s)


def _check_id(checkpoint_id: str) -> None:
    if not RUN_ID.match(checkpoint_id):
        raise ValueError(f"{checkpoint_id!r} is no checkpoint id: letters, digits, '.', '_' and '-', at most 48")
