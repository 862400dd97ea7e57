"""How often somebody is woken at most, and that nobody sleeps through what lasts. Pure: the clock is an argument."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from trainctl.hub.alerts_rules import Key, is_over, sameness, urgent
from trainctl.wire.messages import Anomaly, Event, NodeChanged, RankChanged, RolledBack, Severity, StateChanged

_HOUR_S = 3600.0
_REMEMBERED = 1000
# A hub that was started again finds what its predecessor found within this time, and says it once more.
_FINDS_AGAIN_S = 300.0
_SAYS_SO = StateChanged | Anomaly | RankChanged | NodeChanged | RolledBack


@dataclass(kw_only=True)
class HeldBack:
    """Alerts that were not sent since the last one that was."""

    repeated: int = 0  # the same thing again within `repeat_s`
    over_rate: int = 0  # more than `per_hour`, or more at once than can wait

    def words(self) -> str:
        """A sentence's end, empty when nothing was held back."""
        count = self.repeated + self.over_rate
        if not count:
            return ""
        return f" ({count} alert{'s were' if count > 1 else ' was'} held back before this one)"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How often: `per_hour` altogether, and not the same thing again within `repeat_s`."""

    per_hour: int
    repeat_s: float


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """The newest alert of an episode that has to wait."""

    event: Event
    counted: HeldBack  # where it is counted, until that was told
    repeated: bool


@dataclass(kw_only=True)
class Gate:
    """Lets an alert through, or keeps it until it may go. `now` is seconds of a monotonic clock.

    An alert that is held back goes when `due` finds that its time has come, unless its episode ended before. An
    episode that ended and begins again is not the same thing again. The states of `urgent` have limits of their own,
    one each: however much else there was to tell, there is room for the run's end.
    """

    held: HeldBack = field(default_factory=HeldBack)
    _sent: dict[str | None, deque[float]] = field(default_factory=dict)
    _last: dict[Key, float] = field(default_factory=dict)
    _kept: dict[Key, _Kept] = field(default_factory=dict)
    _before: dict[Key, set[str]] = field(default_factory=dict)
    _began: float = 0.0

    def remember(self, events: Iterable[Event], now: float, *, severities: frozenset[Severity]) -> None:
        """What was told before this hub began, oldest first, as far as it is not over: nobody is woken for it again."""
        self._began = now
        for event in events:
            for key in [key for key in self._before if is_over(key, event)]:
                del self._before[key]
            told = isinstance(event, Anomaly | RankChanged | NodeChanged) and event.severity in severities
            if told or urgent(event) is not None:
                self._before.setdefault(sameness(event), set()).add(_particulars(event))
                while len(self._before) > _REMEMBERED:
                    del self._before[next(iter(self._before))]

    def note(self, event: Event) -> None:
        """Hear of any event: some say that an episode is over, and what is kept of it need not be sent."""
        if not isinstance(event, _SAYS_SO):
            return
        for key in [key for key in self._last if is_over(key, event)]:
            del self._last[key]
        for key in [key for key in self._kept if is_over(key, event)]:
            del self._kept[key]
        for key in [key for key in self._before if is_over(key, event)]:
            if not self._still_stands(key, event):
                del self._before[key]

    def admit(self, event: Event, now: float, limits: Limits, *, room: bool = True) -> bool:
        """Whether an alert may go out now; without `room` only an urgent one may."""
        key = sameness(event)
        if self._told_before(key, event, now):
            self.held.repeated += 1
            return False
        repeated = self._repeats(key, now, limits)
        if repeated or not self._within(event, now, limits) or not (room or urgent(event)):
            self._keep(key, event, repeated=repeated)
            return False
        self._let(key, event, now)
        return True

    def due(self, now: float, limits: Limits) -> Event | None:
        """The first alert that was kept and may go out now, if there is one."""
        for key, kept in self._kept.items():
            if not self._repeats(key, now, limits) and self._within(kept.event, now, limits):
                self._uncount(kept)
                self._let(key, kept.event, now)
                return kept.event
        return None

    def take_held(self) -> HeldBack:
        """What was held back so far; the count begins anew."""
        held, self.held = self.held, HeldBack()
        return held

    def _repeats(self, key: Key, now: float, limits: Limits) -> bool:
        last = self._last.get(key)
        return last is not None and now - last < limits.repeat_s

    def _within(self, event: Event, now: float, limits: Limits) -> bool:
        state = urgent(event)
        sent = self._sent.setdefault(state, deque())
        while sent and now - sent[0] >= _HOUR_S:
            sent.popleft()
        return len(sent) < (limits.per_hour if state is None else max(1, limits.per_hour))

    def _keep(self, key: Key, event: Event, *, repeated: bool) -> None:
        if repeated:
            self.held.repeated += 1
        else:
            self.held.over_rate += 1
        self._kept.pop(key, None)
        self._kept[key] = _Kept(event=event, counted=self.held, repeated=repeated)
        while len(self._kept) > _REMEMBERED:
            del self._kept[next(iter(self._kept))]

    def _uncount(self, kept: _Kept) -> None:
        """It is sent after all; where that it was held back is told already, nothing is to be mended."""
        if kept.counted is self.held and kept.repeated:
            self.held.repeated -= 1
        elif kept.counted is self.held:
            self.held.over_rate -= 1

    def _let(self, key: Key, event: Event, now: float) -> None:
        self._sent.setdefault(urgent(event), deque()).append(now)
        self._kept.pop(key, None)
        self._last.pop(key, None)
        self._last[key] = now
        while len(self._last) > _REMEMBERED:
            del self._last[next(iter(self._last))]

    def _told_before(self, key: Key, event: Event, now: float) -> bool:
        told = self._before.get(key)
        if told is None or _particulars(event) not in told:
            return False
        return urgent(event) is not None or now - self._began < _FINDS_AGAIN_S

    def _still_stands(self, key: Key, event: Event) -> bool:
        """A new hub takes a run for running until it has watched it long enough: at the step at which it was known to
        stall, that is no recovery."""
        return (
            isinstance(event, StateChanged)
            and event.state == "running"
            and key == ("state", "stalled", str(event.attempt))
            and _particulars(event) in self._before[key]
        )


def _particulars(event: Event) -> str:
    """What distinguishes an episode from a later one of the same key, where the end between them went unseen."""
    match event:
        case StateChanged():
            return str(event.step)
        case Anomaly():
            return event.text
        case _:
            return ""
