"""The audit log as the desk writes it: entries that it does not take wait here, in their order, until it does.

A line in front of those that come late tells of the gap: since when the log could not be written, why, how many lines
follow from that time, and how many are lost because too many waited.
"""

import json
import logging
import time
from collections.abc import Iterable
from typing import Final

import msgspec

from trainctl.store.audit import AuditLog, Json
from trainctl.store.audit_entries import Entry, outcome_entry
from trainctl.wire.commands import FINAL_COMMAND_STATES
from trainctl.wire.messages import CommandUpdate

log = logging.getLogger(__name__)

KEPT: Final = 1000  # about a megabyte
_REFUSALS: Final = {"rejected", "conflict"}


class AuditTrail:
    """Writes to a log through its trouble. Called from threads, by one at a time."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        self._kept: list[Entry] = []
        self._why = ""  # the log did not take them
        self.lost = 0  # of those that were to wait, in all
        self._lost_told = 0

    @property
    def waiting(self) -> bool:
        """Whether there are entries that the log has not taken."""
        return bool(self._kept)

    def write(self, entry: Entry, *, keep: bool) -> None:
        """Append an entry behind those that wait, all or none of them.

        Raises `NotTheWriter`, or OSError: then none of them is in the log, and with `keep` the entry waits too.
        """
        try:
            self._append([entry])
        except OSError as error:
            if keep:
                self.keep([entry], error.strerror or str(error))
            raise

    def write_late(self) -> None:
        """Append those that wait. Raises OSError or `NotTheWriter`, and then they go on waiting."""
        if self._kept:
            self._append([])

    def keep(self, entries: Iterable[Entry], why: str) -> None:
        """Let entries wait. Where too many do, refusals are lost first: nothing followed from them."""
        self._why = why
        self._kept += entries
        while len(self._kept) > KEPT:
            self.lost += 1
            self._kept.remove(next((entry for entry in self._kept if entry["state"] in _REFUSALS), self._kept[0]))

    def give_up(self) -> None:
        """Nobody will try again: what waits is told to the hub's log."""
        for entry in self._kept:
            log.error("the audit log has no line of this: %s", json.dumps(entry))
        self._kept = []

    def _append(self, entries: list[Entry]) -> None:
        late = [self._gap(), *self._kept] if self._kept else []
        self._audit.append(*late, *entries)
        self._kept, self._lost_told = [], self.lost

    def _gap(self) -> Entry:
        lost = self.lost - self._lost_told
        return {
            "time": time.time(),
            "id": "",
            "actor": "hub",
            "state": "gap",
            "since": self._kept[0]["time"],
            "late": len(self._kept),
            "lost": lost,
            "reason": f"the log could not be written ({self._why}): the next {len(self._kept)} lines are from then, "
            f"and {lost or 'none'} are lost",
        }


def unwritten(outcomes: Iterable[CommandUpdate], lines: Iterable[str]) -> list[Entry]:
    """The entries of outcomes that these lines do not have, oldest first."""
    written = set()
    for line in lines:
        try:
            entry = msgspec.json.decode(line, type=dict[str, Json])
        except msgspec.MsgspecError:
            continue  # whoever verifies the log is told
        written.add((entry.get("id"), entry.get("state")))
    missing = [
        update
        for update in outcomes
        if update.state in FINAL_COMMAND_STATES and (update.id, update.state) not in written
    ]
    return [outcome_entry(update) for update in sorted(missing, key=lambda update: update.time)]
