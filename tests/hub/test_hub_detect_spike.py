"""A leap of the loss: noticed once, over once, and not in what is only noise."""

from dataclasses import replace

import numpy as np
import pytest
from hub_double import rows
from hypothesis import given, settings
from hypothesis import strategies as st

from trainctl.hub.detect import SpikeWatches, is_loss
from trainctl.hub.detect_spike import CALM_VALUES, LONGEST, WARM_UP, SpikeWatch, Turn


def noisy(count: int, *, level: float = 2.0, spread: float = 0.2, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(level, spread, count)


def turns(values: np.ndarray) -> list[tuple[int, bool]]:
    return [(turn.at, turn.begins) for turn in SpikeWatch().observe(values)]


def test_one_value_ten_times_as_high_is_an_episode_that_begins_at_once_and_ends_after_ten_calm_values() -> None:
    values = noisy(600)
    values[500] *= 10
    assert turns(values) == [(500, True), (500 + CALM_VALUES, False)]


def test_three_of_four_values_out_of_the_noise_are_an_episode_though_none_is_extreme() -> None:
    values = noisy(600)
    values[500:520] += 8 * 0.2
    values[501] = 2.0
    assert turns(values) == [(503, True), (519 + CALM_VALUES, False)]


def test_two_values_out_of_the_noise_are_none() -> None:
    values = noisy(600)
    values[[500, 501, 520, 521]] += 8 * 0.2
    assert turns(values) == []


def test_nothing_is_said_before_the_curve_is_known() -> None:
    values = noisy(WARM_UP + 20)
    values[WARM_UP - 1] = 1000.0
    assert turns(values) == []


def test_a_curve_that_falls_or_falls_steeply_is_no_spike() -> None:
    steps = np.arange(5000)
    assert turns(2 + 8 * np.exp(-steps / 300) + noisy(5000, level=0, spread=0.05)) == []
    values = noisy(600)
    values[300:] -= 1.5
    assert turns(values) == []


def test_a_flat_curve_has_some_noise_too() -> None:
    values = np.full(600, 2.0)
    values[500] = 2.8
    assert turns(values) == [], "a flat curve's noise is taken to be 3 % of its level"
    values[500] = 3.0
    assert turns(values) == [(500, True), (510, False)]


def test_a_curve_of_zeros_has_no_scale_to_measure_by() -> None:
    values = np.zeros(600)
    values[400:] = 1.0
    assert turns(values) == []


def test_a_curve_that_throws_outliers_by_itself_alarms_only_when_they_last() -> None:
    values = noisy(1200)
    values[10:1000:50] = 10.0
    assert turns(values) == []
    values[1100:1103] = 10.0
    assert turns(values)[0] == (1102, True)


def test_a_curve_that_stays_up_has_a_new_level_and_alarms_from_there() -> None:
    values = noisy(1000)
    values[400:] *= 10
    values[800] *= 10
    found = SpikeWatch().observe(values)
    assert [(turn.at, turn.begins, turn.stays) for turn in found] == [
        (400, True, False),
        (400 + LONGEST - 1, False, True),
        (800, True, False),
        (810, False, False),
    ]


def test_nan_and_infinities_are_another_detectors() -> None:
    values = noisy(600)
    values[[300, 301, 302, 400]] = [np.nan, np.inf, -np.inf, np.nan]
    values[500] *= 10
    assert turns(values) == [(500, True), (510, False)]


@pytest.mark.parametrize("huge", [1e308, -1e308, 3e38])
def test_values_at_the_end_of_the_range_do_no_harm(huge: float) -> None:
    values = noisy(600)
    values[100:400:3] = huge
    SpikeWatch().observe(values)
    SpikeWatch().observe(np.clip(values, -3e38, 3e38).astype("f4"))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    leaps=st.lists(st.tuples(st.integers(0, 799), st.integers(1, 200), st.floats(1, 50)), max_size=4),
    cuts=st.lists(st.integers(0, 800), max_size=30),
)
def test_what_is_said_does_not_depend_on_how_the_values_come(
    seed: int, leaps: list[tuple[int, int, float]], cuts: list[int]
) -> None:
    values = noisy(800, seed=seed)
    for at, length, factor in leaps:
        values[at : at + length] *= factor
    at_once = SpikeWatch().observe(values)
    piecewise: list[Turn] = []
    watch = SpikeWatch()
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(values)], strict=True):
        piecewise += [replace(turn, at=turn.at + begin) for turn in watch.observe(values[begin:end])]
    assert piecewise == at_once
    assert [turn.begins for turn in at_once] == [number % 2 == 0 for number in range(len(at_once))], "one end for each"


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), level=st.floats(0.01, 1000), spread=st.floats(0.0001, 0.3))
def test_normal_noise_alone_never_alarms(seed: int, level: float, spread: float) -> None:
    assert turns(noisy(3000, level=level, spread=spread * level, seed=seed)) == []


# --- which curves


@pytest.mark.parametrize(
    "name", ["loss", "val_loss", "train/loss", "train.loss", "aux_loss", "loss/train", "Loss/val", "LOSS"]
)
def test_losses_are_watched(name: str) -> None:
    assert is_loss(name)


@pytest.mark.parametrize("name", ["grad_norm", "loss_scale", "gloss", "losses", "losses/n", "lr", "floss", "oss", ""])
def test_other_metrics_are_not(name: str) -> None:
    assert not is_loss(name)


def test_a_new_incarnation_forgets_what_was_usual_and_an_older_one_is_over() -> None:
    watches = SpikeWatches()
    values = noisy(200).tolist()
    assert watches.observe(rows(*range(1, 201), loss=values)) == []
    low = [value / 10 for value in values]
    assert watches.observe(rows(*range(1, 201), incarnation=2, loss=low)) == []
    (begin,) = watches.observe(rows(201, incarnation=2, loss=[2.0]))
    assert (begin.what, begin.metric, begin.severity, begin.step, begin.incarnation) == (
        "loss-spike",
        "loss",
        "warning",
        201,
        2,
    )
    assert begin.text.startswith("loss leapt to 2.000 at step 201: usually 0.2")
    assert watches.observe(rows(202, incarnation=1, loss=[500.0])) == []
    over = watches.observe(rows(*range(202, 212), incarnation=2, loss=low[:10]))
    assert [(event.what, event.severity) for event in over] == [("loss-spike", "good")]
