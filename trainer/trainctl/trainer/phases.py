"""Where the time of a step goes. Entering and leaving a phase costs two clock readings and no synchronisation.

On a CUDA device the work of a phase ends long after its `with` block, so there a pair of events is recorded on the
current stream and read by the sender thread once they have passed.

A phase within another counts for itself alone: its time is taken off the outer one's, so that the shares of a step add
up. Each phase's seconds only grow, written by one thread; the sender takes differences, so nothing counts twice.
"""

import time
from collections import deque
from types import TracebackType
from typing import Any, Self, TypeAlias

from trainctl.trainer.device import Device, Event

_clock = time.perf_counter
NAMES_LIMIT = 64
_NAME_LENGTH = 60
_OTHER = "other"
# Waiting for data, evaluating and saving are the host's: their wall time is what the operator asks about.
_OF_THE_HOST = frozenset({"data", "eval", "checkpoint"})
# A script's own evaluation or save. One that takes no second is no state of the run: it would only flicker.
_NO_STEP_DUE = frozenset({"eval", "checkpoint"})
_BUSY_S = 1.0


class Phase:
    """A context manager that sums the time spent in it. Made once a name, used by one thread."""

    __slots__ = ("_depth", "_inner", "_outer", "_phases", "name", "seconds", "started")

    def __init__(self, name: str, phases: "Phases") -> None:
        self.name = name
        self.seconds = 0.0
        self._phases = phases
        self._depth = 0
        self._outer: Any = None
        self._inner = 0.0
        self.started = 0.0

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            phases = self._phases
            self._outer = phases.open
            self._inner = 0.0
            self.started = _clock()
            phases.open = self  # last, so that whoever sees it open sees since when
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = _clock()
        self._depth -= 1
        if self._depth == 0:
            taken = ended - self.started
            outer = self._outer
            self._phases.open = outer
            if type(outer) is Phase:
                outer._inner += taken
            self.seconds += taken - self._inner


class DevicePhase:
    """The same by a device's events: nothing waits, and the sum is known a little later."""

    __slots__ = ("_depth", "_outer", "_phases", "_start", "inner", "name", "seconds", "started")

    def __init__(self, name: str, phases: "Phases") -> None:
        self.name = name
        self.seconds = 0.0
        self._phases = phases
        self._depth = 0
        self._outer: Any = None
        self._start: Event | None = None
        self.inner = [0.0]  # of the interval at hand: what inner phases took, known when this one is read
        self.started = 0.0  # on the host

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._outer = self._phases.open
            self.inner = [0.0]
            self.started = _clock()
            self._phases.open = self
            self._start = self._phases.stamp()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            outer = self._phases.open = self._outer
            inner_of_outer = outer.inner if type(outer) is DevicePhase else None
            self._phases.interval(self, self._start, self.inner, inner_of_outer)


class NoPhase:
    """What `phase` gives where trainctl is off."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


_Interval: TypeAlias = tuple[DevicePhase, Event, Event, list[float], list[float] | None]


class Phases:
    """The phases of one rank. `get` is for the training thread, `take` for the sender thread."""

    EVENTS = 8192

    def __init__(self, device: Device | None = None) -> None:
        self.open: Any = None  # the innermost phase that is open
        self.lost = 0  # intervals for which no event was free
        self._device = device
        self._known: dict[str, Phase | DevicePhase] = {}
        self._told: dict[str, float] = {}
        self._intervals: deque[_Interval] = deque()
        self._free: deque[Event] = deque()
        self._made = 0

    def get(self, name: str) -> Phase | DevicePhase:
        try:
            return self._known.get(name) or self._make(name)
        except Exception:  # noqa: BLE001 - a name that has no hash, or whose class raises: the time counts all the same
            return self._known.get(_OTHER) or self._make(_OTHER)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere on the host, from the training thread."""
        self.get(name).seconds += seconds

    def current(self) -> tuple[str, float] | None:
        """The innermost phase that the training thread is in now and for how many seconds of the host's clock."""
        phase = self.open
        return None if phase is None else (phase.name, max(0.0, _clock() - phase.started))

    def busy(self) -> str | None:
        """An open phase in which no step is due, once it has lasted for a second: `eval` or `checkpoint`."""
        phase = self.open
        while phase is not None:
            if phase.name in _NO_STEP_DUE:
                return str(phase.name) if _clock() - phase.started > _BUSY_S else None
            phase = phase._outer
        return None

    def stamp(self) -> Event | None:
        """An event at this point of the device's work; None when all are on their way, or a graph is captured."""
        device = self._device
        assert device is not None
        if device.capturing():
            return None  # an event of a graph is recorded at its replays, and cannot be asked
        if self._free:
            event = self._free.popleft()
        elif self._made < self.EVENTS:
            event = device.event()
            self._made += 1
        else:
            return None
        device.record(event)
        return event

    def interval(
        self, phase: DevicePhase, start: Event | None, inner: list[float], inner_of_outer: list[float] | None
    ) -> None:
        """Keep an interval that ends here until its events have passed."""
        end = self.stamp() if start is not None else None
        if start is None or end is None:
            assert self._device is not None
            self.lost += 0 if self._device.capturing() else 1  # what is captured takes no time of the device now
            if start is not None:
                self._free.append(start)
        else:
            self._intervals.append((phase, start, end, inner, inner_of_outer))

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, as far as they are known."""
        self._read_events()
        taken: dict[str, float] = {}
        for phase in list(self._known.values()):
            seconds = phase.seconds
            grown = seconds - self._told.get(phase.name, 0.0)
            if grown > 0.0:
                taken[phase.name] = grown
                self._told[phase.name] = seconds
        return taken

    def _make(self, name: str) -> Phase | DevicePhase:
        known = self._known
        shown = "".join(c for c in str(name) if c.isprintable())[:_NAME_LENGTH] or _OTHER
        if len(known) >= NAMES_LIMIT:
            shown = _OTHER  # names that contain a number must not grow without end
        if shown not in known:
            host = self._device is None or shown in _OF_THE_HOST
            known[shown] = Phase(shown, self) if host else DevicePhase(shown, self)
        if len(known) < NAMES_LIMIT:
            known[name] = known[shown]
        return known[shown]

    def _read_events(self) -> None:
        intervals = self._intervals
        while intervals:
            phase, start, end, inner, inner_of_outer = intervals[0]
            try:
                if not end.query():
                    return
                seconds = start.elapsed_time(end) / 1000.0
            except RuntimeError:  # the device failed: the script hears of it, and the other figures go on
                self.lost += len(intervals)
                intervals.clear()
                return
            intervals.popleft()
            if inner_of_outer is not None:
                inner_of_outer[0] += seconds  # the outer interval ends later, and is read after this one
            phase.seconds += max(0.0, seconds - inner[0])
            self._free.append(start)
            self._free.append(end)
