"""Looks at the run's file system every ten seconds, and records what `DiskWatch` makes of it."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from trainctl.hub.aside import Aside, StillBusy
from trainctl.hub.detect_disk import CHECKPOINT, FULL, HANGS, LOW, DiskWatch, Room
from trainctl.wire.messages import Anomaly, CheckpointSaved, Envelope, Event, Severity
from trainctl.wire.rundir import RunDir

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 10.0
_KINDS = frozenset({LOW, FULL, CHECKPOINT, HANGS})
# A stage directory that nothing was added to for so long was left behind by a crash.
_SAVING_S = 900.0


class DiskLookout:
    """`tell` records an anomaly; `events` are the record's, for what was told before this hub began."""

    def __init__(
        self, *, run_dir: RunDir, events: Iterable[Event], tell: Callable[[str, str, Severity], object]
    ) -> None:
        told: set[str] = set()
        self._checkpoint_bytes = 0
        for event in events:
            self._note(event)
            if isinstance(event, Anomaly) and event.what in _KINDS:
                (told.discard if event.severity == "good" else told.add)(event.what)
        self._watch = DiskWatch(str(run_dir.path), told)
        self._tell = tell
        self._look = Aside(lambda: (read_room(run_dir.path), is_saving(run_dir.checkpoints, time.time())))

    def follow(self, envelope: Envelope) -> None:
        """Learn the size of the newest checkpoint."""
        self._note(envelope.body)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.look()
            except Exception:  # a fault in what only looks on must not end the hub
                log.exception("the run's file system could not be looked at")
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Look once, and tell what is new."""
        try:
            room, saving = await self._look.run(LOOK_EVERY_S)
        except StillBusy as busy:
            found = self._watch.silent(busy.for_s)
        except OSError:
            return  # a directory that is gone or not allowed is told of by `trouble`
        else:
            found = self._watch.observe(room, self._checkpoint_bytes, time.monotonic(), saving=saving)
        for finding in found:
            self._tell(finding.what, finding.text, finding.severity)

    def _note(self, body: object) -> None:
        if isinstance(body, CheckpointSaved) and body.error is None and body.bytes > 0:
            self._checkpoint_bytes = body.bytes


def read_room(path: Path) -> Room:
    """What the file system of a path says. Raises OSError."""
    found = os.statvfs(path)
    return Room(total_bytes=found.f_blocks * found.f_frsize, free_bytes=found.f_bavail * found.f_frsize)


def is_saving(checkpoints: Path, wall: float) -> bool:
    """Whether a checkpoint is being written (they are staged beside where they go)."""
    stages = [path for path in checkpoints.iterdir() if path.name.startswith(".") and path.suffix == ".stage"]
    return any(wall - stage.stat().st_mtime < _SAVING_S for stage in stages)
