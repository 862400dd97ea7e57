"""From what was logged to `Rows`: the sender thread merges the calls of a step into one row, and rows into columns."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainctl.trainer.buffer import Entry, NotANumber, Rewind, StepMark
from trainctl.trainer.names import Names
from trainctl.wire.messages import Column, Rows

LOGS_A_STEP = 200
# So that a `Rows` fits one packet of the link: what its rows take, what of that a row's step and time do, and what a
# column takes beside its name and data.
_ROWS_BYTES = 64 * 1024
_STEP_BYTES = 18
_COLUMN_BYTES = 40

_Row: TypeAlias = tuple[int, float, dict[str, float]]
FloatArray: TypeAlias = NDArray[np.float64]


class RowMaker:
    """Merges what was logged in one step into one row, and rows of the same names into columns."""

    def __init__(self, *, attempt: int, incarnation: int = 1, completed: int = 0) -> None:
        self._attempt = attempt
        self._open: dict[int, dict[str, float]] = {}
        self._open_times: dict[int, float] = {}
        self._completed = completed
        self._incarnation = incarnation
        self._names = Names()
        self._shown = self._names.shown
        self._counted: dict[str, float] = {}  # the newest values of the script's own counts of steps
        self._last_step = 0
        self._in_step = 0
        self.complaints = self._names.complaints
        self.remarks = self._names.remarks
        self.newest: dict[str, float] = {}  # of the metrics logged since it was last emptied
        self.refused_values = 0
        self.refused_names = 0

    def feed(self, entries: Iterable[Entry], *, now: float | None = None) -> list[Rows]:
        """Take entries in order; return the rows that are complete.

        `now`, Unix time: when what was logged at a boundary, behind its step's mark, is said to have been.
        """
        now = time.time() if now is None else now
        made: list[Rows] = []
        done: list[_Row] = []
        for entry in entries:
            if isinstance(entry, StepMark):
                self._add_mark(self._row(entry.step, entry.time), entry)
                self._open_times[entry.step] = entry.time
                self._completed = entry.step
                done.extend(self._close(entry.step))
            elif isinstance(entry, Rewind):
                done.extend(self._close(self._completed))
                made.extend(self._columns(done))
                done = []
                # Rows of a step that was never completed belong to no branch.
                self._open.clear()
                self._open_times.clear()
                self._counted.clear()
                self._completed, self._incarnation = entry.step, entry.incarnation
            else:
                step, values, _ = entry
                row = self._row(step, now)
                self._count(step)
                for name, value in values.items():
                    self._put(row, name, value)
        # What was logged at a boundary after its step was completed (an evaluation) waits for no further mark.
        done.extend(self._close(self._completed))
        return made + self._columns(done)

    def finish(self, completed: int, *, begun: bool) -> list[Rows]:
        """Training ended behind step `completed`: the rows that still wait for a mark which will never come.

        What was logged behind that step belongs to it, as a test after the loop does; where the next one was `begun`,
        to that one, as the loss that ended a run does.
        """
        for step in sorted(number for number in self._open if number > completed and not begun):
            self._row(completed, self._open_times.pop(step)).update(self._open.pop(step))
        return self._columns(self._close(completed + begun))

    def _row(self, step: int, at: float) -> dict[str, float]:
        self._open_times.setdefault(step, at)
        return self._open.setdefault(step, {})

    def _close(self, step: int) -> list[_Row]:
        ready = sorted(number for number in self._open if number <= step)
        closed = [(number, self._open_times.pop(number), row) for number in ready if (row := self._open.pop(number))]
        if self._names.counters:
            for _, _, row in closed:
                self._look_at_counters(row)
        return closed

    def _look_at_counters(self, row: dict[str, float]) -> None:
        for name in self._names.counters & row.keys():
            before, value = self._counted.get(name), row[name]
            self._counted[name] = value
            if before is not None and value < before:
                self._names.remark(
                    f"{name} (backwards)",
                    f"metric {name!r} went back from {before:g} to {value:g}: it is kept as a metric like any other. "
                    "The run's own step is what run.step_done() counts, and only a rollback takes it back",
                )

    def _add_mark(self, row: dict[str, float], mark: StepMark) -> None:
        """A completed step's own figures; where the script logged something else by such a name, it is told."""
        for name, value in _figures(mark).items():
            if name in row and not math.isclose(row[name], value, rel_tol=1e-6):
                self._names.remark(
                    f"{name} (own)",
                    f"metric {name!r} is shown as trainctl measures it ({value:g}), and not as the script logs it "
                    f"({row[name]:g}): log yours under another name",
                )
            row[name] = value

    def _count(self, step: int) -> None:
        self._in_step = self._in_step + 1 if step == self._last_step else 1
        self._last_step = step
        if self._in_step == LOGS_A_STEP:
            self.complaints.append(
                f"run.log() was called {LOGS_A_STEP} times within step {step}: call run.step_done() once after each "
                "optimizer step. Until then nothing is shown and every command waits, because it takes effect there"
            )

    def _put(self, row: dict[str, float], name: str, value: Any) -> None:
        if type(value) is float and (known := self._shown.get(name)) is not None:
            row[known] = self.newest[known] = value
            return
        known = self._shown[name] if name in self._shown else self._names.admit(name)
        if known is None:
            self.refused_names += 1
            return
        try:
            if isinstance(value, str | bytes | NotANumber):
                raise TypeError
            row[known] = self.newest[known] = float(value)
        except Exception:  # noqa: BLE001 - the __float__ of somebody else's class may raise anything
            self.refused_values += 1
            what = value.what if isinstance(value, NotANumber) else type(value).__name__
            self._names.complain(
                known,
                f"metric {known!r} is a {what}, not a number: such values are not shown. "
                "Log a float or a plain tensor with one element",
            )

    def _columns(self, rows: list[_Row]) -> list[Rows]:
        made: list[Rows] = []
        start = 0
        while start < len(rows):
            names = tuple(rows[start][2])
            end = start + 1
            limit = max(1, _ROWS_BYTES // (_STEP_BYTES + 8 * len(names)))
            while end < len(rows) and tuple(rows[end][2]) == names and end - start < limit:
                end += 1
            made.extend(self._rows(rows[start:end], names))
            start = end
        return made

    def _rows(self, block: Sequence[_Row], names: Sequence[str]) -> list[Rows]:
        steps, times = [step for step, _, _ in block], [at for _, at, _ in block]
        values = columns(names, np.array([list(row.values()) for _, _, row in block], dtype="<f8").T)
        return [
            Rows(
                attempt=self._attempt,
                incarnation=self._incarnation,
                steps=steps,
                times=times,
                columns=values[first:end],
            )
            for first, end in _parts(names, len(block))
        ]


def _parts(names: Sequence[str], rows: int) -> list[tuple[int, int]]:
    """The names, by their numbers, in as many parts as packets need; nearly always one."""
    parts: list[tuple[int, int]] = []
    base = _STEP_BYTES * rows
    first, size = 0, base
    for number, name in enumerate(names):
        needed = len(name.encode()) + _COLUMN_BYTES + 8 * rows
        if size + needed > 1.5 * _ROWS_BYTES and number > first:
            parts.append((first, number))
            first, size = number, base
        size += needed
    return [*parts, (first, len(names))]


def columns(names: Sequence[str], wide: FloatArray) -> list[Column]:
    """Metrics' values, `wide[k]` being those of name k, each as float32 where that keeps every bit of them (what came
    from a float32 tensor), else as float64.

    All in one: by column the same costs 10 µs of the interpreter's lock each.
    """
    with np.errstate(over="ignore"):
        narrow = wide.astype("<f4")
    exact = ((narrow == wide) | np.isnan(wide)).all(axis=1).tolist()
    as_f4, as_f8, rows = narrow.tobytes(), wide.tobytes(), wide.shape[1]
    return [
        Column(name=name, dtype="f4", data=as_f4[4 * rows * number : 4 * rows * (number + 1)])
        if fits
        else Column(name=name, dtype="f8", data=as_f8[8 * rows * number : 8 * rows * (number + 1)])
        for number, (name, fits) in enumerate(zip(names, exact, strict=True))
    ]


def _measured(value: float) -> float:
    """As float32 holds it: a clock is not exact to more than seven digits, and the journal keeps what it is given."""
    return float(np.float32(value))


def _figures(mark: StepMark) -> dict[str, float]:
    """What a step's mark says, by the names under which it is shown."""
    figures = {"step_time_s": _measured(mark.seconds)}
    if mark.lr_effective is not None and math.isfinite(mark.lr_effective):
        figures["lr"] = mark.lr_effective
    if mark.lr_scheduled is not None:
        figures["lr_scheduled"] = mark.lr_scheduled
    if mark.tokens and mark.seconds > 0:
        figures["tokens_per_s"] = _measured(mark.tokens / mark.seconds)
    if mark.samples and mark.seconds > 0:
        figures["samples_per_s"] = _measured(mark.samples / mark.seconds)
    if mark.mfu is not None:
        figures["mfu"] = _measured(mark.mfu)
    if mark.data is not None:
        figures["data_first"], figures["data_last"] = float(mark.data[0]), float(mark.data[1])
    return figures
