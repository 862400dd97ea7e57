"""What a run's history has to say, in plain lists and numpy: the model that journal, index and rollups meet."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainctl.store.metrics import MetricStore

Table = NDArray[np.float64]
SMALL = 200  # values in a bucket below which every value is looked at, so that the order of steps is exact


@dataclass
class PlainHistory:
    """Values of each (metric, incarnation) in the order they were logged, and which branch grew out of which."""

    values: dict[tuple[str, int], list[tuple[int, float, float]]] = field(default_factory=dict)
    parents: dict[int, tuple[int, int] | None] = field(default_factory=lambda: {1: None})  # (parent, after step)

    def table(self, name: str, incarnation: int) -> Table:
        """Steps, times and values, a row each."""
        return np.array(self.values.get((name, incarnation), []), "f8").reshape(-1, 3)

    def live(self) -> list[tuple[int, float]]:
        """The incarnations that the newest one stands on, oldest first, with the last step that counts of each."""
        chain: list[tuple[int, float]] = []
        at, cut = max(self.parents), math.inf
        while True:
            chain.append((at, cut))
            parent = self.parents[at]
            if parent is None:
                return chain[::-1]
            at, cut = parent[0], min(cut, parent[1])

    def live_table(self, name: str) -> tuple[Table, list[int]]:
        parts, incarnations = [np.empty((0, 3))], list[int]()
        for incarnation, cut in self.live():
            table = self.table(name, incarnation)
            kept = table[table[:, 0] <= cut]
            parts.append(kept)
            incarnations += [incarnation] * len(kept)
        return np.concatenate(parts), incarnations


def same_values(store: MetricStore, model: PlainHistory) -> None:
    """Every value is there once, in order and to the bit, in every incarnation and on the live branch."""
    for name, incarnation in model.values:
        found = store.query(name, incarnation=incarnation)
        for column, expected in zip(("step", "time", "value"), model.table(name, incarnation).T, strict=True):
            assert np.array_equal(found[column].astype("f8"), expected, equal_nan=True), (name, incarnation, column)
    for name in {name for name, _ in model.values}:
        table, incarnations = model.live_table(name)
        found = store.query(name)
        assert found["incarnation"].tolist() == incarnations, (name, model.live())
        assert np.array_equal(found["value"], table[:, 2], equal_nan=True)
        last = store.latest(name)
        assert last is not None


def same_span(
    store: MetricStore, model: PlainHistory, name: str, incarnation: int, low: int | None, high: int | None, points: int
) -> None:
    """A span's values, and its buckets one by one."""
    table = model.table(name, incarnation)
    chosen = np.ones(len(table), bool)
    if low is not None:
        chosen &= table[:, 0] >= low
    if high is not None:
        chosen &= table[:, 0] <= high
    table = table[chosen]
    found = store.query(name, incarnation=incarnation, from_step=low, to_step=high)
    assert np.array_equal(found["value"], table[:, 2], equal_nan=True), (name, incarnation, low, high)
    ordered = table[np.argsort(table[:, 0], kind="stable")]
    backwards = not np.array_equal(ordered[:, 0], table[:, 0])
    buckets = store.query(name, incarnation=incarnation, from_step=low, to_step=high, points=points)
    counts = buckets["count"].astype("i8")
    assert int(counts.sum()) == len(table)
    assert len(counts) <= points + 2
    assert np.all(np.diff(buckets["step"].astype("i8")) >= 0)
    if not backwards or len(table) / points < SMALL:
        ends = np.cumsum(counts)
        for at, (first, end) in enumerate(zip(ends - counts, ends, strict=True)):
            same_bucket({column: values[at] for column, values in buckets.items()}, ordered[first:end])
    else:
        same_altogether(buckets, ordered)


def same_bucket(bucket: dict[str, np.generic], rows: Table) -> None:
    values = rows[:, 2]
    finite = values[np.isfinite(values)]
    assert (bucket["step"], bucket["time"]) == (rows[-1, 0], rows[-1, 1])
    assert np.array_equal(bucket["last"], values[-1], equal_nan=True)
    assert bucket["nonfinite"] == len(values) - len(finite)
    if not len(finite):
        assert all(math.isnan(float(bucket[name])) for name in ("min", "max", "mean"))
        return
    assert (bucket["min"], bucket["max"]) == (finite.min(), finite.max())
    with np.errstate(over="ignore"):
        scale = float(np.abs(finite).sum())
    if math.isfinite(scale):
        assert abs(float(bucket["mean"]) - finite.sum() / len(finite)) <= 1e-9 * scale + 1e-300


def same_altogether(buckets: dict[str, NDArray[np.generic]], rows: Table) -> None:
    """Where steps went back and values are many, a bucket's neighbours may have some of its values: each is in one."""
    values = rows[:, 2]
    finite = values[np.isfinite(values)]
    assert int(buckets["nonfinite"].astype("i8").sum()) == len(values) - len(finite)
    if len(finite):
        assert np.nanmin(buckets["min"].astype("f8")) == finite.min()
        assert np.nanmax(buckets["max"].astype("f8")) == finite.max()
    known = {(step, time): value for step, time, value in rows.tolist()}
    ends = zip(*(buckets[name].astype("f8").tolist() for name in ("step", "time", "last")), strict=True)
    for step, time, last in ends:
        assert np.array_equal(known[step, time], last, equal_nan=True)
    assert buckets["step"][-1] == rows[-1, 0]


def nothing_but(store: MetricStore, model: PlainHistory) -> int:
    """After damage: whatever is told was logged, in the order it was logged in. Returns how many values are missing."""
    missing = 0
    for name, incarnation in model.values:
        found = store.query(name, incarnation=incarnation)
        told = zip(*(found[column].astype("f8").tolist() for column in ("step", "time", "value")), strict=True)
        logged = iter(model.table(name, incarnation).tolist())
        count = 0
        for row in told:
            assert any(np.array_equal(row, other, equal_nan=True) for other in logged), (name, incarnation, row)
            count += 1
        missing += len(model.values[name, incarnation]) - count
        store.query(name, incarnation=incarnation, points=50)
    return missing
