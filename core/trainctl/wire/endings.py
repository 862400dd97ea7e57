"""An operator ends an attempt's ranks without a boundary: the mark by which a rank knows whose SIGTERM it got.

    RUN/numbers/ended-000002   attempt 2 is being ended by `abort --now` or `restart`

A paused rank takes SIGTERM for the machine's end and saves. The hub makes the mark before anybody is signalled, so that
a rank which an operator ends does not. It is empty: a name fits on a disk that is full.
"""

import contextlib
from pathlib import Path

from trainctl.wire.rundir import RunDir, fsync_dir


def mark_ended(directory: Path, attempt: int) -> None:
    """An operator ends this attempt; to be said before its ranks are signalled. Raises OSError."""
    mark = _mark(directory, attempt)
    mark.touch(mode=0o600)
    fsync_dir(mark.parent)


def unmark_ended(directory: Path, attempt: int) -> None:
    """Nothing came of it: the attempt goes on. Raises OSError."""
    _mark(directory, attempt).unlink(missing_ok=True)


def is_ended(directory: Path, attempt: int) -> bool:
    """Whether an operator ends this attempt. Where the directory cannot be read, it is not known that one does."""
    with contextlib.suppress(OSError):
        return _mark(directory, attempt).exists()
    return False


def _mark(directory: Path, attempt: int) -> Path:
    return RunDir(directory).numbers / f"ended-{attempt:06d}"
