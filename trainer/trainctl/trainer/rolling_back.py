"""Going back to a checkpoint, once it was read and every rank agreed on it: assignment, and what is told of it."""

import time
from collections.abc import Mapping

from trainctl.trainer.agreement import Proposal
from trainctl.trainer.buffer import Rewind
from trainctl.trainer.checkpoint import Loaded
from trainctl.trainer.core import Core
from trainctl.trainer.data_place import DataPlace, open_data
from trainctl.trainer.feed import among
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
    begin_branch(core, parent=loaded.incarnation, after_step=step, skipped=action.skip_batches)
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


def begin_branch(core: Core, *, parent: int = 0, after_step: int = 0, skipped: int = 0) -> None:
    """Write down where this incarnation begins, so that `last` and a restart never go back to an abandoned branch.

    `skipped`: micro-batches that each rank left out there.
    """
    core.parent = parent
    if not core.place.leads or core.identity.problem is not None:
        return
    branch = Branch(
        incarnation=core.incarnation,
        parent=parent,
        after_step=after_step,
        skipped=skipped,
        ranks=core.place.world_size,
    )
    try:
        record_branch(RunDir(core.identity.directory), branch)
    except OSError as error:
        core.complain("lineage", f"incarnation {core.incarnation} could not be written down: {error.strerror or error}")


def skipped_from(branches: Mapping[int, Branch], loaded: Loaded, ranks: int) -> tuple[int, list[str]]:
    """How many micro-batches each of `ranks` ranks has to leave out where `loaded` is resumed from, and what to tell.

    Rollbacks left them out with which branches began, by incarnation, between `loaded` and the newest. What the one
    back to `loaded` itself left out is left out again; what later ones did lies among the data that are trained anew.
    """
    count, told, current = 0, list[str](), max(branches, default=0)
    while (branch := branches.get(current)) is not None and loaded.incarnation < current:
        what = f"micro-batches on each rank that the rollback to step {branch.after_step} left out are"
        if not branch.skipped:
            pass
        elif (branch.parent, branch.after_step) == (loaded.incarnation, loaded.step):
            count, _ = among(branch.skipped, branch.ranks or ranks, ranks)
            told.append(f"the {count} {what} left out again")
        else:
            told.append(f"the {branch.skipped} {what} read again: this checkpoint is not the one that it went back to")
        current = branch.parent if branch.parent < current else 0
    return count, told[::-1]


def position(core: Core, loaded: Loaded, *, data: DataPlace | None = None, tell: bool = True, skip: int = 0) -> int:
    """Put counters, data and random state where a committed checkpoint says; return its step.

    `data`: where they are open already, in place of opening them, `skip` micro-batches on.
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
        open_data(core.feed, loaded, skip=skip)
    if tell and core.callbacks.on_rollback is not None:
        core.callbacks.on_rollback(step)
    loaded.restore_rng()  # last: making an iterator draws random numbers
    return step
