"""Reading data on the way to where a rollback goes on: how much of it can be meant, and when to give it up.

It is read in the training thread while every rank waits, and may take minutes: so rank 0 says how far it is, and each
rank looks whether the command was called off meanwhile.
"""

import time
from collections.abc import Callable

from trainctl.trainer.core import Core
from trainctl.wire.commands import Rollback, too_many_to_skip

LOOK_S = 1.0
TELL_S = 10.0


class CalledOff(Exception):
    """The rollback for which data are read was withdrawn: cancelled, expired, or given up for a stop."""


def cannot_be_meant(core: Core, action: Rollback) -> str | None:
    """Why so much is not skipped: it is more than the whole run reads, so it is a slip. Only reads; any thread."""
    if core.total_steps is None or core.feed is None:
        return None
    newest = core.ranges.newest()
    a_step = newest[1] - newest[0] + 1 if newest is not None else 1
    return too_many_to_skip(action, core.total_steps, a_step)


class Reading:
    """Called before each micro-batch that is read on the way; raises CalledOff once `called_off` says so.

    That is asked every `LOOK_S` seconds, and `tell` is told every `TELL_S` how far it is.
    """

    def __init__(
        self,
        skip: int,
        *,
        called_off: Callable[[], bool],
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._skip = skip
        self._called_off = called_off
        self._tell = tell
        self._clock = clock
        self._read = 0
        self._began = clock()
        self._look_at = self._began + LOOK_S
        self._tell_at = self._began + TELL_S

    def __call__(self) -> None:
        now = self._clock()
        if now >= self._look_at:
            if self._called_off():
                raise CalledOff(f"called off after {self._read} micro-batches were read for it: nothing was changed")
            self._look_at = self._clock() + LOOK_S
        if now >= self._tell_at:
            self._tell(self._how_far(now))
            self._tell_at = now + TELL_S
        self._read += 1

    def _how_far(self, now: float) -> str:
        skipping = f", with {self._skip} to skip," if self._skip else ""
        return (
            f"the data of a rollback{skipping} are read up to its place: {self._read} micro-batches in "
            f"{now - self._began:.0f} s so far. All ranks wait; stop, abort or cancel give it up"
        )
