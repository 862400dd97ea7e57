"""When the run was not healthy: the episodes of its anomalies, told to rank 0, which keeps checkpoints by them.

What counts is an anomaly of severity warning or error that is about a metric (NaN, Inf, a leap of the loss), from its
step on until the run says of that metric that it is over: an anomaly of severity info or good. Gradients that a scaler
makes infinite now and then are of severity info, and never begin an episode.
"""

from collections.abc import Iterable

import msgspec

from trainctl.hub.detect import NOT_FINITE
from trainctl.hub.link import RankLine
from trainctl.wire.messages import Anomaly, Envelope, Event, LinkTrouble, Trouble

# Rank 0 needs those that lie behind its newest checkpoints; a packet of the link holds thousands.
_KEPT = 500


class Health:
    """Follows the recorder; begins with the events of earlier."""

    def __init__(self, line: RankLine, events: Iterable[Event]) -> None:
        self._line = line
        self._troubles: list[Trouble] = []
        self._open: dict[tuple[int, str, str], int] = {}  # incarnation, metric, what → place in `_troubles`
        for event in events:
            self._take(event)

    def follow(self, envelope: Envelope) -> None:
        """Look at one recorded envelope."""
        if isinstance(envelope.body, Anomaly) and self._take(envelope.body):
            self.tell()

    def tell(self) -> None:
        """Tell rank 0 all of it: it may be a new one."""
        self._line.send(LinkTrouble(troubles=self.troubles()))

    def troubles(self) -> list[Trouble]:
        """The newest episodes, in the order in which they began."""
        return self._troubles[-_KEPT:]

    def _take(self, event: object) -> bool:
        if not isinstance(event, Anomaly) or event.metric is None:
            return False
        what = "not finite" if event.what in NOT_FINITE else event.what
        key = (event.incarnation, event.metric, what)
        begins = event.severity in {"warning", "error"}
        if begins is (key in self._open):
            return False  # it goes on, or it never began
        if begins:
            self._open[key] = len(self._troubles)
            self._troubles.append(Trouble(incarnation=event.incarnation, first=event.step))
        else:
            at = self._open.pop(key)
            self._troubles[at] = msgspec.structs.replace(self._troubles[at], last=event.step)
        return True
