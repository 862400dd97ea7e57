"""Ranks that were seen here and have no place file now: they closed their run, or their death was told long ago.

When an attempt is ended, torchrun ends ranks before the agents are asked. One whose script heeds SIGTERM, or catches
the error of a collective that ranks of another node left, says goodbye then. It is gone as was wanted, and not unknown.
"""

from collections.abc import Collection
from typing import Final

from trainctl.wire.places import Place

REMEMBERED: Final = 256  # places, the newest: more than a node's ranks in any attempt that can still be ended


class Departed:
    """Places that stand in no file any more. A process may still be on its way out."""

    def __init__(self) -> None:
        self._places: dict[Place, None] = {}

    def add(self, place: Place) -> None:
        self._places.pop(place, None)
        self._places[place] = None
        if len(self._places) > REMEMBERED:
            del self._places[next(iter(self._places))]

    def see(self, present: Collection[Place]) -> None:
        """Forget the processes that are ranks now: what one closed a run before it began the next is none of it."""
        processes = {(place.pid, place.started) for place in present}
        for place in [place for place in self._places if (place.pid, place.started) in processes]:
            del self._places[place]

    def of(self, run_id: str, attempt: int) -> list[Place]:
        return [place for place in self._places if (place.run_id, place.attempt) == (run_id, attempt)]
