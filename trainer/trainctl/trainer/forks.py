"""Moments at which the training thread must not fork, and what to do where it forks all the same.

A DataLoader worker that is forked while another thread starts a process inherits the pipe on which that thread waits
for the new program to begin: the thread then waits for as long as the worker lives. The same goes for a lock file that
is held for a moment. So our threads do such things within `no_fork()`, and a fork waits for them, a few milliseconds.
"""

import contextlib
import os
import threading
from collections.abc import Iterator

_PATIENCE_S = 1.0

_lock = threading.Lock()
_installed = False
_held = False


def install() -> None:
    """Make every fork of this process wait for `no_fork()` blocks. Called again it does nothing."""
    global _installed  # noqa: PLW0603 - hooks of the process cannot be taken back, so they are made once
    if not _installed:
        _installed = True
        os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)


@contextlib.contextmanager
def no_fork() -> Iterator[None]:
    """What happens in here, the files and sockets that it opens included, no forked process gets to see half done."""
    with _lock:
        yield


def _before() -> None:
    global _held  # noqa: PLW0603 - told to `_after`, which runs in the thread that forks
    # Training goes first: whatever our threads are stuck in, a fork is not held up for longer than this.
    _held = _lock.acquire(timeout=_PATIENCE_S)


def _after() -> None:
    global _held  # noqa: PLW0603
    if _held:
        _held = False
        _lock.release()
