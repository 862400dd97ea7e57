"""Retention while the run trains: rank 0 deletes, after each save, what its policy lets go, beside the training.

Whether a checkpoint is known good is the hub's to say: its detectors see every row. So with `healthy_steps` nothing is
deleted before the hub has all rows up to the save on disk, and its word on them has come; without a hub, nothing is.
"""

import contextlib
import logging
import os
import threading
import time
from pathlib import Path

from trainctl.trainer.checkpoint import CheckpointError, Progress, Retention, prune
from trainctl.trainer.core import Core
from trainctl.trainer.link import Link
from trainctl.wire.lineage import live_steps, read_branches
from trainctl.wire.messages import CheckpointRemoved
from trainctl.wire.removal import delete_hidden, hide
from trainctl.wire.rundir import RunDir

log = logging.getLogger(__name__)

_NICE = 19


class Pruner:
    """`saved` says that there is a new checkpoint, `tick` starts the work when it may begin; both for the sender."""

    def __init__(self, core: Core, policy: Retention) -> None:
        self._core = core
        self._policy = policy
        self._saved_at: int | None = None  # the step reached when the newest checkpoint became good
        self._told_at: int | None = None  # the record of the link that must be on disk first
        self._thread: threading.Thread | None = None

    def saved(self) -> None:
        """A checkpoint became good."""
        self._saved_at, self._told_at = self._core.boundary.completed, None

    def tick(self, link: Link | None) -> None:
        """Begin to delete, once it is known what may go. Call it after what was logged was handed to `link`."""
        if self._saved_at is None or (self._thread is not None and self._thread.is_alive()):
            return
        if self._policy.healthy_steps is not None:
            if link is None or not link.connected:
                self._told_at = None  # a hub that comes back first says what it knows
                return
            if self._told_at is None:
                self._told_at = link.newest
            if not link.on_disk(self._told_at):
                return
        step, self._saved_at = self._saved_at, None
        self._thread = threading.Thread(target=self._prune, args=(step,), name="trainctl-retention", daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float) -> None:
        """Wait a moment for what is being deleted; what is left of it is swept at the next start."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _prune(self, step: int) -> None:
        core, directory = self._core, RunDir(self._core.identity.directory)
        with contextlib.suppress(OSError):  # a thread of its own on Linux: hashing takes what training leaves
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        progress = Progress(step=step, troubles=list(core.troubles), live=live_steps(read_branches(directory)))
        try:
            protected = core.rollback_targets.ids()
            prune(directory.checkpoints, self._policy, progress=progress, protected=protected, removing=self._remove)
        except CheckpointError as error:
            core.complain("retention", f"{error}")
        except OSError as error:
            core.complain(
                "retention", f"old checkpoints stay: {error.filename or directory.checkpoints}: {error.strerror}"
            )

    def _remove(self, directory: Path, checkpoint_id: str) -> bool:
        """Delete one, unless a rollback or an operator was faster."""
        core = self._core
        with core.deleting:
            pinned = (directory / f"{checkpoint_id}.pinned").exists()
            if pinned or checkpoint_id in core.rollback_targets.ids() or not (directory / checkpoint_id).is_dir():
                return False
            hide(directory, checkpoint_id)
        size = sum(path.stat().st_size for path in (directory / f".{checkpoint_id}.gone").rglob("*") if path.is_file())
        delete_hidden(directory, checkpoint_id)
        self._tell(checkpoint_id, size)
        return True

    def _tell(self, checkpoint_id: str, size: int) -> None:
        core = self._core
        core.event(
            CheckpointRemoved(
                time=time.time(),
                step=core.boundary.completed,
                incarnation=core.incarnation,
                id=checkpoint_id,
                by="retention",
                bytes=size,
            )
        )
