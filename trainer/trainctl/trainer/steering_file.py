"""What operators set, written to `overrides.json` beside the sender: a file server that hangs must not stop telemetry.

The outcome of a command that sets something is held back until the file has it, so that whoever hears *applied* may
rely on it after a crash, too. Everything else goes on being told. For rank 0's sender thread.
"""

import logging
import threading
import time
from collections import deque
from typing import Final

from trainctl.trainer import steering
from trainctl.trainer.core import Core
from trainctl.wire.commands import REGISTRY, LrRelease, LrScale, LrSet, Rollback, SetTunable
from trainctl.wire.messages import CommandUpdate, Event

log = logging.getLogger(__name__)

_PATIENCE_S: Final = 0.2  # a write and its sync take milliseconds, and a later tick would tell the outcome later
_TELL_S: Final = 5.0
_SETS: Final = {
    name
    for name, spec in REGISTRY.items()
    if issubclass(spec.action, LrScale | LrSet | LrRelease | SetTunable | Rollback)
}


class SteeringFile:
    """`keep` it; ask `holds` about each event, and take from `released` what was held, each tick."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._writing: threading.Thread | None = None
        self._began = 0.0
        self._waited = False  # a write that hangs is waited for once
        self._held: deque[Event] = deque()
        self._leaves = False

    def keep(self) -> bool:
        """Have it written if it changed; whether the file says what is set. Waits 0.2 s, once for each write."""
        core = self._core
        if not core.place.leads:
            core.steering_changed.clear()
            return True
        if not self._written() and self._waited:
            if time.monotonic() > self._began + _TELL_S:
                text = (
                    f"{steering.file_of(core)} is not written for {_TELL_S:.0f} s (does the file system hang?): what "
                    "commands set is in effect, and they are told as applied when it is; training goes on"
                )
                core.complain("overrides", text)
            return False
        if self._writing is None and core.steering_changed.is_set():
            self._began, self._waited = time.monotonic(), False
            self._writing = threading.Thread(target=self._write, name="trainctl-overrides", daemon=True)
            self._writing.start()
        if self._writing is not None and not self._waited:
            self._writing.join(_PATIENCE_S)
            self._waited = True
        return self._written() and not core.steering_changed.is_set()

    def holds(self, event: Event) -> bool:
        """Whether an event is to wait for the file; it comes out of `released` then."""
        outcome = isinstance(event, CommandUpdate) and event.state == "applied" and event.command in _SETS
        if not outcome or (self.keep() and not self._held) or self._leaves:
            return False
        self._held.append(event)
        return True

    def released(self) -> list[Event]:
        """The events that may be told by now."""
        if not self._held or not (self.keep() or self._leaves):
            return []
        found, self._held = list(self._held), deque()
        return found

    def finish(self, timeout_s: float) -> None:
        """This rank is about to leave: wait for the file so long; then nothing is held any more."""
        if not self.keep() and self._writing is not None:
            self._writing.join(timeout_s)
        self._leaves = True
        if not self.keep():
            text = (
                f"{steering.file_of(self._core)} could not be written in time: a restart may not know what was set last"
            )
            self._core.complain("overrides", text)

    def _written(self) -> bool:
        if self._writing is not None and not self._writing.is_alive():
            self._writing = None
        return self._writing is None

    def _write(self) -> None:
        try:
            steering.keep(self._core)
        except Exception as error:  # whatever it is, the outcome of the command must be told
            log.exception("trainctl: overrides.json was not written")
            self._core.complain("overrides", f"a restart will not know what was set: {type(error).__name__}: {error}")
