"""Notices NaN and infinities in metrics. Pure."""

import re
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainctl.wire.messages import Anomaly, Column, Rows

CALM = 10
# A gradient scaler finds its scale by overflowing now and then: of gradients only a long row of it is an error.
GRADIENT_ROW = 20
# Words of a name: `grad_norm`, `train/gradient_norm`, `grad_norm_l2`, `gradNorm`, `grads/norm/layer1`.
_GRADIENT_NORM: Final = re.compile(
    r"(?<![a-z])grad(?:ient)?s?[^a-z0-9]*(?:(?:global|total|l[12])[^a-z0-9]+)?norms?(?![a-z])"
)
# A penalty on a gradient's norm is a loss, and no scaler makes it overflow.
_IS_A_LOSS: Final = re.compile(r"(?<![a-z])(?:loss|penalty)(?![a-z])")


def is_gradient(metric: str) -> bool:
    """Whether a metric is the norm of gradients, by the words of its name."""
    name = metric.lower()
    return _GRADIENT_NORM.search(name) is not None and _IS_A_LOSS.search(name) is None


def finite_values(rows: Rows, column: Column) -> NDArray[np.floating] | None:
    """A column's values, one for each row, or None where the sender's column does not fit its rows."""
    if len(column.data) != (4 if column.dtype == "f4" else 8) * len(rows.steps):
        return None
    values: NDArray[np.floating] = np.frombuffer(column.data, f"<{column.dtype}")
    return values


class _Metric:
    """How many finite values came since the last bad one, how many bad ones in a row, and what was told."""

    def __init__(self, *, calm: int = CALM, error: str | None = None) -> None:
        self.calm = calm
        self.row = 0
        self.told_row = calm == 0
        self.error = error  # `nan` or `inf`, while an error that was told lasts


class NonFiniteWatch:
    """Tells of each metric when it stops being finite; again only after ten finite values or in a new incarnation.

    A gradient's norm that is not finite is `info` at first, and an `error` once twenty in a row were not. The end of an
    error is told too, after ten finite values.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, _Metric] = {}  # those that were not finite lately
        self._incarnation = 0

    def assume(self, metric: str, incarnation: int, *, calm: int, error: str | None = None) -> None:
        """After a restart: the metric was told of, and `calm` finite values came since its last bad one. `error` is
        what an error told that it is, and whose end was not told."""
        self._incarnation = incarnation
        if calm < CALM:
            self._metrics[metric] = _Metric(calm=calm, error=error)

    def observe(self, rows: Rows) -> list[Anomaly]:
        """The anomalies that begin in these rows."""
        if rows.incarnation > self._incarnation:
            self._incarnation = rows.incarnation
            self._metrics.clear()
        found: list[Anomaly] = []
        for column in rows.columns:
            values = finite_values(rows, column)
            if values is None or not len(values):
                continue
            known = self._metrics.get(column.name)
            if known is None and np.isfinite(values).all():
                continue
            metric = known or self._metrics.setdefault(column.name, _Metric())
            found += _observe(metric, rows, column.name, values)
            if metric.calm == CALM:
                del self._metrics[column.name]
        return found


def _observe(metric: _Metric, rows: Rows, name: str, values: NDArray[np.floating]) -> list[Anomaly]:
    found = []
    for at, finite in enumerate(np.isfinite(values).tolist()):
        if finite:
            metric.calm, metric.row, metric.told_row = min(CALM, metric.calm + 1), 0, False
            if metric.calm == CALM and metric.error is not None:
                found.append(_over(rows, name, at, float(values[at]), metric.error))
                metric.error = None
            continue
        metric.row += 1
        if metric.calm >= CALM:
            found.append(_anomaly(rows, name, at, float(values[at])))
        elif metric.row >= GRADIENT_ROW and not metric.told_row and is_gradient(name):
            metric.told_row = True
            found.append(_lasting(rows, name, at, float(values[at]), metric.row))
        metric.calm = 0
        if found and found[-1].step == rows.steps[at] and found[-1].severity == "error":
            metric.error = found[-1].what
    return found


def _anomaly(rows: Rows, metric: str, at: int, value: float) -> Anomaly:
    text = f"{metric} is {_word(value)} at step {rows.steps[at]}"
    gradient = is_gradient(metric)
    return Anomaly(
        time=rows.times[at],
        step=rows.steps[at],
        incarnation=rows.incarnation,
        what=_what(value),
        text=f"{text}; a gradient scaler that tries out its scale does this now and then" if gradient else text,
        severity="info" if gradient else "error",
        metric=metric,
        value=value,
    )


def _lasting(rows: Rows, metric: str, at: int, value: float, row: int) -> Anomaly:
    return Anomaly(
        time=rows.times[at],
        step=rows.steps[at],
        incarnation=rows.incarnation,
        what=_what(value),
        text=f"{metric} is {_word(value)} at step {rows.steps[at]}, and was not finite for {row} values in a row",
        severity="error",
        metric=metric,
        value=value,
    )


def _over(rows: Rows, metric: str, at: int, value: float, error: str) -> Anomaly:
    return Anomaly(
        time=rows.times[at],
        step=rows.steps[at],
        incarnation=rows.incarnation,
        what=error,
        text=f"{metric} is finite again: {CALM} values in a row, at step {rows.steps[at]}",
        severity="good",
        metric=metric,
        value=value,
    )


def _what(value: float) -> str:
    return "nan" if np.isnan(value) else "inf"


def _word(value: float) -> str:
    return "NaN" if np.isnan(value) else "infinite"
