"""One agent for each job and node: the lock that it holds while it lives, whatever ends it."""

import contextlib
import fcntl
import os
import time

from trainctl.wire.places import agent_lock


class AlreadyRunning(Exception):
    """Another agent holds the lock; the text says which."""


class JobLock:
    """Held from construction to `close`. Raises `AlreadyRunning`, or OSError."""

    def __init__(self, job: str) -> None:
        path = agent_lock(job)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not self._taken():
            holder = os.read(self._file, 100).decode(errors="replace").strip()
            os.close(self._file)
            raise AlreadyRunning(f"the agent of job {job} is already running here ({holder or 'starting'})")
        os.ftruncate(self._file, 0)
        os.write(self._file, f"pid {os.getpid()}\n".encode())

    def _taken(self) -> bool:
        # More than one try: a rank that looks whether there is an agent holds the lock for a moment.
        for pause_s in (0.05, 0.1, 0.2, None):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if pause_s is not None:
                    time.sleep(pause_s)
            else:
                return True
        return False

    def close(self) -> None:
        # The file stays: unlinking it would let a second agent lock a new file of the same name beside a third.
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
        os.close(self._file)
