"""A setting that waits gives way to a newer one of the same operator, and is superseded once that one is applied.

Where the newer one comes to nothing (its condition does not hold, it expired, was refused or cancelled) the older one
is carried out after all: an operator who sent both wanted one of them. Pure.
"""

from typing import Final

from trainctl.wire.messages import LinkCancel

# After one that may have been applied the older one may not come any more.
_TOOK_THE_PLACE: Final = frozenset({"applied", "superseded", "unknown"})
_CAME_TO_NOTHING: Final = frozenset({"rejected", "conflict", "expired", "failed"})


class GivingWay:
    """Which commands give way to which newer ones; `take` is called by the sender thread, the rest by the leader's."""

    def __init__(self) -> None:
        self._cancels: dict[str, LinkCancel] = {}  # by the older command's id; a newer cancel takes the place of one

    def take(self, cancel: LinkCancel) -> None:
        self._cancels[cancel.id] = cancel

    def newer_than(self, command_id: str) -> str | None:
        """The command to which this one gives way, if to any."""
        found = self._cancels.get(command_id)
        return None if found is None else found.superseded_by

    def ended(self, newer: str, state: str) -> list[LinkCancel]:
        """`newer` is in that state now: those whose place it took, once that is certain."""
        if state not in _TOOK_THE_PLACE | _CAME_TO_NOTHING:
            return []
        gone = [cancel for cancel in list(self._cancels.values()) if cancel.superseded_by == newer]
        for cancel in gone:
            self._cancels.pop(cancel.id, None)
        return gone if state in _TOOK_THE_PLACE else []
