"""Answers to requests for history: values or rollups of metrics, a page of them at a time.

A page costs by what is on it and not by what comes after: rollups tell up to which step to read.
"""

from collections.abc import Generator
from typing import Final

import numpy as np

from trainctl.store.metrics import MetricStore
from trainctl.store.rollups import Columns
from trainctl.wire.messages import History, HistoryRequest, Series

HISTORY_BYTES: Final = 900 * 1024
_VALUE_BYTES: Final = 4 * 8
_ROLLUP_BYTES: Final = 9 * 8
_PAGE: Final = HISTORY_BYTES // _VALUE_BYTES
_LOOKS: Final = 1000  # buckets to ask for, of all metrics together, to find where a page ends


def history(metrics: MetricStore, request: HistoryRequest) -> History:
    """Values or rollups of metrics, cut where the answer would pass the size limit."""
    steps = history_steps(metrics, request)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            answer: History = done.value
            return answer


def history_steps(metrics: MetricStore, request: HistoryRequest) -> Generator[None, None, History]:
    """`history` a metric at a time, for whoever has other work to do in between.

    What is added meanwhile may be in the answer for some of the metrics: it is also published.
    """
    names = list(dict.fromkeys(request.metrics))
    points, to_step = request.points, request.to_step
    if points is None:
        to_step = yield from _page_end(metrics, names, request)
    else:
        points = max(1, min(points, HISTORY_BYTES // _ROLLUP_BYTES // max(1, len(names)) - 8))
    found: dict[str, Columns] = {}
    for name in names:
        found[name] = metrics.query(
            name, from_step=request.from_step, to_step=to_step, points=points, incarnation=request.incarnation
        )
        yield
    next_step = None
    if points is None:
        next_step = _cut(found)
        if next_step is None and to_step is not None and to_step != request.to_step:
            next_step = to_step + 1
    series = [Series(name=name, columns=_encoded(columns)) for name, columns in found.items()]
    return History(req=request.req, series=series, next_step=next_step)


def _page_end(metrics: MetricStore, names: list[str], request: HistoryRequest) -> Generator[None, None, int | None]:
    """A step up to which there is at least a page of values, and, where steps differ, not many more."""
    to_step = request.to_step
    points = max(2, _LOOKS // max(1, len(names)))
    while True:
        steps: list[Columns] = []
        for name in names:
            steps.append(
                metrics.query(
                    name,
                    from_step=request.from_step,
                    to_step=to_step,
                    points=points,
                    incarnation=request.incarnation,
                )
            )
            yield
        ends = np.concatenate([columns["step"] for columns in steps] or [np.empty(0, "i8")]).astype("i8")
        counts = np.concatenate([columns["count"] for columns in steps] or [np.empty(0, "i8")]).astype("i8")
        order = np.argsort(ends, kind="stable")
        held = np.cumsum(counts[order])
        if not len(held) or held[-1] <= 2 * _PAGE:
            return to_step
        end = int(ends[order][np.searchsorted(held, _PAGE)])
        if end == to_step or end >= ends.max():
            return end  # more values at one step than fit
        to_step = end


def _encoded(columns: Columns) -> dict[str, bytes]:
    return {
        name: column.astype("<i8" if column.dtype.kind == "i" else "<f8").tobytes() for name, column in columns.items()
    }


def _cut(found: dict[str, Columns]) -> int | None:
    """Shorten value columns in place to what fits one answer; return the step to ask from next."""
    steps = np.concatenate([columns["step"] for columns in found.values()] or [np.empty(0, "i8")])
    if len(steps) <= _PAGE:
        return None
    steps.sort()
    next_step = int(steps[_PAGE])
    if next_step == int(steps[0]):
        next_step += 1  # more values at one step than fit: send them all rather than never get on
    for name, columns in found.items():
        kept = columns["step"].astype("i8") < next_step
        found[name] = {column: values[kept] for column, values in columns.items()}
    return next_step if next_step <= int(steps[-1]) else None
