"""Deleting a checkpoint: which ones an operator may, and how one goes without ever looking good half-way.

What is deleted is gone for good, so the rules are kept where the deletion is: the last good checkpoint stays, and
another one goes only once that one was verified.
"""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from trainctl.wire.manifest import DamagedCheckpoint, UnreadCheckpoint, list_checkpoints, remember_check, verify
from trainctl.wire.messages import CheckpointInfo
from trainctl.wire.rundir import fsync_dir


class NotRemoved(Exception):
    """A checkpoint stays; the message says why, and what to do."""


def last_good(checkpoints: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
    """The newest of the live branch that is not known to be damaged; of any branch where that has none."""
    whole = [info for info in checkpoints if info.verified is not False]
    live = [info for info in whole if not info.abandoned]
    return next(reversed(live or whole), None)


def why_kept(checkpoints: Sequence[CheckpointInfo], checkpoint_id: str, targets: Collection[str] = ()) -> str | None:
    """Why a checkpoint may not be deleted, or None. `targets`: what rollbacks and restarts under way go back to."""
    info = next((info for info in checkpoints if info.id == checkpoint_id), None)
    good = last_good(checkpoints)
    if info is None:
        return f"there is no checkpoint {checkpoint_id} (trainctl checkpoint ls lists all)"
    if info.pinned:
        return f"{info.id} is pinned, so it stays: trainctl checkpoint unpin {info.id} lets it go"
    if info.id in targets:
        return f"{info.id} is what a command under way goes back to: wait for its outcome"
    if good is not None and good.id == info.id:
        return f"{info.id} is the last good checkpoint: save a newer one first (trainctl checkpoint save)"
    return None


def verify_last_good(directory: Path, damaged: Collection[str] = ()) -> frozenset[str]:
    """Make sure that the last good checkpoint of `directory` is one; the ids that turned out to be damaged.

    Reads files and may take long. What was verified before is taken at its word. Raises UnreadCheckpoint where the disk
    did not give a file of it: nothing may be deleted then.
    """
    found = known(directory, damaged)
    good = last_good(found)
    if good is None or good.verified is True:
        return frozenset(damaged)
    try:
        verify(directory / good.id)
    except UnreadCheckpoint:
        raise
    except DamagedCheckpoint as damage:
        remember_check(directory / good.id, ok=False, text=str(damage))
        return verify_last_good(directory, {*damaged, good.id})
    remember_check(directory / good.id, ok=True, text="verified before another one was deleted")
    return frozenset(damaged)


def unread_words(error: UnreadCheckpoint) -> str:
    """Why nothing is deleted while the last good checkpoint cannot be read."""
    return f"{error}. It is the last good checkpoint, so nothing was deleted: try again"


def known(directory: Path, damaged: Collection[str]) -> list[CheckpointInfo]:
    """The checkpoints as they are now, with what was found `damaged` where that could not be written down."""
    return [
        msgspec.structs.replace(info, verified=False) if info.id in damaged else info
        for info in list_checkpoints(directory)
    ]


def remove_unless_kept(directory: Path, checkpoint_id: str) -> CheckpointInfo:
    """Delete a checkpoint of a run that nobody trains, after the last good one was verified; what it was.

    Raises NotRemoved, or OSError.
    """
    found = known(directory, ())
    reason = why_kept(found, checkpoint_id)
    if reason is None:
        try:
            found = known(directory, verify_last_good(directory))
        except UnreadCheckpoint as error:
            raise NotRemoved(unread_words(error)) from None
        reason = why_kept(found, checkpoint_id)
    if reason is not None:
        raise NotRemoved(reason)
    remove(directory, checkpoint_id)
    return next(info for info in found if info.id == checkpoint_id)


def remove(directory: Path, checkpoint_id: str) -> None:
    """Delete one checkpoint: its name goes first, so that a crash leaves nothing that looks good. Raises OSError."""
    hide(directory, checkpoint_id)
    delete_hidden(directory, checkpoint_id)


def hide(directory: Path, checkpoint_id: str) -> None:
    """Take a checkpoint's name away, at once and for good. Raises OSError."""
    (directory / checkpoint_id).rename(directory / f".{checkpoint_id}.gone")
    fsync_dir(directory)


def delete_hidden(directory: Path, checkpoint_id: str) -> None:
    """Take away the marks of one that `hide` hid, and free its space. Raises OSError."""
    remove_marks(directory, checkpoint_id)  # before the last trace of its id, so that the next start can go on with it
    shutil.rmtree(directory / f".{checkpoint_id}.gone")


def remove_marks(directory: Path, checkpoint_id: str) -> None:
    """Take away what lies beside a checkpoint. Raises OSError."""
    for mark in ("pinned", "checked.json"):
        (directory / f"{checkpoint_id}.{mark}").unlink(missing_ok=True)
