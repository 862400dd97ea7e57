"""From what was logged to `Rows`: the sender thread merges the calls of a step into one row, and rows into columns."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from trainctl.trainer.buffer import Entry, NotANumber, Rewind, StepMark
from trainctl.wire.messages import Column, Rows

NAMES_LIMIT = 2_000
NAME_LENGTH = 200
LOGS_A_STEP = 200
_SAID_LIMIT = 50
# So that a `Rows` fits one packet of the link: what its columns take, and what a column takes beside its name and data.
_ROWS_BYTES = 64 * 1024
_COLUMN_BYTES = 40

_Row: TypeAlias = tuple[int, float, dict[str, float]]


class RowMaker:
    """Merges what was logged in one step into one row, and rows of the same names into columns."""

    def __init__(self, *, attempt: int, incarnation: int = 1, completed: int = 0) -> None:
        self._attempt = attempt
        self._open: dict[int, dict[str, float]] = {}
        self._open_times: dict[int, float] = {}
        self._completed = completed
        self._incarnation = incarnation
        self._names: dict[str, str | None] = {}
        self._over_limit = False
        self._complained: set[str] = set()
        self._last_step = 0
        self._in_step = 0
        self.complaints: list[str] = []
        self.newest: dict[str, float] = {}  # of the metrics logged since it was last emptied
        self.refused_values = 0
        self.refused_names = 0

    def feed(self, entries: Iterable[Entry]) -> list[Rows]:
        """Take entries in order; return the rows that are complete."""
        made: list[Rows] = []
        done: list[_Row] = []
        for entry in entries:
            if isinstance(entry, StepMark):
                _add_mark(self._row(entry.step, entry.time), entry)
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
                self._completed, self._incarnation = entry.step, entry.incarnation
            else:
                step, at, values, _ = entry
                row = self._row(step, at)
                self._count(step)
                for name, value in values.items():
                    self._put(row, name, value)
        # What was logged at a boundary after its step was completed (an evaluation) waits for no further mark.
        done.extend(self._close(self._completed))
        return made + self._columns(done)

    def _row(self, step: int, at: float) -> dict[str, float]:
        self._open_times.setdefault(step, at)
        return self._open.setdefault(step, {})

    def _close(self, step: int) -> list[_Row]:
        ready = sorted(number for number in self._open if number <= step)
        return [(number, self._open_times.pop(number), row) for number in ready if (row := self._open.pop(number))]

    def _count(self, step: int) -> None:
        self._in_step = self._in_step + 1 if step == self._last_step else 1
        self._last_step = step
        if self._in_step == LOGS_A_STEP:
            self.complaints.append(
                f"run.log() was called {LOGS_A_STEP} times within step {step}: call run.step_done() once after each "
                "optimizer step. Until then nothing is shown and every command waits, because it takes effect there"
            )

    def _put(self, row: dict[str, float], name: str, value: Any) -> None:
        if type(value) is float and (known := self._names.get(name)) is not None:
            row[known] = self.newest[known] = value
            return
        known = self._names[name] if name in self._names else self._admit(name)
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
            self._complain(
                known,
                f"metric {known!r} is a {what}, not a number: such values are not shown. "
                "Log a float or a plain tensor with one element",
            )

    def _admit(self, name: str) -> str | None:
        """The name under which a metric is shown, or None: there is nothing to show, or there are too many."""
        shown: str | None = "".join(c for c in name if c.isprintable())[:NAME_LENGTH]
        if not shown:
            self._complain(name, f"metric {name[:NAME_LENGTH]!r} has no character that can be shown: it is left out")
            shown = None
        elif len(self._names) >= NAMES_LIMIT:
            if not self._over_limit:
                self._over_limit = True
                self.complaints.append(
                    f"more than {NAMES_LIMIT} metric names: further ones, from {shown!r} on, are not recorded. "
                    "Names should not contain the step or a sample's number"
                )
            return None
        elif shown != name:
            self._complain(
                name,
                f"metric {name[: 2 * NAME_LENGTH]!r} is shown as {shown!r}: names are up to {NAME_LENGTH} printable "
                "characters",
            )
        if len(self._names) < NAMES_LIMIT:
            self._names[name] = shown
        return shown

    def _complain(self, about: str, text: str) -> None:
        if about not in self._complained and len(self._complained) < _SAID_LIMIT:
            self._complained.add(about)
            self.complaints.append(text)

    def _columns(self, rows: list[_Row]) -> list[Rows]:
        made: list[Rows] = []
        start = 0
        while start < len(rows):
            names = tuple(rows[start][2])
            end = start + 1
            limit = max(1, _ROWS_BYTES // (8 * max(1, len(names))))
            while end < len(rows) and tuple(rows[end][2]) == names and end - start < limit:
                end += 1
            block = rows[start:end]
            made.extend(self._rows(block, part) for part in _parts(names, len(block)))
            start = end
        return made

    def _rows(self, block: Sequence[_Row], names: Sequence[str]) -> Rows:
        return Rows(
            attempt=self._attempt,
            incarnation=self._incarnation,
            steps=[step for step, _, _ in block],
            times=[at for _, at, _ in block],
            columns=[column(name, [row[name] for _, _, row in block]) for name in names],
        )


def _parts(names: Sequence[str], rows: int) -> list[Sequence[str]]:
    """The names in as many parts as packets need; nearly always one."""
    parts: list[Sequence[str]] = []
    first, size = 0, 0
    for number, name in enumerate(names):
        needed = len(name.encode()) + _COLUMN_BYTES + 8 * rows
        if size + needed > 1.5 * _ROWS_BYTES and number > first:
            parts.append(names[first:number])
            first, size = number, 0
        size += needed
    return [*parts, names[first:]]


def column(name: str, values: list[float]) -> Column:
    """One metric's values, as float32 where that keeps every bit (what came from a float32 tensor), else float64."""
    wide = np.asarray(values, dtype="<f8")
    with np.errstate(over="ignore"):
        narrow = wide.astype("<f4")
    exact = bool(np.array_equal(narrow.astype("<f8"), wide, equal_nan=True))
    return Column(name=name, dtype="f4" if exact else "f8", data=(narrow if exact else wide).tobytes())


def _measured(value: float) -> float:
    """As float32 holds it: a clock is not exact to more than seven digits, and the journal keeps what it is given."""
    return float(np.float32(value))


def _add_mark(row: dict[str, float], mark: StepMark) -> None:
    row["step_time_s"] = _measured(mark.seconds)
    if mark.lr_effective is not None and math.isfinite(mark.lr_effective):
        row["lr"] = mark.lr_effective
    if mark.lr_scheduled is not None:
        row["lr_scheduled"] = mark.lr_scheduled
    if mark.tokens and mark.seconds > 0:
        row["tokens_per_s"] = _measured(mark.tokens / mark.seconds)
    if mark.samples and mark.seconds > 0:
        row["samples_per_s"] = _measured(mark.samples / mark.seconds)
    if mark.mfu is not None:
        row["mfu"] = _measured(mark.mfu)
    if mark.data is not None:
        row["data_first"], row["data_last"] = float(mark.data[0]), float(mark.data[1])
