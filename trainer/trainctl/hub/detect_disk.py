"""Notices that the file system of the run's directory is nearly full. Pure: readings and the clock are arguments."""

from dataclasses import dataclass
from typing import Final

from trainctl.wire.figures import file_size
from trainctl.wire.messages import Severity

LOW: Final = "disk-low"
FULL: Final = "disk-full"
CHECKPOINT: Final = "disk-checkpoint"
HANGS: Final = "disk-hangs"

GB: Final = 10**9
# The smaller of a share and a size: 5 % of a petabyte is plenty, and 20 GB of a small disk is all of it.
LOW_SHARE, LOW_BYTES = 0.05, 20 * GB
FULL_SHARE, FULL_BYTES = 0.01, 2 * GB
# Manifests, the journal and the file system's own tables need room beside a checkpoint.
CHECKPOINT_TIMES: Final = 1.1
# A retention that deletes the oldest checkpoint after a new one frees as much as was taken, a little later.
CHECKPOINT_FOR_S: Final = 60.0
OVER_TIMES: Final = 1.25
HANGS_S: Final = 30.0


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a file system says of itself: its size, and what a user without privileges may still write."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to tell; `good` when it is over."""

    what: str
    text: str
    severity: Severity


@dataclass(frozen=True, kw_only=True)
class _Rule:
    what: str
    limit_bytes: float
    severity: Severity
    meaning: str


class DiskWatch:
    """Tells once when room gets short and once when there is enough again, with a quarter's hysteresis between."""

    def __init__(self, where: str, open_episodes: set[str]) -> None:
        self._where = where
        self._open = set(open_episodes)
        self._short_since: dict[str, float] = {}

    def observe(self, room: Room, checkpoint_bytes: int, now: float, *, saving: bool = False) -> list[Finding]:
        """Judge a reading. `checkpoint_bytes` is the newest checkpoint's size, 0 without one; while one is being saved
        (`saving`) nothing is said of the next. `now` is seconds of a monotonic clock."""
        found = [self._answers()] if HANGS in self._open else []
        if room.total_bytes <= 0:
            return found  # some file systems do not know how large they are
        for rule in _rules(room, checkpoint_bytes):
            if rule.what == CHECKPOINT and saving:
                self._short_since.pop(CHECKPOINT, None)
                continue
            finding = self._judge(rule, room, now)
            if finding is not None:
                found.append(finding)
        return found

    def silent(self, for_s: float) -> list[Finding]:
        """The file system has not answered for so long."""
        if for_s < HANGS_S or HANGS in self._open:
            return []
        self._open.add(HANGS)
        text = (
            f"the file system of {self._where} has not answered for {for_s:.0f} s: checkpoints and the journal may "
            "hang with it; look at its server or mount"
        )
        return [Finding(what=HANGS, text=text, severity="error")]

    def _answers(self) -> Finding:
        self._open.discard(HANGS)
        return Finding(what=HANGS, text=f"the file system of {self._where} answers again", severity="good")

    def _judge(self, rule: _Rule, room: Room, now: float) -> Finding | None:
        free = f"{file_size(room.free_bytes)} of {file_size(room.total_bytes)} are free in {self._where}"
        if rule.what in self._open:
            if room.free_bytes < OVER_TIMES * rule.limit_bytes:
                return None
            self._open.discard(rule.what)
            return Finding(what=rule.what, text=f"there is room again: {free}", severity="good")
        if room.free_bytes >= rule.limit_bytes:
            self._short_since.pop(rule.what, None)
            return None
        since = self._short_since.setdefault(rule.what, now)
        if rule.what == CHECKPOINT and now - since < CHECKPOINT_FOR_S:
            return None
        del self._short_since[rule.what]
        self._open |= {FULL, LOW} if rule.what == FULL else {rule.what}  # full is low too: told once
        return Finding(what=rule.what, text=f"{free}: {rule.meaning}", severity=rule.severity)


def _rules(room: Room, checkpoint_bytes: int) -> list[_Rule]:
    rules = [
        _Rule(
            what=FULL,
            limit_bytes=min(FULL_SHARE * room.total_bytes, FULL_BYTES),
            severity="error",
            meaning="checkpoints and the journal are about to fail; make room now",
        ),
        _Rule(
            what=LOW,
            limit_bytes=min(LOW_SHARE * room.total_bytes, LOW_BYTES),
            severity="warning",
            meaning="make room before checkpoints fail",
        ),
    ]
    needed = CHECKPOINT_TIMES * checkpoint_bytes
    if checkpoint_bytes:
        rules.append(
            _Rule(
                what=CHECKPOINT,
                limit_bytes=needed,
                severity="error",
                meaning=f"that will not hold the next checkpoint, which takes {file_size(needed)}",
            )
        )
    return rules
