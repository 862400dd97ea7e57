"""The hub's way to the run's directory: one thread for it, which the hub's loop waits for only briefly.

A network file system may leave any call unanswered for minutes. On a loop that made such calls itself, the heartbeat
would stop with the disk, and nobody could be told of either.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Final, Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S: Final = 0.2
HANGS_S: Final = 2.0


class DiskHangs(OSError):
    """The disk did not answer yet. What was asked of it goes on, unless it was still at something else."""

    def __init__(self) -> None:
        super().__init__(errno.ETIMEDOUT, "the file system of the run's directory does not answer")


@dataclass
class _Job(Generic[T]):
    work: Callable[[], T]
    waiting: threading.Lock = field(default_factory=threading.Lock)  # released when the work is done
    done: bool = False
    results: list[T] = field(default_factory=list)
    error: Exception | None = None


class Disk:
    """Does one thing after another in a daemon thread. All methods are for one thread, the loop's."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._jobs: SimpleQueue[_Job[object]] = SimpleQueue()
        self._newest: _Job[object] | None = None
        self._began: float | None = None
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether something that was asked before is not done yet."""
        return self._newest is not None and not self._newest.done

    @property
    def hangs(self) -> bool:
        """Whether it has been at one thing for longer than a disk takes that is only slow."""
        began = self._began
        return began is not None and time.monotonic() - began > HANGS_S

    def do(self, work: Callable[[], T]) -> T:
        """Have the work done and return its result; raises what it raises.

        Raises `DiskHangs` at once where the disk is still at something else: then nothing is done; and after a moment
        where it is at this: then it goes on. Whoever needs to know that it was done notes it in the work itself. What
        such work asks for in turn is done on the spot.
        """
        if threading.current_thread() is self._thread:
            return work()
        if self.busy:
            raise DiskHangs
        return self._wait(self._put(work), self._patience_s)

    def do_however_long(self, work: Callable[[], T]) -> T:
        """Have it done after all that was asked before, and wait until it is."""
        return self._wait(self._put(work), -1)

    def post(self, work: Callable[[], object]) -> None:
        """Have it done after all that was asked before; wait a moment, if the disk is not at something else."""
        wait = not self.busy
        job = self._put(work)
        if wait:
            job.waiting.acquire(timeout=self._patience_s)

    def _put(self, work: Callable[[], T]) -> _Job[T]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="hub-disk")
            self._thread.start()
        job = _Job(work)
        job.waiting.acquire()
        self._newest = job  # type: ignore[assignment]
        self._jobs.put(job)  # type: ignore[arg-type]
        return job

    def _wait(self, job: _Job[T], timeout_s: float) -> T:
        if not job.waiting.acquire(timeout=timeout_s):
            raise DiskHangs
        if job.error is not None:
            raise job.error
        return job.results[0]

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            self._began = time.monotonic()
            try:
                job.results.append(job.work())
            except OSError as error:
                job.error = error
            except Exception as error:
                log.exception("work on the run's directory failed")
                job.error = error
            self._began = None
            job.done = True
            job.waiting.release()
