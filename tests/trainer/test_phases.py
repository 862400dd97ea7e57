"""Where the time of a step goes: nothing counts twice, nothing is lost, and a device is never waited for."""

import contextlib
import threading
from collections import deque

import pytest

from trainctl.trainer import phases as phases_module
from trainctl.trainer.phases import Phases


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(phases_module, "_clock", made)
    return made


def test_a_phase_is_the_time_between_entering_and_leaving(clock: Clock) -> None:
    phases = Phases()
    for _ in range(2):
        with phases.get("forward"):
            clock.now += 2.0
    phases.add("data", 0.5)
    assert phases.take() == {"forward": 4.0, "data": 0.5}
    assert phases.take() == {}


def test_what_is_added_between_two_looks_is_told_once(clock: Clock) -> None:
    phases = Phases()
    phase = phases.get("forward")
    told = 0.0
    for _ in range(5):
        with phase:
            clock.now += 1.0
            told += phases.take().get("forward", 0.0)  # the sender looks while the phase is open
    assert told + phases.take()["forward"] == 5.0


def test_a_phase_within_another_counts_for_itself_alone(clock: Clock) -> None:
    phases = Phases()
    with phases.get("backward"):
        clock.now += 3.0
        with phases.get("communication"):
            clock.now += 2.0
        clock.now += 1.0
    assert phases.take() == {"backward": 4.0, "communication": 2.0}


def test_a_phase_within_itself_counts_once(clock: Clock) -> None:
    phases = Phases()
    with phases.get("optimizer"):
        clock.now += 1.0
        with phases.get("optimizer"):  # as when the script times the step that the library times
            clock.now += 2.0
    assert phases.take() == {"optimizer": 3.0}


def test_an_evaluation_or_a_save_of_the_scripts_own_is_a_state_of_the_run_once_it_lasts(clock: Clock) -> None:
    phases = Phases()
    assert phases.busy() is None
    with phases.get("eval"):
        clock.now += 0.5
        assert phases.busy() is None, "it would only flicker"
        clock.now += 1.0
        with phases.get("forward"):
            assert phases.busy() == "eval"
    with phases.get("checkpoint"):
        clock.now += 2.0
        assert phases.busy() == "checkpoint"
    with phases.get("forward"):
        clock.now += 60.0
        assert phases.busy() is None


def test_a_phase_that_raises_is_closed(clock: Clock) -> None:
    phases = Phases()
    with contextlib.suppress(KeyError), phases.get("forward"):
        clock.now += 1.0
        raise KeyError
    assert phases.open is None
    assert phases.take() == {"forward": 1.0}


def test_names_are_limited_and_printable(clock: Clock) -> None:
    phases = Phases()
    for number in range(1000):
        with phases.get(f"phase-{number}"):
            clock.now += 1.0
    with phases.get("\x1b[31mred"):
        clock.now += 1.0
    taken = phases.take()
    assert len(taken) <= phases_module.NAMES_LIMIT + 1
    assert sum(taken.values()) == 1001.0
    assert all(name.isprintable() for name in taken)


def test_two_threads_lose_and_double_nothing() -> None:
    phases, stop, told = Phases(), threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            told.append(phases.take().get("data", 0.0))

    sender = threading.Thread(target=look)
    sender.start()
    for _ in range(20_000):
        phases.add("data", 1.0)
    stop.set()
    sender.join()
    assert sum(told) + phases.take().get("data", 0.0) == 20_000.0


class TimedEvent:
    def __init__(self) -> None:
        self.at: float | None = None
        self.broken = False

    def query(self) -> bool:
        if self.broken:
            raise RuntimeError("the device is gone")
        return self.at is not None

    def elapsed_time(self, end: "TimedEvent") -> float:
        assert self.at is not None
        assert end.at is not None
        return (end.at - self.at) * 1000.0


class TimedDevice:
    """Its work takes time that passes when the test says so; events are passed in order."""

    def __init__(self) -> None:
        self.queue: deque[TimedEvent | float] = deque()
        self.made = 0
        self.now = 0.0
        self.captures = False

    def capturing(self) -> bool:
        return self.captures

    def event(self) -> TimedEvent:
        self.made += 1
        return TimedEvent()

    def record(self, event: TimedEvent) -> None:
        event.at = None
        self.queue.append(event)

    def busy(self, seconds: float) -> None:
        self.queue.append(seconds)

    def work(self) -> None:
        while self.queue:
            item = self.queue.popleft()
            if isinstance(item, float):
                self.now += item
            else:
                item.at = self.now

    def copy(self, value: object, slot: int) -> None:
        raise NotImplementedError

    def read(self, slot: int) -> float:
        raise NotImplementedError


def test_while_a_graph_is_captured_no_event_is_recorded_and_nothing_counts_as_lost() -> None:
    device = TimedDevice()
    phases = Phases(device)
    device.captures = True
    with phases.get("backward"):
        pass
    assert (list(device.queue), phases.take(), phases.lost) == ([], {}, 0)
    device.captures = False
    with phases.get("backward"):
        device.busy(3.0)
    device.work()
    assert phases.take() == {"backward": 3.0}


def test_a_devices_phase_is_known_when_the_device_came_to_its_end() -> None:
    device = TimedDevice()
    phases = Phases(device)
    with phases.get("backward"):
        device.busy(3.0)
        with phases.get("communication"):
            device.busy(2.0)
    assert phases.take() == {}
    device.work()
    assert phases.take() == {"communication": 2.0, "backward": 3.0}


def test_events_are_used_again_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Phases, "EVENTS", 8)
    device = TimedDevice()
    phases = Phases(device)
    for _ in range(100):
        with phases.get("forward"):
            device.busy(1.0)
        device.work()
        assert phases.take() == {"forward": 1.0}
    assert device.made == 2
    for _ in range(6):
        with phases.get("forward"):
            device.busy(1.0)
    assert phases.lost == 2, "four intervals hold eight events"
    device.work()
    assert phases.take() == {"forward": 4.0}


def test_a_device_that_failed_ends_its_timing_and_no_other() -> None:
    device = TimedDevice()
    phases = Phases(device)
    with phases.get("forward"):
        pass
    for event in device.queue:
        assert isinstance(event, TimedEvent)
        event.broken = True
    phases.add("data", 1.0)
    assert phases.take() == {"data": 1.0}
    assert phases.lost == 1
