"""What the sender counts of the values that pass: NaN and infinities, and how often the gradient was clipped. Pure."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainctl.wire.messages import Column, Rows

Floats: TypeAlias = NDArray[np.floating[Any]]

WINDOW_STEPS = 100
NAMES_SHOWN = 50
# A tunable with one of these names is the largest gradient norm that the script allows.
CLIP_TUNABLES: tuple[str, ...] = ("clip", "max_norm", "max_grad_norm", "clip_norm", "grad_clip", "clip_grad_norm")


class Tally:
    """Counts since attach, by metric; the share of clipped steps is of the last hundred."""

    def __init__(self) -> None:
        self.nans: dict[str, int] = {}
        self.infs: dict[str, int] = {}
        self._clipped: deque[bool] = deque(maxlen=WINDOW_STEPS)

    def observe(self, rows: Rows, clip: float | None) -> None:
        """Count complete rows. `clip` is the largest gradient norm allowed, where one is known.

        A script that logs `clipped` itself, as 0 or 1, knows best.
        """
        columns = {column.name: column for column in rows.columns}
        if not _all_finite(rows.columns):
            self._count_those_that_are_not(rows.columns)
        if "clipped" in columns:
            self._clipped.extend((_values(columns["clipped"]) > 0).tolist())
        elif "grad_norm" in columns and clip is not None:
            self._clipped.extend((~(_values(columns["grad_norm"]) <= clip)).tolist())

    def _count_those_that_are_not(self, columns: Sequence[Column]) -> None:
        for column in columns:
            values = _values(column)
            bad = ~np.isfinite(values)
            if bad.any():
                nans = int(np.isnan(values).sum())
                _count(self.nans, column.name, nans)
                _count(self.infs, column.name, int(bad.sum()) - nans)

    @property
    def clipped(self) -> float | None:
        """Share of steps whose gradient norm was above the limit, NaN and infinite ones included."""
        return sum(self._clipped) / len(self._clipped) if self._clipped else None


def _values(column: Column) -> Floats:
    return np.frombuffer(column.data, f"<{column.dtype}")


def _all_finite(columns: Sequence[Column]) -> bool:
    """Asked of all columns at once, for there may be thousands."""
    for dtype in ("f4", "f8"):
        data = b"".join([column.data for column in columns if column.dtype == dtype])
        if not np.isfinite(np.frombuffer(data, f"<{dtype}")).all():
            return False
    return True


def clip_of(tunables: Mapping[str, object]) -> float | None:
    """The limit of the gradient norm among the script's tunables, or None."""
    for name in CLIP_TUNABLES:
        value = tunables.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def _count(counts: dict[str, int], name: str, found: int) -> None:
    if found and (name in counts or len(counts) < NAMES_SHOWN):
        counts[name] = counts.get(name, 0) + found
