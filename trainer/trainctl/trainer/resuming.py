"""At the start of an attempt: what is resumed from, and with which of the operators' settings."""

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from trainctl.trainer import fallback, steering
from trainctl.trainer.checkpoint import CheckpointError, Loaded
from trainctl.trainer.checkpoint.errors import RanksLost
from trainctl.trainer.core import Core
from trainctl.trainer.resumed import Resumed
from trainctl.trainer.rolling_back import begin_branch, position, skipped_from
from trainctl.wire.lineage import Branch, read_branches
from trainctl.wire.rundir import RunDir


def resume(core: Core, group: Any) -> int | None:
    """At start: restore what TRAINCTL_RESUME names, or, in a later attempt, the newest checkpoint that is whole.

    A collective over `group`: rank 0 chooses for all, because a shared file system may not show everybody the same.

    Returns the step, or None where there is nothing to resume from. A damaged one is passed over, and that is told.
    Raises `CheckpointError` when the one that was asked for by name is damaged, or all are.
    """
    asked = os.environ.get("TRAINCTL_RESUME")
    if asked and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        asked = "last"  # it was meant for this torchrun's first start: what was trained since is not to be left behind
    alone_or_grouped = core.place.world_size == 1 or group is not None
    if not alone_or_grouped or (not asked and core.identity.attempt == 1):
        begin_branch(core)
        return None
    told: list[Any] = [None] * 3
    if core.place.leads:
        run_dir = RunDir(core.identity.directory)
        told = [fallback.choice(run_dir.checkpoints, asked, core.best_by), _newest(core), read_branches(run_dir)]
    if group is not None:
        dist.broadcast_object_list(told, src=0, group=group)
    chosen: fallback.Choice = told[0]
    newest: steering.Steering | None = told[1]
    branches: dict[int, Branch] = {} if chosen.named else told[2]
    candidates, failed = chosen.candidates, dict[str, str]()
    if core.checkpointer is None:
        candidates = []  # what operators set is taken all the same
    elif chosen.named and not candidates:
        raise CheckpointError(f"TRAINCTL_RESUME asks for {asked!r}, and there is no such checkpoint")
    for checkpoint in candidates:
        assert core.checkpointer is not None
        try:
            loaded = core.checkpointer.load(checkpoint)
        except CheckpointError as error:
            if chosen.named or isinstance(error, RanksLost):
                raise
            failed[checkpoint] = str(error)
            continue
        _go_on_from(core, loaded, newest, branches)
        fallback.tell(core, checkpoint, failed, chosen.damaged)
        return loaded.step
    if core.checkpointer is not None and (failed or chosen.damaged):
        raise CheckpointError(fallback.none_left(failed, chosen.damaged))
    if newest is not None:
        steering.put(core, newest)
        core.reverts.rewound(0)
    begin_branch(core)
    return None


def _go_on_from(core: Core, loaded: Loaded, newest: steering.Steering | None, branches: Mapping[int, Branch]) -> None:
    """Take up what was read and verified on all ranks. `branches`: where nobody named the checkpoint."""
    assert core.checkpointer is not None
    skip, left_out = skipped_from(branches, loaded, core.place.world_size)
    core.checkpointer.commit(loaded, restore_overrides=newest is None)
    core.resumed_from, core.resumed_tunables = loaded.id, loaded.tunables
    core.resumed = Resumed(core, loaded, skip=skip)
    core.resumed.tell_notes()
    for text in left_out:
        core.resumed.tell(text)
    if newest is not None:
        steering.put(core, newest)
    step = position(core, loaded, tell=False, skip=skip)
    begin_branch(core, parent=loaded.incarnation, after_step=step, skipped=skip)


def _newest(core: Core) -> steering.Steering | None:
    """What operators had set when an earlier attempt ended, unless the checkpoint's is asked for."""
    asked = os.environ.get("TRAINCTL_RESTORE_OVERRIDES", "0") not in {"", "0"}
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # it was meant for that one
    return None if asked and first_start else steering.kept(core)
