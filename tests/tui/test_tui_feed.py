"""The curves that the cockpit holds, against what was logged."""

import time

import numpy as np
from scripted_session import rows

from trainctl.client.points import Points
from trainctl.tui.feed import Feed, pace, samples_of
from trainctl.wire.messages import RolledBack


def points(name: str, steps: range, value: float = 1.0) -> Points:
    step = np.array(list(steps))
    return Points(
        name=name,
        columns={
            "step": step,
            "time": step * 0.5,
            "value": np.full(len(step), value),
            "incarnation": np.ones(len(step)),
        },
    )


def back(step: int, from_step: int) -> RolledBack:
    return RolledBack(
        time=time.time(), step=step, incarnation=2, from_step=from_step, from_incarnation=1, checkpoint="c"
    )


def test_what_comes_in_while_the_past_is_fetched_is_kept_once() -> None:
    feed = Feed()
    feed.begin_load()
    for step in (9, 10, 11, 12):
        feed.append(rows(step, {"loss": 2.0}))
    feed.load({"loss": points("loss", range(1, 11))})
    assert feed.curve("loss").step.tolist() == list(range(1, 13))
    assert feed.curve("loss").mean[-2:].tolist() == [2.0, 2.0]


def test_a_rollback_cuts_the_live_curve_and_keeps_what_it_left() -> None:
    feed = Feed()
    feed.load({"loss": points("loss", range(1, 101))})
    feed.roll_back(back(60, 100))
    feed.append(rows(61, {"loss": 5.0}, incarnation=2))
    assert feed.curve("loss").step.tolist() == list(range(1, 62))
    (branch,) = feed.branches
    assert branch.curves["loss"].step.tolist() == list(range(61, 101))


def test_a_bucket_with_nan_keeps_its_extremes_and_its_nan() -> None:
    found = samples_of(
        Points(
            name="loss",
            columns={
                "step": np.array([16, 32]),
                "time": np.array([1.0, 2.0]),
                "min": np.array([1.0, 3.0]),
                "max": np.array([9.0, 4.0]),
                "mean": np.array([2.0, 3.5]),
                "last": np.array([2.0, 3.5]),
                "count": np.array([16, 16]),
                "nonfinite": np.array([1, 0]),
                "incarnation": np.array([1, 1]),
            },
        )
    )
    assert np.nanmax(found.high) == 9.0
    assert np.isnan(found.mean).sum() == 1
    assert (np.diff(found.step) >= 0).all()


def test_infinities_that_come_in_count_as_broken() -> None:
    feed = Feed()
    feed.append(rows(1, {"loss": float("inf")}))
    assert np.isnan(feed.curve("loss").mean).all()


def test_the_trend_is_silent_in_noise_and_speaks_when_it_is_sure() -> None:
    rng = np.random.default_rng(0)
    feed = Feed()
    now = 1000.0
    times = np.linspace(now - 60, now, 200)
    step = np.arange(200)
    for name, value in (("flat", rng.normal(2, 0.1, 200)), ("falls", 3 - step * 0.005), ("grows", 2 + step * 0.005)):
        feed.tracks.update(_loaded(name, step, times, value))
    assert [feed.trend(name, now) for name in ("flat", "falls", "grows", "absent")] == [0, -1, 1, 0]
    assert feed.trend("falls", now + 3600) == 0, "what is old has no trend"


def _loaded(name: str, step: np.ndarray, times: np.ndarray, value: np.ndarray) -> dict:
    other = Feed()
    columns = {"step": step, "time": times, "value": value, "incarnation": np.ones(len(step))}
    other.load({name: Points(name=name, columns=columns)})
    return other.tracks


def test_pace_leaves_pauses_out() -> None:
    feed = Feed()
    step = np.arange(1, 101)
    times = np.where(step > 50, step * 0.5 + 300, step * 0.5)
    feed.tracks.update(_loaded("loss", step, times, np.ones(100)))
    rate = pace(feed.curve("loss"))
    assert np.allclose(rate.mean, 2.0)
    assert len(rate) == 98
