"""Scalars of a device: nobody waits for it, order is kept, memory is bounded, and what is given up is counted.

The device is in memory: what is queued on it happens when the test says so.
"""

from collections import deque
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainctl.trainer.buffer import Entry, NotANumber, Rewind, RowBuffer, StepMark
from trainctl.trainer.device import Pools, ScalarPool, let_captures_be


class MemoryEvent:
    def __init__(self) -> None:
        self.passed = True
        self.broken = False

    def query(self) -> bool:
        if self.broken:
            raise RuntimeError("device-side assert")
        return self.passed

    def elapsed_time(self, end: "MemoryEvent") -> float:
        raise NotImplementedError


class MemoryDevice:
    """One stream. A scalar on `meta` holds no number, so the numbers lie in `numbers`, in the order of logging."""

    def __init__(self, slots: int = 8) -> None:
        self.slots = [float("nan")] * slots
        self.numbers: deque[float] = deque()
        self.queue: deque[partial[None]] = deque()
        self.made = 0
        self.captures = False

    def capturing(self) -> bool:
        return self.captures

    def copy(self, value: torch.Tensor, slot: int) -> None:
        assert value.shape == ()
        number = self.numbers.popleft()
        self.queue.append(partial(self.slots.__setitem__, slot, number))

    def read(self, slot: int) -> float:
        return self.slots[slot]

    def event(self) -> MemoryEvent:
        self.made += 1
        return MemoryEvent()

    def record(self, event: MemoryEvent) -> None:
        event.passed = False
        self.queue.append(partial(setattr, event, "passed", True))

    def work(self, pieces: int | None = None) -> None:
        """Do what was queued, all of it or some pieces."""
        for _ in range(len(self.queue) if pieces is None else pieces):
            self.queue.popleft()()


class Rank:
    def __init__(self, *, slots: int = 8, calls: int = 4, capacity: int = 100) -> None:
        self.device = MemoryDevice(slots)
        self.pool = ScalarPool(self.device, slots=slots, calls=calls)
        pools = Pools()
        pools._pools[torch.device("meta")] = self.pool
        self.buffer = RowBuffer(capacity, pools=pools)

    def log(self, step: int, **values: Any) -> None:
        """Floats that are given as strings are the device's."""
        given: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, str):
                self.device.numbers.append(float(value))
                given[name] = torch.empty((), device="meta")
            else:
                given[name] = value
        before = self.buffer.not_copied
        self.buffer.log(step, given)
        if self.buffer.not_copied > before:
            self.device.numbers.clear()

    def take(self) -> list[dict[str, Any]]:
        return [entry[1] for entry in self.buffer.take(1000) if not isinstance(entry, StepMark | Rewind)]


def mark(step: int) -> Entry:
    return StepMark(step, 0.0, 0.1, 0, 0, None, None)


def test_a_value_is_read_when_the_device_came_to_it_and_not_before() -> None:
    rank = Rank()
    rank.log(1, loss="2.5", lr=0.1)
    assert rank.take() == [], "the device has not done it, and nobody waits"
    rank.device.work()
    assert rank.take() == [{"loss": 2.5, "lr": 0.1}]


def test_what_comes_behind_a_value_on_its_way_waits_for_it() -> None:
    rank = Rank()
    rank.log(1, early=1.0)
    rank.log(1, loss="2.5")
    rank.buffer.put(mark(1))
    rank.log(2, late=3.0)
    assert rank.take() == [{"early": 1.0}]
    assert len(rank.buffer) == 3
    rank.device.work()
    assert rank.take() == [{"loss": 2.5}, {"late": 3.0}]


def test_slots_and_events_are_made_once_and_used_again() -> None:
    rank = Rank(slots=8, calls=4)
    for step in range(1, 101):
        rank.log(step, loss=str(step), norm=str(-step))
        rank.device.work()
        assert rank.take() == [{"loss": float(step), "norm": float(-step)}]
    assert rank.device.made == 4
    assert rank.buffer.not_copied == 0


def test_values_for_which_there_is_no_slot_are_given_up_and_counted() -> None:
    rank = Rank(slots=8, calls=100)
    for step in range(1, 6):
        rank.log(step, a=str(step), b=str(step), host=0.5)
    assert rank.buffer.not_copied == 2, "the fifth call found eight slots taken"
    rank.device.work()
    taken = rank.take()
    assert taken[:4] == [{"a": float(n), "b": float(n), "host": 0.5} for n in range(1, 5)]
    assert taken[4] == {"host": 0.5}, "the host's value needs no slot"
    rank.log(6, a="6")
    rank.device.work()
    assert rank.take() == [{"a": 6.0}], "and there is room again"


def test_calls_for_which_there_is_no_event_are_given_up_and_counted() -> None:
    rank = Rank(slots=100, calls=2)
    for step in range(1, 4):
        rank.log(step, loss=str(step))
    assert rank.buffer.not_copied == 1
    rank.device.work()
    assert rank.take() == [{"loss": 1.0}, {"loss": 2.0}]


def test_a_device_that_failed_loses_its_values_and_nothing_else() -> None:
    rank = Rank()
    rank.log(1, loss="1", lr=0.1)
    (entry,) = rank.buffer.entries
    assert not isinstance(entry, StepMark | Rewind)
    event = entry[2][0]._event
    assert isinstance(event, MemoryEvent)
    event.broken = True
    rank.log(1, late=2.0)
    assert rank.take() == [{"lr": 0.1}, {"late": 2.0}]
    assert rank.buffer.not_read == 1


def test_a_device_that_cannot_be_read_without_stopping_it_is_named() -> None:
    buffer = RowBuffer(pools=Pools())
    buffer.log(1, {"loss": torch.empty((), device="meta")})
    (entry,) = buffer.take(10)
    assert not isinstance(entry, StepMark | Rewind)
    value = entry[1]["loss"]
    assert isinstance(value, NotANumber)
    assert "cannot be read without stopping it" in value.what


def test_a_tensor_of_the_host_is_read_at_once_so_that_the_next_step_cannot_change_it() -> None:
    buffer = RowBuffer()
    loss = torch.tensor(1.5, requires_grad=True)
    counts = torch.tensor([7])
    buffer.log(1, {"loss": loss, "count": counts})
    with torch.no_grad():
        loss.fill_(9.0)
    (entry,) = buffer.take(10)
    assert not isinstance(entry, StepMark | Rewind)
    assert entry[1] == {"loss": 1.5, "count": 7.0}


@pytest.mark.parametrize("value", [torch.zeros(3), torch.tensor(1 + 2j), torch.zeros(0)])
def test_a_tensor_that_is_no_number_is_said_to_be_none(value: torch.Tensor) -> None:
    buffer = RowBuffer()
    buffer.log(1, {"x": value})
    (entry,) = buffer.take(10)
    assert not isinstance(entry, StepMark | Rewind)
    assert isinstance(entry[1]["x"], NotANumber)


def test_a_full_buffer_refuses_and_counts_but_never_a_rollback() -> None:
    buffer = RowBuffer(capacity=2)
    for step in range(5):
        buffer.log(step, {"loss": 1.0})
    buffer.put(mark(5))
    buffer.put(Rewind(3, 2, {}))
    assert (len(buffer), buffer.refused) == (3, 4)


def test_nothing_of_ours_becomes_part_of_a_graph_that_is_captured() -> None:
    rank = Rank()
    rank.device.captures = True
    rank.log(1, loss="1.0", acc=0.5)
    assert not rank.device.queue
    assert rank.buffer.not_copied == 1
    rank.device.captures = False
    rank.log(2, loss="2.0")
    assert rank.device.queue


def test_the_thread_that_asks_events_takes_itself_out_of_what_a_capture_forbids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int]] = []

    class Runtime:
        def __init__(self, name: str) -> None:
            self.name = name

        def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> int:  # noqa: N802 - CUDA's name
            asked.append((self.name, mode._obj.value))
            return 0

    assert not let_captures_be(), "there is no device here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr("ctypes.CDLL", Runtime)
    assert let_captures_be()
    assert asked == [("libcudart.so.12", 2)]


def test_wide_calls_are_refused_and_counted_before_they_fill_the_memory_and_taken_again_when_there_is_room() -> None:
    buffer = RowBuffer(values=2500)
    wide = {f"layer_{number}": 1.0 for number in range(1000)}
    for step in range(5):
        buffer.log(step, dict(wide))
    assert (len(buffer), buffer.refused, buffer.refused_wide) == (3, 0, 2)
    assert len(buffer.take(10)) == 3
    buffer.log(6, dict(wide))
    assert (len(buffer), buffer.refused_wide) == (1, 2)


def test_what_is_no_number_is_not_kept_alive() -> None:
    buffer = RowBuffer()
    buffer.log(1, {"text": "x" * 1000, "array": np.zeros(1000), "list": [1.0] * 1000, "scalar": np.float32(0.5)})
    (entry,) = buffer.take(10)
    assert not isinstance(entry, StepMark | Rewind)
    kept = entry[1]
    assert [kept[name] for name in ("text", "array", "list")] == [NotANumber(of) for of in ("str", "ndarray", "list")]
    assert kept["scalar"] == 0.5


@given(st.lists(st.tuples(st.sampled_from(["log", "work", "take"]), st.integers(1, 3)), max_size=80))
def test_in_any_interleaving_values_arrive_once_in_order_or_are_counted(moves: list[tuple[str, int]]) -> None:
    rank = Rank(slots=4, calls=3, capacity=1000)
    sent, came = 0, []
    for move, amount in moves:
        if move == "log":
            names = [f"m{number}" for number in range(amount)]
            rank.log(1, **{name: str(sent + number) for number, name in enumerate(names)})
            sent += amount
        elif move == "work":
            rank.device.work(min(amount, len(rank.device.queue)))
        else:
            came += [value for values in rank.take() for value in values.values()]
    rank.device.work()
    came += [value for values in rank.take() for value in values.values()]
    assert came == sorted(set(came))
    assert len(came) + rank.buffer.not_copied == sent
