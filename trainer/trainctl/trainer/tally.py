"""What the sender counts of the values that pass: NaN and infinities, and how often the gradient was clipped. Pure."""

from collections import deque
from collections.abc import Mapping

import numpy as np

from trainctl.wire.messages import Rows

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
        columns = {column.name: np.frombuffer(column.data, f"<{column.dtype}") for column in rows.columns}
        for name, values in columns.items():
            bad = ~np.isfinite(values)
            if bad.any():
                nans = int(np.isnan(values).sum())
                _count(self.nans, name, nans)
                _count(self.infs, name, int(bad.sum()) - nans)
        if "clipped" in columns:
            self._clipped.extend((columns["clipped"] > 0).tolist())
        elif "grad_norm" in columns and clip is not None:
            self._clipped.extend((~(columns["grad_norm"] <= clip)).tolist())

    @property
    def clipped(self) -> float | None:
        """Share of steps whose gradient norm was above the limit, NaN and infinite ones included."""
        return sum(self._clipped) / len(self._clipped) if self._clipped else None


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
