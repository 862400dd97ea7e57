"""Checkpoints that an operator deletes while the run lives."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from trainctl.hub.recorder import Recorder
from trainctl.wire.commands import Act, CommandState, Restart, Rollback
from trainctl.wire.manifest import UnreadCheckpoint, pick
from trainctl.wire.messages import BestBy, CheckpointInfo, CheckpointRemoved
from trainctl.wire.removal import delete_hidden, hide, known, unread_words, verify_last_good, why_kept
from trainctl.wire.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class Removed:
    """How a removal ended."""

    state: CommandState
    reason: str | None = None


def targets_of(
    actions: Iterable[Act], checkpoints: list[CheckpointInfo], best_by: BestBy | None = None
) -> frozenset[str]:
    """The checkpoints that rollbacks and restarts go back to."""
    wanted = (action.target for action in actions if isinstance(action, Rollback | Restart))
    found = (pick(checkpoints, target, best_by) for target in wanted)
    return frozenset(info.id for info in found if info is not None)


async def remove(
    recorder: Recorder,
    run_dir: RunDir,
    checkpoint_id: str,
    actor: str,
    targets: Callable[[list[CheckpointInfo]], Collection[str]],
) -> Removed:
    """Verify the last good one, then delete the one that is meant. `targets`: what commands go back to, asked then.

    Between the last look and the moment at which its name is gone nothing else runs in the hub, so that no rollback to
    it is accepted meanwhile.
    """
    directory, record = run_dir.checkpoints, recorder.record
    try:
        damaged = await asyncio.to_thread(verify_last_good, directory)
    except UnreadCheckpoint as error:
        return Removed(state="failed", reason=unread_words(error))
    found = known(directory, damaged)
    reason = why_kept(found, checkpoint_id, targets(found))
    if reason is not None:
        return Removed(state="rejected", reason=reason)
    size = next(info.bytes for info in found if info.id == checkpoint_id)
    try:
        hide(directory, checkpoint_id)
    except FileNotFoundError:
        return Removed(state="rejected", reason=f"checkpoint {checkpoint_id} is gone: the retention was faster")
    except OSError as error:
        return Removed(state="failed", reason=f"{checkpoint_id} cannot be deleted: {error.strerror}; it is as it was")
    state = record.state
    recorder.take(
        CheckpointRemoved(
            time=time.time(),
            step=state.step,
            incarnation=state.incarnation,
            id=checkpoint_id,
            by=actor,
            bytes=size,
        )
    )
    try:
        await asyncio.to_thread(delete_hidden, directory, checkpoint_id)
    except OSError as error:
        left = directory / f".{checkpoint_id}.gone"
        return Removed(
            state="failed", reason=f"{checkpoint_id} is gone, and not all of {left} could be deleted: {error}"
        )
    return Removed(state="applied")
