"""Walk through a whole history a window of steps at a time, so that no copy of it is ever in memory at once. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Table: TypeAlias = Mapping[str, NDArray[Any]]

ROLLUPS = 2000  # buckets to ask for: they tell where the values are, at no cost to speak of


def step_windows(rollups: Iterable[Table], values: int) -> list[tuple[int, int]]:
    """Ranges of steps (both included, from the lowest step up) that hold about `values` values each.

    `rollups` are those of each metric, with columns `step` (of a bucket's last value) and `count`. A bucket that holds
    more is a window of its own.
    """
    parts = [(rollup["step"], rollup["count"]) for rollup in rollups]
    steps = np.concatenate([step for step, _ in parts] or [np.empty(0, "i8")])
    counts = np.concatenate([count for _, count in parts] or [np.empty(0, "i8")])
    order = np.argsort(steps, kind="stable")
    windows: list[tuple[int, int]] = []
    first, held = -1, 0
    for step, count in zip(steps[order].tolist(), counts[order].tolist(), strict=True):
        if step < first:
            continue  # at the step that ended a window, so in it
        held += count
        if held >= values:
            windows.append((first, step))
            first, held = step + 1, 0
    if held:
        windows.append((first, int(steps.max())))
    return windows


def logged_together(found: Mapping[str, Table]) -> Iterator[tuple[NDArray[Any], NDArray[Any], dict[str, NDArray[Any]]]]:
    """Metrics that have the same steps at the same times, as (steps, times, values by name)."""
    groups: dict[tuple[bytes, bytes], tuple[NDArray[Any], NDArray[Any], dict[str, NDArray[Any]]]] = {}
    for name, columns in found.items():
        steps, times = columns["step"], columns["time"]
        if len(steps):
            key = steps.tobytes(), times.tobytes()
            groups.setdefault(key, (steps, times, {}))[2][name] = columns["value"]
    yield from groups.values()
