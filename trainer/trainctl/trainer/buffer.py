"""What the training thread leaves for the sender thread: a bounded deque of calls, step marks and rollbacks.

A call of `log()` is a plain tuple, because the garbage collector stops tracking plain tuples of plain values: with a
class of its own, what waits here cost the training thread collections of several microseconds.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from trainctl.trainer.device import Arrival, Pools

CAPACITY = 100_000
# A logged float takes about 75 bytes of a waiting call (its object and its place in a dict). Calls of more than
# `NARROW` values are bounded in values, 75 MB in all; the others by their number alone: 150 MB.
VALUES = 1_000_000
NARROW = 20
# What is no number is not kept alive until the sender sees that.
_SMALL_BYTES = 64
_NO_NUMBERS = (str, bytes, bytearray, list, tuple, dict, set)

# (step, values, device scalars among them that are still on their way). No time: reading the clock is a tenth of what
# a call costs, and a row has the time at which its step was completed.
Logged: TypeAlias = tuple[int, dict[str, Any], tuple[Arrival, ...]]


class StepMark(NamedTuple):
    """One completed step: it ends the row of that step."""

    step: int
    time: float
    seconds: float
    tokens: int
    samples: int
    lr_effective: float | None
    lr_scheduled: float | None
    data: tuple[int, int] | None = None  # the first and last micro-batch it was made of
    mfu: float | None = None


class Rewind(NamedTuple):
    """The run went back to `step` and is a new incarnation from here on."""

    step: int
    incarnation: int
    metrics: dict[str, float]


Entry: TypeAlias = Logged | StepMark | Rewind


class NotANumber(NamedTuple):
    """Stands for a value that cannot be shown; `what` says what it was."""

    what: str


_ON_ITS_WAY = NotANumber("value that never arrived")


class RowBuffer:
    """Bounded in entries and in values, which is in bytes: when the sender cannot keep up, the newest entries are
    refused and counted, training goes on."""

    def __init__(self, capacity: int = CAPACITY, *, values: int = VALUES, pools: Pools | None = None) -> None:
        self.entries: deque[Entry] = deque()
        self.taken: list[Entry] = []
        self.capacity = capacity
        self.room = values  # how many values the training thread may ever have put; raised as the sender takes them
        self.put_values = 0  # written by the training thread alone
        self.refused = 0  # calls and marks for which there was no room
        self.refused_wide = 0  # calls that would have made what waits take too much memory
        self.not_copied = 0  # device scalars for which there was no slot
        self.not_read = 0  # device scalars that the device failed to bring
        self.waits_for_devices = True  # else what has not come is given up, for training has ended
        self._pools = pools or Pools()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Keep the values of one call. Tensors in `values` are replaced by what later steps cannot change."""
        if len(self.entries) >= self.capacity:
            self.refused += 1
            return
        if self.put_values >= self.room and len(values) > NARROW:
            self.refused_wide += 1
            return
        arrivals = self._settle(values)
        if values:
            self.put_values += len(values) if len(values) > NARROW else 0
            self.entries.append((step, values, arrivals))

    def put(self, entry: StepMark | Rewind) -> None:
        """Keep a mark. A rollback's is kept whatever is there: without it, rows would be told of the wrong branch."""
        if len(self.entries) >= self.capacity and type(entry) is StepMark:
            self.refused += 1
        else:
            self.entries.append(entry)

    def __len__(self) -> int:
        return len(self.entries)

    def take(self, limit: int) -> list[Entry]:
        """The oldest entries, up to the first that still waits for a device. All their values have arrived."""
        taken: list[Entry] = []
        self.taken, entries = taken, self.entries
        while entries and len(taken) < limit:
            first = entries[0]
            if not isinstance(first, StepMark | Rewind):
                count = len(first[1])  # before it lands: a device that failed takes values away
                if first[2] and not self._landed(first):
                    break
                self.room += count if count > NARROW else 0
            taken.append(first)  # before it is gone from there, for `waiting` looks from another thread
            entries.popleft()
        return taken

    def waiting(self) -> list[Entry]:
        """What was taken last, which may not be told yet, and what was not taken; some of it twice."""
        entries = list(self.entries)
        return [*self.taken, *entries]

    def _landed(self, entry: Logged) -> bool:
        _, values, arrivals = entry
        try:
            if not all(arrival.ready() for arrival in arrivals):
                if self.waits_for_devices:
                    return False
                self.not_read += sum(arrival.lose(values) for arrival in arrivals)
                return True
        except RuntimeError:  # the device failed: the script hears of it, and what is behind this goes on
            self.not_read += sum(arrival.lose(values) for arrival in arrivals)
            return True
        for arrival in arrivals:
            arrival.land(values)
        return True

    def _settle(self, values: dict[str, Any]) -> tuple[Arrival, ...]:
        """Replace tensors; a device's scalars are copied without waiting. Whatever a value's class raises is its own
        affair: the value becomes a `NotANumber`, and the loop never hears of it."""
        on_devices: dict[tuple[torch.device, str], list[tuple[str, torch.Tensor]]] = {}
        for name, value in values.items():
            if type(value) is float:
                continue
            try:
                if not isinstance(value, torch.Tensor):
                    if isinstance(value, _NO_NUMBERS) or getattr(value, "nbytes", 0) > _SMALL_BYTES:
                        values[name] = NotANumber(type(value).__name__)
                    continue
                settled = _settled(value)
                if isinstance(settled, torch.Tensor):
                    # A subclass runs code of its own when it is copied: it travels alone, and fails alone.
                    place = (settled.device, "" if type(settled) is torch.Tensor else name)
                    on_devices.setdefault(place, []).append((name, settled))
                    settled = _ON_ITS_WAY
                values[name] = settled
            except Exception:  # noqa: BLE001 - the class of a value may raise anything
                values[name] = NotANumber(type(value).__name__)
        if not on_devices:
            return ()
        sent = [self._send(device, scalars, values) for (device, _), scalars in on_devices.items()]
        return tuple(arrival for arrival in sent if arrival is not None)

    def _send(
        self, device: torch.device, scalars: list[tuple[str, torch.Tensor]], values: dict[str, Any]
    ) -> Arrival | None:
        names = [name for name, _ in scalars]
        problem, arrival = None, None
        try:
            pool = self._pools.of(device)
            if pool is None:
                problem = f"tensor on {device}, which cannot be read without stopping it"
            else:
                arrival = pool.send(names, [scalar for _, scalar in scalars])
        except Exception:  # noqa: BLE001 - a device's driver, or the class of a tensor, may raise anything
            problem = f"tensor on {device} that cannot be copied"
        if problem is not None:
            values.update(dict.fromkeys(names, NotANumber(problem)))
        elif arrival is None:
            self.not_copied += len(names)
            for name in names:
                del values[name]
        return arrival


class Steps(Protocol):
    """Knows the step to which what is logged now belongs."""

    row_step: int


def floats_first(
    buffer: RowBuffer, steps: Steps, other: Callable[[dict[str, Any]], None]
) -> tuple[Callable[..., None], Callable[[], None]]:
    """`Run.log` for the common case, a few plain floats and room for them; `other` takes every other call.

    And what ends it: from then on `other` takes every call, also of a script that keeps `log = run.log`.

    A function over cells, and no method: each look-up of an attribute is a twentieth of what a call costs.
    """
    entries, append, capacity = buffer.entries, buffer.entries.append, buffer.capacity

    def log(**values: Any) -> None:
        """Log numbers of the step in progress: floats, ints, or tensors with one element, which cause no sync.

        After the last `step_done()` they belong to the last completed step, or to one that `batches()` began since.
        """
        for value in values.values():
            if type(value) is not float:
                other(values)
                return
        if len(entries) < capacity and len(values) <= NARROW:
            append((steps.row_step, values, ()))
        else:
            other(values)

    def end() -> None:
        nonlocal capacity
        capacity = 0

    return log, end


def _settled(value: torch.Tensor) -> float | torch.Tensor | NotANumber:
    """The number of a host's tensor, the bare scalar of a device's, or why it is neither.

    Raises what the tensor's own code does: a nested tensor has no shape, nor has a parameter before its first use.
    """
    what = f"{type(value).__name__} of shape {tuple(value.shape)}"
    if value.numel() != 1 or hasattr(value, "to_local"):
        # Reading a sharded tensor is a collective, and only rank 0 would come to it.
        return NotANumber(what)
    try:
        scalar = value.detach().reshape(())
        if scalar.is_complex():
            return NotANumber(f"complex {what}")
        return float(scalar) if scalar.device.type == "cpu" else scalar
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return NotANumber(what)
