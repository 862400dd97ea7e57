"""The metric store against plain numpy: values to the bit, rollups that never lie."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainctl.store.metrics import ROLLUP_COLUMNS, VALUE_COLUMNS, MetricStore
from trainctl.wire.messages import Column, Rows

values = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True, width=32),
    st.floats(-1e300, 1e300),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0]),
)


def rows(steps: list[int], numbers: list[float], incarnation: int = 1, name: str = "loss") -> Rows:
    exact = all(math.isnan(number) or float(np.float32(number)) == number for number in numbers if abs(number) < 1e38)
    narrow = exact and all(not math.isfinite(number) or abs(number) < 1e38 for number in numbers)
    dtype = "f4" if narrow else "f8"
    data = np.array(numbers, f"<{dtype}").tobytes()
    return Rows(
        attempt=1,
        incarnation=incarnation,
        steps=steps,
        times=[float(step) for step in steps],
        columns=[Column(name=name, dtype=dtype, data=data)],  # type: ignore[arg-type]
    )


def filled(batches: list[list[float]], first_step: int = 1) -> tuple[MetricStore, NDArray[np.float64]]:
    store, step = MetricStore(), first_step
    for batch in batches:
        store.add(rows(list(range(step, step + len(batch))), batch))
        step += len(batch)
    return store, np.array([number for batch in batches for number in batch], "f8")


def same(one: NDArray[np.generic], other: NDArray[np.generic]) -> bool:
    return bool(np.array_equal(one, other, equal_nan=True))


batches = st.lists(st.lists(values, min_size=1, max_size=40), min_size=1, max_size=30)


@settings(max_examples=80, deadline=None)
@given(batches=batches, low=st.integers(-5, 400), span=st.integers(0, 400))
def test_values_come_back_to_the_bit(batches: list[list[float]], low: int, span: int) -> None:
    store, expected = filled(batches)
    found = store.query("loss", from_step=low, to_step=low + span)
    assert tuple(found) == VALUE_COLUMNS
    steps = np.arange(1, len(expected) + 1)
    chosen = (steps >= low) & (steps <= low + span)
    assert same(found["value"], expected[chosen])
    assert same(found["step"], steps[chosen])
    latest = store.latest("loss")
    assert latest is not None
    assert (latest.step, same(np.array([latest.value]), expected[-1:])) == (len(expected), True)


@settings(max_examples=120, deadline=None)
@given(batches=batches, points=st.integers(1, 300), low=st.integers(0, 300), span=st.integers(0, 1200))
def test_rollups_tell_of_every_value_once(batches: list[list[float]], points: int, low: int, span: int) -> None:
    store, everything = filled(batches)
    found = store.query("loss", from_step=low, to_step=low + span, points=points)
    assert tuple(found) == ROLLUP_COLUMNS
    steps = np.arange(1, len(everything) + 1)
    chosen = (steps >= low) & (steps <= low + span)
    expected, steps = everything[chosen], steps[chosen]
    counts = found["count"].astype(int)
    assert counts.sum() == len(expected)
    assert len(counts) <= points + 2
    ends = np.cumsum(counts)
    for start, end, row in zip(ends - counts, ends, range(len(counts)), strict=True):
        bucket = expected[start:end]
        finite = bucket[np.isfinite(bucket)]
        assert int(found["nonfinite"][row]) == len(bucket) - len(finite)
        assert int(found["step"][row]) == steps[end - 1]
        assert same(found["last"][row : row + 1], bucket[-1:])
        if len(finite):
            assert (found["min"][row], found["max"][row]) == (finite.min(), finite.max())
            with np.errstate(over="ignore"):
                scale = float(np.abs(finite).sum())
            if math.isfinite(scale):
                assert float(found["mean"][row]) == pytest.approx(finite.sum() / len(finite), abs=1e-9 * scale + 1e-300)
        else:
            assert all(math.isnan(float(found[name][row])) for name in ("min", "max", "mean")), "visible as NaN"


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.integers(0, 50), min_size=1, max_size=200), points=st.integers(1, 30))
def test_steps_that_go_back_within_an_incarnation_lose_nothing(steps: list[int], points: int) -> None:
    store = MetricStore()
    for step in steps:
        store.add(rows([step], [float(step)]))
    found = store.query("loss", from_step=10, to_step=40)
    assert found["step"].tolist() == [step for step in steps if 10 <= step <= 40]
    rolled = store.query("loss", points=points)
    assert int(rolled["count"].astype(int).sum()) == len(steps)
    assert (rolled["min"].astype(float).min(), rolled["max"].astype(float).max()) == (min(steps), max(steps))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_live_branch_is_what_a_run_that_rolled_back_really_trained_on(data: st.DataObject) -> None:
    store = MetricStore()
    store.begin(1, after_step=0)
    live: dict[int, tuple[int, float]] = {}
    own: dict[int, list[int]] = {1: []}
    step, incarnation = 0, 1
    branches = {1: live}
    for _ in range(data.draw(st.integers(1, 5))):
        for _ in range(data.draw(st.integers(1, 30))):
            step += 1
            number = float(incarnation * 1000 + step)
            store.add(rows([step], [number], incarnation))
            branches[incarnation][step] = (incarnation, number)
            own[incarnation].append(step)
        # A checkpoint of any branch so far may be the target, an abandoned one's too.
        parent = data.draw(st.sampled_from(sorted(branches)))
        step = data.draw(st.integers(0, max(branches[parent], default=0)))
        incarnation += 1
        branches[incarnation] = {at: told for at, told in branches[parent].items() if at <= step}
        own[incarnation] = []
        store.begin(incarnation, after_step=step, parent=parent)
    found = store.query("loss")
    expected = branches[incarnation]
    assert found["step"].tolist() == sorted(expected)
    assert list(zip(found["incarnation"].tolist(), found["value"].tolist(), strict=True)) == [
        expected[at] for at in sorted(expected)
    ]
    for number, steps in own.items():
        assert store.query("loss", incarnation=number)["step"].tolist() == steps
    assert int(store.query("loss", points=7)["count"].astype(int).sum()) == len(expected)


def test_an_incarnation_that_nobody_announced_goes_on_before_its_first_row() -> None:
    store = MetricStore()
    store.add(rows([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0]))
    store.add(rows([3, 4], [30.0, 40.0], incarnation=2))
    assert store.query("loss")["value"].tolist() == [1.0, 2.0, 30.0, 40.0]
    assert [(branch.incarnation, branch.after_step, branch.parent) for branch in store.branches] == [
        (1, 0, None),
        (2, 2, 1),
    ]


def test_a_column_that_does_not_fit_its_rows_is_refused_and_counted() -> None:
    store = MetricStore()
    short = Rows(
        attempt=1, incarnation=1, steps=[1, 2], times=[1.0, 2.0], columns=[Column(name="x", dtype="f4", data=b"\0")]
    )
    store.add(short)
    assert (store.names, store.refused) == ([], 1)
    assert {len(column) for column in store.query("x").values()} == {0}
    assert {len(column) for column in store.query("x", points=5).values()} == {0}


def test_a_metric_that_turns_to_float64_stays_exact() -> None:
    store = MetricStore()
    store.add(rows([1], [0.5]))
    store.add(rows([2], [0.1]))
    store.add(rows([3], [0.25]))
    assert store.query("loss")["value"].tolist() == [0.5, 0.1, 0.25]


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_what_stays_in_memory_of_a_value_is_a_quarter_of_a_byte(dtype: str) -> None:
    store, random = MetricStore(), np.random.default_rng(1)
    for first in range(0, 200_000, 10_000):
        steps = list(range(first + 1, first + 10_001))
        data = random.normal(size=10_000).astype(f"<{dtype}").tobytes()
        column = Column(name="loss", dtype=dtype, data=data)  # type: ignore[arg-type]
        store.add(Rows(attempt=1, incarnation=1, steps=steps, times=[float(step) for step in steps], columns=[column]))
    (track,) = store.save().tracks
    kept = sum(len(column.data) for level in track.levels for column in level.values())
    assert kept / 200_000 < (0.24 if dtype == "f4" else 0.30)


def test_a_track_with_few_values_takes_little_memory() -> None:
    names, branches = [f"layer{number}/norm" for number in range(100)], 20
    data = np.zeros(20, "<f4").tobytes()
    store = MetricStore()
    tracemalloc.start()
    try:
        for incarnation in range(1, branches + 1):
            steps = list(range(incarnation * 20 - 19, incarnation * 20 + 1))
            columns = [Column(name=name, dtype="f4", data=data) for name in names]
            times = [float(step) for step in steps]
            store.add(Rows(attempt=1, incarnation=incarnation, steps=steps, times=times, columns=columns))
        assert store.in_memory == 20 * 100 * branches
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / (100 * branches) < 2800, "of which the values are 400"
