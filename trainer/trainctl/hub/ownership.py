"""Whether this hub may still write: it must hold the highest epoch that was given out in the run's directory."""

import contextlib
import time

from trainctl.hub.disk import Disk, DiskHangs
from trainctl.wire.rundir import RunDir

_CHECK_S = 1.0


class Ownership:
    """A hub's epoch. `held` looks at the directory at most once a second, and always after a pause of ours."""

    def __init__(self, run_dir: RunDir, disk: Disk | None = None) -> None:
        self._run_dir = run_dir
        self._disk = disk or Disk()
        self._held = True
        self._checked_at = time.monotonic()
        self.registered = True
        try:
            self.epoch = run_dir.allocate("epoch")
        except OSError:
            # Read-only or full: nobody else can get a higher one there either.
            self.epoch = 1
            with contextlib.suppress(OSError):  # not even readable: then 1 has to do
                self.epoch = run_dir.newest("epoch") + 1
            self.registered = False

    def held(self, *, look: bool = False) -> bool:
        """False for good once a newer hub took over. `look` at the directory now, for what cannot be taken back: false
        too while the directory does not say."""
        now = time.monotonic()
        if self._held and (look or now - self._checked_at >= _CHECK_S):
            try:
                self._disk.do(self._look)
            except DiskHangs:
                # Nothing is written either: what would be waits, and the first look after this decides.
                return self._held and not look
            except OSError:
                # It may be silent to us alone: then a newer hub is possible, and what cannot be taken back has to wait.
                self._checked_at = now
                return self._held and not look
            self._checked_at = now
        return self._held

    def held_now(self) -> bool:
        """The same, looked up here and now however long that takes: for threads that write by themselves, not for the
        loop. Raises OSError where the directory does not say."""
        if self._held:
            self._look()
        return self._held

    def _look(self) -> None:
        if self._run_dir.newest("epoch") > self.epoch:
            self._held = False

    def register(self) -> None:
        """Write the epoch down as soon as the directory takes it; for the disk's thread. Raises OSError while it does
        not."""
        if not self.registered:
            self._held = self._run_dir.allocate("epoch") == self.epoch
            self.registered = True
