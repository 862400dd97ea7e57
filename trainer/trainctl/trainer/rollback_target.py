"""Which checkpoint a rollback goes back to: found when rank 0 first looks at it, and kept from deletion from then on.

A rollback may wait before it is proposed (`saves_first`): what `last` or `best` meant when it came it means then, too.
"""

from trainctl.trainer.core import Core
from trainctl.wire.commands import Rollback
from trainctl.wire.held_states import list_with_memory
from trainctl.wire.manifest import pick
from trainctl.wire.messages import CheckpointInfo
from trainctl.wire.rundir import RunDir


def target_of(core: Core, command_id: str, action: Rollback) -> str | None:
    """The id of the checkpoint, or None where there is none such. Raises OSError."""
    if (known := core.rollback_targets.of(command_id)) is not None:
        return known
    with core.deleting:
        found = pick(_listed(core), action.target, core.best_by)
        if found is None:
            return None
        core.rollback_targets.hold(command_id, found.id)
        return found.id


def none_such(core: Core, action: Rollback) -> str:
    """What to tell where there is none such. Raises OSError."""
    steps = ", ".join(str(info.step) for info in _listed(core)[-8:]) or "none yet"
    return f"there is no checkpoint {action.target!r}; there are, by step: {steps}"


def _listed(core: Core) -> list[CheckpointInfo]:
    held = core.checkpointer.in_memory if core.checkpointer is not None else []
    return list_with_memory(RunDir(core.identity.directory).checkpoints, held)
