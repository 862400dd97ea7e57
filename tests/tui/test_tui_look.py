"""Fewer colours, no colours, fewer glyphs: every meaning survives."""

import time
from typing import Any

import pytest
from scripted_session import ScriptedSession, checkpoints, node_readings, rank_figures, run_state, snapshot

from trainctl.client.model import RunModel
from trainctl.tui import figures
from trainctl.tui.arrange import arrange
from trainctl.tui.event_lines import Progress, draw_events, matches, newest_events, news_of, worth_a_line
from trainctl.tui.feed import Feed
from trainctl.tui.header import draw_header, draw_vitals, headline, vitals
from trainctl.tui.keyline import draw_keys, keys_for
from trainctl.tui.nodes_panel import draw_nodes
from trainctl.tui.plot_view import PlotView, Timeline, draw_plot, marks_of, still_true
from trainctl.tui.plots import plots_for
from trainctl.tui.ranks_panel import draw_ranks
from trainctl.tui.small import draw_small_header
from trainctl.tui.table import draw_table
from trainctl.tui.tables import checkpoints_table, ranks_table
from trainctl.tui.theme import ASCII_SYMBOLS, Symbols, glyphs_here, look_for
from trainctl.tui.tones import Tone
from trainctl.wire.messages import (
    Anomaly,
    CheckpointInfo,
    CheckpointSaved,
    CommandUpdate,
    Output,
    RolledBack,
    StateChanged,
)


def model_of(**changes: object) -> RunModel:
    model = ScriptedSession().model
    model.set_link("live")
    model.apply(snapshot(**changes))
    return model


@pytest.mark.parametrize("system", ["truecolor", "256", "standard", None])
@pytest.mark.parametrize("no_color", [True, False])
def test_every_tone_has_a_style_and_without_colour_it_has_none(system: str | None, no_color: bool) -> None:
    palette = look_for(color_system=system, no_color=no_color).palette
    assert set(palette) == {int(tone) for tone in Tone}
    if no_color or system is None:
        assert all(style.color is None and style.bgcolor is None for style in palette.values())


def test_states_differ_by_word_and_glyph_and_not_only_by_colour() -> None:
    symbols = Symbols()
    heads = [
        headline(model_of(state=run_state(state=state)), symbols)
        for state in ("running", "paused", "stalled", "lost", "finished")
    ]
    assert len({head.word for head in heads}) == len({head.glyph for head in heads}) == 5


def test_what_other_ranks_read_of_the_data_has_no_chart() -> None:
    late = [f"data_{end}.{rank}" for end in ("first", "last") for rank in range(1, 64)]
    assert plots_for(["loss", *late]) == plots_for(["loss"])


def test_a_terminal_without_utf8_gets_ascii_alone() -> None:
    look = look_for(color_system="standard", no_color=False, glyphs="ascii")
    assert look.symbols == ASCII_SYMBOLS
    model, feed = model_of(ranks=rank_figures(8, slow=3), nodes=node_readings(2, 4)), Feed()
    progress = Progress(symbols=look.symbols)
    progress.sending("1", "pause")
    drawn = [
        draw_header(model, look.symbols, 120),
        draw_vitals(vitals(model, feed, look.symbols), look.symbols, 120, 2),
        draw_ranks(model, look.symbols, 120, 2),
        draw_nodes(model, look.symbols, 120, 2),
        draw_keys(keys_for(paused=False, off={}, screen="run", short=False, one_chart=False), look.symbols, 140)[0],
        draw_plot(plots_for([])[0], feed, PlotView(), Timeline(step=9), look, width=60, height=12).grid,
    ]
    for grid in drawn:
        assert all(line.isascii() for line in grid.text()), grid.text()


@pytest.mark.parametrize(
    ("environ", "encoding", "glyphs"),
    [
        ({}, "UTF-8", "braille"),
        ({"TERM": "linux"}, "utf-8", "block"),
        ({}, "ANSI_X3.4-1968", "ascii"),
        ({"TRAINCTL_GLYPHS": "block"}, "ascii", "block"),
    ],
)
def test_dots_as_fine_as_the_terminal_has(environ: dict[str, str], encoding: str, glyphs: str) -> None:
    assert glyphs_here(environ, encoding) == glyphs


@pytest.mark.parametrize("width", range(20, 201, 9))
@pytest.mark.parametrize("height", [8, 12, 15, 24, 30, 36, 50, 60])
def test_the_screen_is_divided_without_rest(width: int, height: int) -> None:
    plan = arrange(width, height, plots=7, vital_rows=2, rank_rows=2, node_rows=9, header_rows=2)
    used = plan.header + plan.vitals + plan.gap + plan.ranks + plan.nodes + plan.events + plan.footer
    assert used <= height
    assert plan.events >= (1 if height >= 12 else 0)
    if plan.chart_rows:
        assert (height - used) // plan.chart_rows >= 3


def test_a_short_evaluation_does_not_make_the_run_new() -> None:
    now = time.time()
    passed = [
        StateChanged(time=now - 900, step=0, incarnation=1, state="running", before="starting"),
        StateChanged(time=now - 20, step=5, incarnation=1, state="evaluating", before="running"),
        StateChanged(time=now - 10, step=5, incarnation=1, state="running", before="evaluating"),
    ]
    model = model_of(state=run_state(since=now - 10), events=passed)
    model.info = None
    assert headline(model, Symbols()).age == "15m"
    assert [worth_a_line(event) for event in passed] == [True, False, False]


def test_control_characters_never_reach_the_screen() -> None:
    nasty = Anomaly(time=1.0, step=1, incarnation=1, what="x", text="boo\x1b[2J\x07 far")
    model = model_of(events=[nasty])
    assert "boo" in "".join(draw_events(model, Symbols(), 80, 2).text())
    assert all(ord(char) >= 32 for line in draw_events(model, Symbols(), 80, 2).text() for char in line)


def test_news_counts_what_came_since_and_matches_words() -> None:
    events = [
        Anomaly(time=10.0, step=1, incarnation=1, what="nan", text="loss is NaN", severity="error"),
        Output(time=11.0, step=1, incarnation=1, rank=0, text="hello"),
    ]
    assert (news_of(events, 5.0).count, news_of(events, 5.0).tone) == (1, Tone.ERROR)
    assert news_of(events, 10.0).count == 0
    assert matches(events[0], "nan error")
    assert not matches(events[1], "nan")


def saved(step: int) -> CheckpointSaved:
    return CheckpointSaved(time=float(step), step=step, incarnation=1, id=f"step-{step:08d}-1", verified=True)


def done(**changes: object) -> CommandUpdate:
    fields: dict[str, Any] = {
        "time": 2.0,
        "step": 2,
        "incarnation": 1,
        "id": "c",
        "command": "checkpoint save",
        "args": {"note": "hello", "pin": True},
        "actor": "mk",
        "state": "applied",
    }
    return CommandUpdate(**(fields | changes))


def test_checkpoints_by_the_clock_are_no_news_and_push_nothing_out() -> None:
    nan = Anomaly(time=1.5, step=1, incarnation=1, what="nan", text="loss is NaN", severity="error")
    events = [nan, done(), *(saved(step) for step in range(3, 9))]
    assert news_of(events, 0.0).count == 2
    assert newest_events(events, 3) == [nan, events[1], events[-1]]
    assert newest_events(events, 2) == [events[1], events[-1]]
    assert newest_events(events, 1) == [events[1]]
    assert newest_events(events[2:], 1) == [events[-1]]
    assert newest_events(events, 0) == []


def test_a_command_is_told_in_words() -> None:
    made = done(after="step-00000002-1", ranks=2, reason="as asked")
    lines = draw_events(model_of(events=[made, done(before=0.5, after=0.25)]), Symbols(), 120, 2).text()
    assert "“hello” pinned by mk: applied at step 2 on 2 ranks, step-00000002-1: as asked" in lines[0]
    assert "0.5 → 0.25" in lines[1]


@pytest.mark.parametrize("reason", ["by root", "root", None])
def test_who_stopped_a_run_is_said_once(reason: str | None) -> None:
    head = headline(model_of(state=run_state(state="stopped", by="root", reason=reason)), Symbols())
    assert f"{head.age} {head.story}".count("root") == 1


@pytest.mark.parametrize("width", range(16, 61))
def test_a_small_header_never_shows_half_a_number(width: int) -> None:
    model = model_of(state=run_state(step=2979))
    line = draw_small_header(model, Symbols(), width).text()[1]
    words = line.replace("▕", " ").replace("▏", " ").strip(" ▏▎▍▌▋▊▉█").split()
    assert words[0] == "step"
    assert words[1] in {"2,979", "2,979/100,000"}
    assert "3.0%" not in line or line.rstrip().endswith(" 3.0%") or line.rstrip().endswith("▏ 3.0%")


def test_checkpoints_are_listed_in_the_runs_own_order_whatever_a_clock_says() -> None:
    listed = [
        CheckpointInfo(id=f"c{step}", step=step, time=time, bytes=1, incarnation=incarnation)
        for step, incarnation, time in ((40, 1, 60.0), (30, 2, 50.0), (20, 1, 70.0))
    ]
    assert [row.key for row in checkpoints_table(model_of(), Symbols(), listed).rows] == ["c30", "c40", "c20"]


@pytest.mark.parametrize("width", range(20, 140))
def test_a_table_shows_whole_columns(width: int) -> None:
    table = ranks_table(model_of(ranks=rank_figures(8, slow=3)), Symbols())
    titles, first, *_ = draw_table(table, width, 9).text()
    known = {word for column in table.columns for word in column.title.split()}
    assert set(titles.split()) <= known
    cells = {word for text, _ in table.rows[0].cells for word in text.split()}
    assert set(first.split()) <= cells


def test_the_age_of_late_vitals_lies_over_none_of_them() -> None:
    model = model_of()
    for width in range(20, 120):
        *_, last = draw_vitals(vitals(model, Feed(), Symbols()), Symbols(), width, 2, late="2s old").text()
        assert last.endswith("  2s old ") or last.strip() == "2s old", (width, last)


def test_marks_of_an_abandoned_branch_are_not_shown_on_the_live_one() -> None:
    back = RolledBack(
        time=1.0, step=3000, incarnation=2, from_step=4500, from_incarnation=1, checkpoint="step-00003000-1"
    )
    model = model_of(checkpoints=checkpoints(), events=[back])
    assert [mark.x for mark in marks_of(model, Symbols()) if mark.glyph == "▲"] == [1000, 2000, 3000]
    assert still_true(3000, 1, [back])
    assert not still_true(3001, 1, [back])
    assert still_true(4000, 2, [back])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (figures.number(None), "n/a"),
        (figures.number(float("nan")), "NaN"),
        (figures.number(2.3471), "2.347"),
        (figures.number(12345.6), "12,346"),
        (figures.learning_rate(2.8e-4), "2.80e-4"),
        (figures.learning_rate(0.0), "0"),
        (figures.percent(0.012), "1.2%"),
        (figures.percent(0.41), "41%"),
        (figures.duration(4.4), "4s"),
        (figures.duration(200), "3m20s"),
        (figures.duration(840), "14m"),
        (figures.duration(80100), "22h15m"),
        (figures.duration(273600), "3d4h"),
        (figures.short_time(0.0851), "85ms"),
        (figures.short_time(0.851), "0.85s"),
        (figures.plural(1, "rank"), "1 rank"),
    ],
)
def test_numbers_for_reading(text: str, expected: str) -> None:
    assert text == expected


def test_a_preempted_run_says_what_is_left_and_how_to_go_on() -> None:
    reason = "SIGUSR1 on node-a; checkpoint step-00000026-1.1"
    model = model_of(state=run_state(state="preempted", reason=reason))
    head = headline(model, Symbols())
    assert head.word == "PREEMPTED"
    assert head.story.startswith(f"the machine was taken away: {reason}")
    assert model.info is not None
    assert head.hint == f"trainctl run --resume {model.info.id} goes on"
