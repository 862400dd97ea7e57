"""Commands that are better proposed once a save that runs is written: till then training goes on, and others pass."""

import contextlib
import threading

from trainctl.trainer.core import Core, RunningSave
from trainctl.trainer.rollback_target import target_of
from trainctl.wire.commands import FINAL_COMMAND_STATES, CheckpointSave, Command, Rollback
from trainctl.wire.messages import CommandUpdate


class _Waiting:
    """A rollback that came while a save ran. Its target is looked up in a thread, for the disk may hang."""

    def __init__(self, core: Core, command: Command, action: Rollback, save: RunningSave) -> None:
        self._core, self._save = core, save
        self._found: str | None = None
        self._thread = threading.Thread(
            target=self._find, args=(command.id, action), name="trainctl-target", daemon=True
        )
        self._thread.start()

    def _find(self, command_id: str, action: Rollback) -> None:
        with contextlib.suppress(OSError):  # told where it is prepared
            self._found = target_of(self._core, command_id, action)

    @property
    def over(self) -> bool:
        """Whether it can be proposed, or refused at once for want of a target."""
        return not self._thread.is_alive() and (self._found is None or self._save.pending.done())


class SavesFirst:
    """Asked again and again for each command in rank 0's queue, by its leader, whose outcomes it hears.

    A save that began now would hold training up where every buffer is still being written. So would a rollback, which
    every rank prepares once its writes are done: a disk that hangs would hold the run for as long as it does so. One
    save is waited for, the newest of when the rollback came, because there may always be one where the disk is slower
    than the interval. One that is queued can be cancelled, expires, and makes way for a stop.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._waiting: dict[str, _Waiting | None] = {}  # by rollback; None: no save ran when it came

    def __call__(self, command: Command) -> bool:
        core, action = self._core, command.action
        if core.checkpointer is None or core.boundary.closed or core.ending is not None:
            return False
        if isinstance(action, CheckpointSave):
            return core.checkpointer.full
        if not isinstance(action, Rollback):
            return False
        if command.id not in self._waiting:
            save = core.newest_save
            running = save is not None and not save.pending.done()
            self._waiting[command.id] = _Waiting(core, command, action, save) if save is not None and running else None
        waiting = self._waiting[command.id]
        return waiting is not None and not waiting.over

    def hear(self, update: CommandUpdate) -> None:
        """What rank 0 tells of a command."""
        if update.state in FINAL_COMMAND_STATES:
            self._waiting.pop(update.id, None)
            self._core.rollback_targets.over(update.id)
