"""Scalars of a device, brought to the host without anybody waiting for the device.

Each `run.log()` that has device scalars copies them into slots of pinned memory and records one event behind the
copies, all on the device's current stream. The sender thread reads the slots once the event has passed. Slots and
events are a ring that is made once and reused: when the device lags so far behind that none is free, the values are
given up and counted, and training goes on.
"""

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

SLOTS = 4096
CALLS = 1024
_RELAXED: Final = 2  # cudaStreamCaptureModeRelaxed, and HIP's


def let_captures_be() -> bool:
    """Call once in a thread that asks events: without it, a query here fails the capture of a CUDA graph elsewhere.

    CUDA forbids such calls to every thread while one captures in the global mode, which is torch's default; a thread
    may take itself out of that. Returns whether it could be done; there is nothing to do without a device.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    version = str(torch.version.cuda or "").partition(".")[0]
    known = [(f"libcudart.so.{version}", "cudaThreadExchangeStreamCaptureMode")] if version else []
    if getattr(torch.version, "hip", None):
        known = [("libamdhip64.so", "hipThreadExchangeStreamCaptureMode")]
    for library, function in known:
        with contextlib.suppress(OSError, AttributeError):
            return bool(getattr(ctypes.CDLL(library), function)(ctypes.byref(ctypes.c_int(_RELAXED))) == 0)
    return False


def _never() -> bool:
    return False


def capturing(device: torch.device) -> Callable[[], bool]:
    """Whether the calling thread's current stream is capturing a graph: then what is queued happens at each replay."""
    if device.type != "cuda":
        return _never
    return torch.cuda.is_current_stream_capturing


class Event(Protocol):
    """What a device's event can be asked."""

    def query(self) -> bool:
        """Whether everything before it is done. Raises RuntimeError when the device failed."""

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from this event to `end`; both have passed."""


class Device(Protocol):
    """What of a device is needed; tests have one in memory whose events pass when they say so."""

    def copy(self, value: Tensor, slot: int) -> None:
        """Queue the copy of a scalar into a slot."""

    def read(self, slot: int) -> float:
        """What the newest copy into a slot brought, once an event behind it has passed."""

    def event(self) -> Event:
        """A new event."""

    def record(self, event: Any) -> None:
        """Queue an event behind everything queued so far."""

    def capturing(self) -> bool:
        """Whether what is queued now becomes part of a graph, and is not done now."""


class Accelerator:
    """A CUDA or ROCm device, or another whose torch module has streams and events (XPU).

    Raises AttributeError or RuntimeError for one that has none.
    """

    def __init__(self, device: torch.device, slots: int = SLOTS, *, timing: bool = False) -> None:
        module: Any = torch.get_device_module(device)
        self._new_event, self._stream, self._device = module.Event, module.current_stream, device
        self._timing = timing
        self.capturing = capturing(device)
        # float64 holds every value of every narrower type; the device converts before it copies.
        pinned = torch.zeros(slots, dtype=torch.float64, pin_memory=True) if slots else torch.zeros(0)
        self._slots = pinned.unbind()
        self._values = pinned.numpy()

    def copy(self, value: Tensor, slot: int) -> None:
        self._slots[slot].copy_(value, non_blocking=True)

    def read(self, slot: int) -> float:
        return float(self._values[slot])

    def event(self) -> Event:
        made: Event = self._new_event(enable_timing=self._timing)
        return made

    def record(self, event: Any) -> None:
        event.record(self._stream(self._device))


class Arrival:
    """The device scalars of one call of `log()`, on their way."""

    __slots__ = ("_event", "_first", "_names", "_pool")

    def __init__(self, pool: "ScalarPool", event: Event, first: int, names: Sequence[str]) -> None:
        self._pool = pool
        self._event = event
        self._first = first
        self._names = names

    def ready(self) -> bool:
        """Whether all of them are there. Raises RuntimeError when the device failed."""
        return self._event.query()

    def land(self, values: dict[str, Any]) -> None:
        """Put the numbers in their places. Called once, in the order in which they were sent."""
        for offset, name in enumerate(self._names):
            values[name] = self._pool.read(self._first + offset)
        self._pool.release(self._event, len(self._names))

    def lose(self, values: dict[str, Any]) -> int:
        """Give them up; return how many they were."""
        for name in self._names:
            values.pop(name, None)
        self._pool.release(self._event, len(self._names))
        return len(self._names)


class ScalarPool:
    """The slots and events of one device. `send` is the training thread's, everything else the sender's."""

    def __init__(self, device: Device, *, slots: int = SLOTS, calls: int = CALLS) -> None:
        self._device = device
        self._slots = slots
        self._taken = 0  # slots ever taken, written by the training thread alone
        self._released = 0  # slots ever given back, written by the sender alone
        self._free = deque(device.event() for _ in range(calls))

    def send(self, names: Sequence[str], values: Sequence[Tensor]) -> Arrival | None:
        """Start the copies; None when there is no room. Raises RuntimeError for what cannot be copied."""
        if self._device.capturing():
            return None  # the copy would become part of the graph, and write into the slot at every replay
        if self._taken + len(values) - self._released > self._slots or not self._free:
            return None
        first = self._taken
        for offset, value in enumerate(values):
            self._device.copy(value, (first + offset) % self._slots)
        event = self._free[0]
        self._device.record(event)
        self._free.popleft()
        self._taken = first + len(values)
        return Arrival(self, event, first, names)

    def read(self, number: int) -> float:
        return self._device.read(number % self._slots)

    def release(self, event: Event, slots: int) -> None:
        self._released += slots
        self._free.append(event)


class Pools:
    """One pool for each device that scalars come from, made when first needed or at `prepare`."""

    def __init__(self, make: "type[Accelerator] | Any" = Accelerator) -> None:
        self._make = make
        self._pools: dict[torch.device, ScalarPool | None] = {}

    def prepare(self) -> None:
        """Make the current CUDA device's pool now: allocating pinned memory in the loop could stop the device."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.of(torch.device("cuda", torch.cuda.current_device()))

    def of(self, device: torch.device) -> ScalarPool | None:
        """The pool of a device, or None for a device that cannot be read without stopping it."""
        if device not in self._pools:
            try:
                self._pools[device] = ScalarPool(self._make(device))
            except (RuntimeError, AttributeError, TypeError, AssertionError):
                self._pools[device] = None
        return self._pools[device]
