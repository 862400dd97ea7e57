"""Going back to a checkpoint, once it was read and every rank agreed on it: assignment, and what is told of it."""

import time

from trainctl.trainer.agreement import Proposal
from trainctl.trainer.buffer import Rewind
from trainctl.trainer.checkpoint import Loaded
from trainctl.trainer.core import Core
from trainctl.trainer.data_place import DataPlace, open_data
from trainctl.wire.commands import Rollback
from trainctl.wire.lineage import Branch, record_branch
from trainctl.wire.messages import RolledBack, Scalar
from trainctl.wire.rundir import RunDir


def roll_back(
    core: Core, loaded: Loaded, action: Rollback, proposal: Proposal, data: DataPlace | None
) -> tuple[Scalar, Scalar]:
    """Restore what was loaded; the operator's newest overrides and tunables stay, unless asked otherwise."""
    assert core.checkpointer is not None
    from_step, from_incarnation = core.boundary.completed, core.incarnation
    core.checkpointer.commit(loaded, restore_overrides=action.restore_overrides)
    if action.lr_scale is not None and core.overrides is not None:
        core.reverts.replaced_by(action, proposal.command.id)  # also those that came with the checkpoint
        core.overrides.scale_lr(action.lr_scale)
    core.steered()
    step = position(core, loaded, data=data)
    core.incarnation = proposal.incarnation
    begin_branch(core, parent=loaded.incarnation, after_step=step)
    core.last_metrics.clear()  # those of the branch that is left are not this one's
    core.last_metrics.update(loaded.metrics)
    core.event(
        RolledBack(
            time=time.time(),
            step=step,
            incarnation=core.incarnation,
            from_step=from_step,
            from_incarnation=from_incarnation,
            checkpoint=str(proposal.checkpoint),
            skipped_batches=action.skip_batches,
            lr_scale=action.lr_scale,
            actor=proposal.actor,
            from_memory=loaded.from_memory,
            parent=loaded.incarnation,
        )
    )
    core.buffer.put(Rewind(step, core.incarnation, dict(loaded.metrics)))
    for text in loaded.notes:
        core.note("rollback", text)
    return from_step, step


def begin_branch(core: Core, *, parent: int = 0, after_step: int = 0) -> None:
    """Write down where this incarnation begins, so that `last` and a restart never go back to an abandoned branch."""
    core.parent = parent
    if not core.place.leads or core.identity.problem is not None:
        return
    branch = Branch(incarnation=core.incarnation, parent=parent, after_step=after_step)
    try:
        record_branch(RunDir(core.identity.directory), branch)
    except OSError as error:
        core.complain("lineage", f"incarnation {core.incarnation} could not be written down: {error.strerror or error}")


def position(core: Core, loaded: Loaded, *, data: DataPlace | None = None, tell: bool = True) -> int:
    """Put counters, data and random state where a committed checkpoint says; return its step.

    `data`: where they are open already, in place of opening them.
    `tell` calls the script's on_rollback; at a resume the script has not begun, and starts from `run.step`.
    """
    step = int(core.counters["step"])
    core.boundary.completed = step
    core.row_step = step
    core.ranges.rewind(step)
    core.reverts.rewound(step)
    if core.overrides is not None:
        core.overrides.begin_anew(step)
    if core.feed is not None and data is not None:
        core.feed.take(data.after)
        loaded.restore_rng()
    elif core.feed is not None:
        open_data(core.feed, loaded)
    if tell and core.callbacks.on_rollback is not None:
        core.callbacks.on_rollback(step)
    loaded.restore_rng()  # last: making an iterator draws random numbers
    return step
