"""Commands that are better proposed once a save that runs is written: till then training goes on, and others pass."""

from trainctl.trainer.core import Core, RunningSave
from trainctl.trainer.rollback_target import target_of
from trainctl.wire.commands import CheckpointSave, Command, Rollback

_KEPT = 16


class SavesFirst:
    """Asked again and again for each command in rank 0's queue, by its leader.

    A save that began now would hold training up where every buffer is still being written. So would a rollback, which
    every rank prepares once its writes are done: a disk that hangs would hold the run for as long as it does so. One
    save is waited for, the newest of when the rollback came, because there may always be one where the disk is slower
    than the interval. One that is queued can be cancelled, expires, and makes way for a stop.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._awaited: dict[str, RunningSave | None] = {}  # by rollback, the newest few

    def __call__(self, command: Command) -> bool:
        core, action = self._core, command.action
        if core.checkpointer is None or core.boundary.closed or core.ending is not None:
            return False
        if isinstance(action, CheckpointSave):
            return core.checkpointer.full
        if not isinstance(action, Rollback):
            return False
        if command.id not in self._awaited:
            try:
                if target_of(core, command.id, action) is None:
                    return False  # refused at once
            except OSError:
                return False  # told where it is prepared
            self._awaited = dict([*self._awaited.items(), (command.id, core.newest_save)][-_KEPT:])
        awaited = self._awaited[command.id]
        return awaited is not None and not awaited.pending.done()
