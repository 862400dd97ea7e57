"""What a save does in the background: one thing after another, at low priority and with rests.

On a node whose cores are all busy, whatever the background does is taken from training's steps. So its thread has the
lowest priority, and works for a share of the time only: priority alone does not help while the thread holds the
interpreter's lock, which training wants between any two operations (docs/checkpoints.md has the numbers). When somebody
waits for it, it does not rest.
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

# Of the time that it could work, measured in its own processor time: waiting for the disk is a rest already.
SHARE = 0.5
NICE = 19
_SHORTEST_REST_S = 0.002
_LONGEST_REST_S = 0.1


class Pace:
    """Rests between pieces of work, so that they take `share` of the time of one core."""

    def __init__(self, share: float | None = None) -> None:
        share = SHARE if share is None else share
        self._rest_for = (1.0 - share) / share
        self._waiting = 0
        self._lock = threading.Lock()
        self._hurry = threading.Event()
        self._worked_from: float | None = None

    def begin(self) -> None:
        """The calling thread starts working."""
        self._worked_from = time.thread_time()

    def rest(self) -> None:
        """Call it often, from the thread that works: it sleeps when it is time to."""
        if self._worked_from is None:
            return
        rest_s = (time.thread_time() - self._worked_from) * self._rest_for
        if rest_s >= _SHORTEST_REST_S:
            self._hurry.wait(min(rest_s, _LONGEST_REST_S))
            self._worked_from = time.thread_time()

    @contextlib.contextmanager
    def hurried(self) -> Iterator[None]:
        """While somebody waits for the work, there are no rests."""
        with self._lock:
            self._waiting += 1
            self._hurry.set()
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self._hurry.clear()


class Background:
    """Runs jobs one after another in the order given, in a thread that lives while there are any.

    Jobs may not raise. All ranks give theirs in the same order, so that their collectives meet.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._jobs: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, job: Callable[[], None]) -> None:
        """Run `job` when those before it are done."""
        with self._lock:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="trainctl-save", daemon=True)
                self._thread.start()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until there is nothing to do and the thread is gone. Raises TimeoutError; what runs goes on."""
        thread = self._thread
        if thread is None:
            return
        with self._pace.hurried():
            thread.join(timeout_s)
        if thread.is_alive():
            raise TimeoutError("a checkpoint is still being written")

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # a sandbox may forbid it; the rests remain
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        self._pace.begin()
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            job()
