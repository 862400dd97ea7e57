"""Which checkpoints may go, and how one is removed without ever looking good half-way."""

import contextlib
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from trainctl.trainer.checkpoint.errors import CheckpointError
from trainctl.wire.manifest import DamagedCheckpoint, list_checkpoints, pick, remember_check, verify
from trainctl.wire.messages import CheckpointInfo
from trainctl.wire.rundir import fsync_dir

KEEP_LAST = 5


def expired(
    checkpoints: Sequence[CheckpointInfo], *, keep_last: int = KEEP_LAST, protected: Collection[str] = ()
) -> list[str]:
    """The ids that retention lets go, oldest first. `checkpoints` is oldest first, as `list_checkpoints` gives it.

    Kept are the newest `keep_last`, the best, the pinned, the `protected` (a rollback's target), and the newest that
    is not known to be damaged, whatever the numbers say. Raises ValueError when `keep_last` is below 1.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}: at least the last checkpoint is kept")
    whole = [info for info in checkpoints if info.verified is not False]
    keep = {info.id for info in whole[-keep_last:]} | set(protected)
    keep |= {info.id for info in checkpoints if info.pinned}
    best = pick(list(checkpoints), "best")
    if best is not None:
        keep.add(best.id)
    if not whole:
        return []
    return [info.id for info in checkpoints if info.id not in keep]


def prune(directory: Path, *, keep_last: int = KEEP_LAST, protected: Collection[str] = ()) -> list[str]:
    """Delete what `expired` names; the ids that went. Nothing goes unless the newest one verifies first.

    It reads files and may take long: call it off the training thread, on rank 0 only.
    Raises CheckpointError (nothing was deleted) or OSError (the rest is kept).
    """
    checkpoints = list_checkpoints(directory)
    doomed = expired(checkpoints, keep_last=keep_last, protected=protected)
    if not doomed:
        return []
    newest = next(info for info in reversed(checkpoints) if info.verified is not False)
    if newest.verified is not True:
        try:
            verify(directory / newest.id)
        except DamagedCheckpoint as error:
            remember_check(directory / newest.id, ok=False, text=str(error))
            raise CheckpointError(f"{error}; no older checkpoint was deleted") from None
        remember_check(directory / newest.id, ok=True, text="verified before older ones were deleted")
    for doomed_id in doomed:
        remove(directory, doomed_id)
    return doomed


def remove(directory: Path, checkpoint_id: str) -> None:
    """Delete one checkpoint: its name goes first, so that a crash leaves nothing that looks good. Raises OSError."""
    gone = directory / f".{checkpoint_id}.gone"
    (directory / checkpoint_id).rename(gone)
    fsync_dir(directory)
    _remove_marks(directory, checkpoint_id)  # before the last trace of its id
    shutil.rmtree(gone)


def _remove_marks(directory: Path, checkpoint_id: str) -> None:
    for mark in ("pinned", "checked.json"):
        (directory / f"{checkpoint_id}.{mark}").unlink(missing_ok=True)


def sweep(directory: Path) -> list[str]:
    """Remove what a crash left: stage directories, half-deleted ones and half-written marks. The names that went."""
    left = [path for pattern in (".*.stage", ".*.gone") for path in directory.glob(pattern) if path.is_dir()]
    marks = list(directory.glob(".*.checked.json.*.new"))
    # A leftover that cannot be removed takes space and nothing else: listings never show it.
    for path in left:
        checkpoint_id = path.name.removeprefix(".").removesuffix(".gone")
        with contextlib.suppress(OSError):
            if path.suffix == ".gone" and not (directory / checkpoint_id).exists():
                _remove_marks(directory, checkpoint_id)
            shutil.rmtree(path)
    for path in marks:
        with contextlib.suppress(OSError):
            path.unlink()
    return [path.name for path in (*left, *marks)]
