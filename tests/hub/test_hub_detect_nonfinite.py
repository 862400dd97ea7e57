"""NaN and infinities: told when they begin, and again after ten finite values or in a new incarnation."""

import math
from itertools import pairwise

import pytest
from hub_double import rows
from hypothesis import given
from hypothesis import strategies as st

from trainctl.hub.nonfinite import CALM, GRADIENT_ROW, NonFiniteWatch
from trainctl.wire.messages import Anomaly, Column, Rows

NAN, INF = math.nan, math.inf


def told(*values: float, metric: str = "loss", watch: NonFiniteWatch | None = None) -> list[tuple[int, str, str]]:
    steps = range(1, len(values) + 1)
    found = (watch or NonFiniteWatch()).observe(rows(*steps, **{metric: list(values)}))
    return [(event.step, event.what, event.severity) for event in found]


def test_an_episode_is_told_once_and_the_next_one_again() -> None:
    values = [1.0, NAN, 1.0, INF, *[1.0] * (CALM - 1), -INF, *[1.0] * CALM, -INF]
    over = len(values) - 1
    assert told(*values) == [(2, "nan", "error"), (over, "nan", "good"), (len(values), "inf", "error")]


def test_a_gradients_overflow_is_only_noted_until_it_does_not_end() -> None:
    assert told(INF, 1.0, NAN, metric="grad_norm") == [(1, "inf", "info")]
    assert told(*[INF] * 100, metric="grad_norm") == [(1, "inf", "info"), (GRADIENT_ROW, "inf", "error")]
    assert told(*[INF] * GRADIENT_ROW, *[1.0] * CALM, metric="grad_norm")[1:] == [
        (GRADIENT_ROW, "inf", "error"),
        (GRADIENT_ROW + CALM, "inf", "good"),
    ]


@pytest.mark.parametrize(
    "metric",
    ["grad_norm", "gradient_norm", "train/grad_norm", "Grad/Norm", "gradNorm", "grad_norm_l2", "grads/global_norm",
     "grad_norm/layer1", "total_grad_norm"],
)  # fmt: skip
def test_a_gradients_norm_is_known_by_the_words_of_its_name(metric: str) -> None:
    assert told(INF, metric=metric) == [(1, "inf", "info")]


@pytest.mark.parametrize(
    "metric", ["grad_penalty_loss", "grad_norm_penalty", "upgrade_norm", "grade", "gradual_norm", "grad_normal", "norm"]
)
def test_a_name_that_merely_contains_grad_has_no_leniency(metric: str) -> None:
    assert told(INF, metric=metric) == [(1, "inf", "error")]


def test_a_new_incarnation_is_told_of_anew() -> None:
    watch = NonFiniteWatch()
    (first,) = watch.observe(rows(5, loss=[NAN]))
    (second,) = watch.observe(rows(5, incarnation=2, loss=[NAN]))
    assert (first.incarnation, second.incarnation) == (1, 2)


def test_what_was_told_before_a_restart_is_not_told_again_before_it_was_calm() -> None:
    watch = NonFiniteWatch()
    watch.assume("loss", 1, calm=3, error="nan")
    assert told(1.0, NAN, *[1.0] * CALM, watch=watch) == [(CALM + 2, "nan", "good")]
    watch = NonFiniteWatch()
    watch.assume("loss", 1, calm=CALM)
    assert told(NAN, watch=watch) == [(1, "nan", "error")]


def test_a_column_that_does_not_fit_its_rows_is_passed_over() -> None:
    broken = Rows(
        attempt=1, incarnation=1, steps=[1], times=[1.0], columns=[Column(name="loss", dtype="f8", data=b"\xff" * 7)]
    )
    assert NonFiniteWatch().observe(broken) == []


@given(
    values=st.lists(st.sampled_from([1.0, 1.0, 1.0, NAN, INF]), max_size=120),
    cuts=st.lists(st.integers(0, 120), max_size=12),
    metric=st.sampled_from(["loss", "grad_norm"]),
)
def test_what_is_told_does_not_depend_on_how_the_values_come(values: list[float], cuts: list[int], metric: str) -> None:
    at_once = told(*values, metric=metric)
    watch, piecewise = NonFiniteWatch(), list[Anomaly]()
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    for begin, end in pairwise(edges):
        if begin < end:
            piecewise += watch.observe(rows(*range(begin + 1, end + 1), **{metric: values[begin:end]}))
    assert [(event.step, event.what, event.severity) for event in piecewise] == at_once
