"""The chart's core: what it promises about the data it is given, without an app."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trainctl.tui import axes, raster
from trainctl.tui.axes import Span
from trainctl.tui.chart import Chart, Curve, Mark, render, value_at

finite = st.floats(-1e6, 1e6, allow_nan=False, width=32)
curves = hnp.arrays(np.float64, st.integers(1, 400), elements=finite)
broken = hnp.arrays(np.float64, st.integers(1, 200), elements=st.one_of(finite, st.just(np.nan), st.just(np.inf)))
glyphs = st.sampled_from(["braille", "block", "ascii"])


def columns_of(y: np.ndarray, width: int) -> raster.Columns:
    x = np.arange(len(y), dtype=np.float64)
    return raster.columns_of(x, y, y, y, np.linspace(0, max(1, len(y) - 1), width + 1))


@given(y=curves, width=st.integers(2, 120), rows=st.integers(2, 60))
def test_every_extreme_has_a_dot_in_its_column(y: np.ndarray, width: int, rows: int) -> None:
    columns = columns_of(y, width)
    low, high = float(y.min()), float(y.max()) + 1e-9 + abs(float(y.max())) * 1e-9
    dots = raster.dots_of(columns, low, high, rows)
    for column in np.flatnonzero(np.isfinite(columns.low)):
        for value in (columns.low[column], columns.high[column]):
            row = rows - 1 - int(np.clip(np.rint((value - low) / (high - low) * (rows - 1)), 0, rows - 1))
            assert dots[row, column]


@given(y=curves, width=st.integers(2, 120))
def test_columns_hold_exactly_the_extremes_of_the_data(y: np.ndarray, width: int) -> None:
    columns = columns_of(y, width)
    assert np.nanmin(columns.low) == y.min()
    assert np.nanmax(columns.high) == y.max()
    assert not columns.bad.any()


@given(y=curves.map(np.sort), width=st.integers(2, 120))
def test_what_never_falls_is_drawn_never_falling(y: np.ndarray, width: int) -> None:
    columns = columns_of(y, width)
    lows = columns.low[np.isfinite(columns.low)]
    assert (np.diff(lows) >= 0).all()


@given(y=broken, width=st.integers(4, 60), kind=glyphs)
def test_nan_and_infinities_are_flagged_and_never_a_silent_gap(y: np.ndarray, width: int, kind: str) -> None:
    x = np.arange(len(y), dtype=np.float64)
    chart = Chart(curves=[Curve.of("", x, y)], span_x=Span(low=0, high=max(1, len(y) - 1)), glyphs=kind)  # type: ignore[arg-type]
    picture = render(chart, width, 8)
    assert (picture.bad > 0) == (not np.isfinite(y).all())
    if picture.bad:
        assert ("✖" if kind == "braille" else "x") in "".join(picture.grid.text())
    if np.isfinite(y).any():
        assert picture.span_y is not None


def test_a_curve_is_not_bridged_across_nan() -> None:
    x, y = np.array([0.0, 40.0, 50.0, 60.0, 100.0]), np.array([1.0, 1.0, np.nan, 1.0, 1.0])
    columns = raster.columns_of(x, y, y, y, np.linspace(0, 100, 101))
    dots = raster.dots_of(columns, 0, 2, 9)
    assert dots[:, :41].any(axis=0).all()
    assert not dots[:, 41:60].any()
    assert dots[:, 60:].any(axis=0).all()


def test_one_spike_among_a_hundred_thousand_is_as_tall_as_it_was() -> None:
    y = np.ones(100_000)
    y[77_777] = 50.0
    chart = Chart(
        curves=[Curve.of("", np.arange(100_000.0), y)], span_x=Span(low=0, high=100_000), span_y=Span(low=0, high=50)
    )
    top = render(chart, 90, 20).grid.text()[0]
    assert any(0x2800 < ord(char) < 0x2900 for char in top)


def test_smoothing_draws_the_average_over_the_raw_curve() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(5000.0), rng.normal(5, 1, 5000)
    curve = Curve.of("loss", x, y, smooth=True)
    grid = render(Chart(curves=[curve], span_x=Span(low=0, high=5000)), 90, 16).grid
    tones = set(grid.tones[:14].ravel().tolist())
    assert {int(curve.tone), int(curve.raw_tone)} <= tones
    bright = (grid.tones[:14] == int(curve.tone)).any(axis=0)
    assert bright[8:].all(), "the average has no holes"


def test_a_log_axis_shows_decades_and_flags_what_has_no_place_on_it() -> None:
    x = np.arange(100.0)
    chart = Chart(curves=[Curve.of("", x, 10.0 ** (x / 20))], span_x=Span(low=0, high=100), log_y=True)
    picture = render(chart, 60, 20)
    assert picture.bad == 0
    assert "10k" in "".join(picture.grid.text())
    below = render(Chart(curves=[Curve.of("", x, x - 50)], span_x=Span(low=0, high=100), log_y=True), 60, 20)
    assert below.bad > 0


def test_marks_stand_on_the_axis_and_lines_go_through_the_plot() -> None:
    x = np.arange(100.0)
    marks = [Mark(x=25, glyph="▲"), Mark(x=50, glyph="↩", line=True)]
    lines = render(Chart(curves=[Curve.of("", x, x)], span_x=Span(low=0, high=100), marks=marks), 58, 12).grid.text()
    axis = lines[10]
    assert axis[8 + 12] == "▲"
    assert axis[8 + 25] == lines[0][8 + 25] == "↩"


@pytest.mark.parametrize(("width", "height"), [(0, 0), (1, 1), (3, 2), (8, 1), (12, 4), (29, 5), (400, 90)])
def test_any_size_is_drawn(width: int, height: int) -> None:
    x = np.arange(100.0)
    grid = render(Chart(curves=[Curve.of("", x, x)], span_x=Span(low=0, high=100)), width, height).grid
    assert (grid.width, grid.height) == (width, height)


def test_no_data_is_said() -> None:
    assert render(Chart(curves=[], span_x=Span(low=0, high=1)), 40, 10).empty


def test_value_at_gives_the_range_of_the_cell_or_the_newest_before_it() -> None:
    curve = Curve.of("", np.arange(100.0), np.arange(100.0))
    assert value_at(curve, 25.0, Span(low=0, high=100), 10) == (20.0, 24.5, 29.0)
    sparse = Curve.of("", np.array([10.0, 50.0]), np.array([1.0, 2.0]))
    assert value_at(sparse, 75.0, Span(low=0, high=100), 100) == (2.0, 2.0, 2.0)
    assert value_at(sparse, 5.0, Span(low=0, high=100), 100) is None


# --- axes


@given(low=finite, width=st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    span = Span(low=low, high=low + width + abs(low) * 1e-6)
    ticks = axes.linear_ticks(span, 5)
    assert 2 <= len(ticks) <= 11
    slack = (span.high - span.low) * 1e-6
    assert ticks.min() >= span.low - slack
    assert ticks.max() <= span.high + slack


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (0, 1, "0"),
        (4, 2, "4"),
        (0.25, 0.05, "0.25"),
        (6e-4, 2e-4, "6e-4"),
        (2.5e-4, 2.5e-4, "2.5e-4"),
        (1500, 500, "1.5k"),
        (5000, 1000, "5k"),
        (100000, 20000, "100k"),
        (1.3e6, 1e5, "1.3M"),
    ],
)
def test_tick_labels(value: float, step: float, text: str) -> None:
    assert axes.tick_label(value, step) == text


def test_the_ticks_of_one_axis_have_one_unit() -> None:
    assert [axes.tick_label(value, 0.005, 0.01) for value in (0.005, 0.01)] == ["0.005", "0.010"]
    assert [axes.tick_label(value, 200, 1000) for value in (400, 800, 1000)] == ["0.4k", "0.8k", "1.0k"]


@given(low=finite, width=st.floats(0, 1e6))
def test_the_range_holds_the_data_and_then_holds_still(low: float, width: float) -> None:
    span = axes.settle(None, low, low + width)
    assert span.low <= low <= low + width <= span.high
    assert axes.settle(span, low, low + width) == span


@given(last=st.integers(1, 10**7))
def test_the_axis_of_steps_ends_behind_the_last_step_and_not_far(last: int) -> None:
    end = axes.step_end(last, None)
    assert last <= end <= max(10, 1.34 * last + 1)
