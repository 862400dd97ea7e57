"""Which data other ranks used: every step is compared once, whatever report is missed, and what differs is told."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainctl.trainer.ranges import DataRanges, Range
from trainctl.trainer.rank_ranges import (
    RANKS_TOLD,
    RUNS_A_REPORT,
    RankRanges,
    Recently,
    Report,
    decode_report,
    encode_report,
    in_runs,
    report_of,
)
from trainctl.wire.messages import RankFigures, Rows


def report(
    rank: int, ranges: list[tuple[int, Range]], incarnation: int = 1, *, since: int = 1, step: int = 0
) -> Report:
    figures = RankFigures(rank=rank, node="n", pid=1, state="running", step=step, time=0.0)
    return decode_report(encode_report(report_of(figures, incarnation, ranges, since)))


def table(made: list[Rows]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for rows in made:
        for column in rows.columns:
            values = np.frombuffer(column.data, f"<{column.dtype}").tolist()
            found.setdefault(column.name, {}).update(zip(rows.steps, values, strict=True))
    return found


def even(first: int, last: int, batches: int = 2) -> list[tuple[int, Range]]:
    return [(step, (batches * (step - 1), batches * step - 1)) for step in range(first, last + 1)]


def test_a_rank_that_reads_as_rank_0_does_costs_one_run_and_nothing_in_the_history() -> None:
    assert len(in_runs(even(1, 5000))) == 1
    assert RankRanges(attempt=1).observe([report(1, even(1, 5000))], even(1, 5000), 1) == []


def test_what_differs_is_told_once_and_what_rank_0_has_not_reached_waits() -> None:
    ranges = RankRanges(attempt=1)
    other = even(1, 60, batches=3)
    found = table(ranges.observe([report(1, other)], even(1, 50), 1))
    assert found["data_first.1"] == {step: 3.0 * (step - 1) for step in range(1, 51)}
    assert found["data_last.1"][50] == 149.0
    assert ranges.observe([report(1, other)], even(1, 50), 1) == []
    assert table(ranges.observe([report(1, other)], even(1, 60), 1))["data_first.1"].keys() == set(range(51, 61))


def test_after_a_rollback_only_the_new_branchs_steps_are_told() -> None:
    ranges = RankRanges(attempt=1)
    ranges.observe([report(1, even(1, 20, batches=3))], even(1, 20), 1)
    old = report(1, even(1, 20, batches=3))
    assert ranges.observe([old], even(1, 12), 2, began=10) == [], "a report of the old branch"
    found = ranges.observe([report(1, even(1, 12, batches=3), 2, since=11)], even(1, 12), 2, began=10)
    assert [rows.incarnation for rows in found] == [2]
    assert table(found)["data_first.1"].keys() == {11, 12}
    assert ranges.gaps == []


def test_the_number_of_ranks_that_are_told_of_is_bounded() -> None:
    ranges = RankRanges(attempt=1)
    reports = [report(rank, even(1, 2, batches=3)) for rank in range(RANKS_TOLD + 10)]
    assert len(ranges.observe(reports, even(1, 2), 1)) == RANKS_TOLD
    assert ranges.passed_over == 9, "rank 0 is not among them"


def test_a_branch_is_reported_from_its_first_step_on_however_many_steps_it_has_by_then() -> None:
    recently = Recently()
    assert recently.since(1, 0) == 1
    for step in range(100, 2000, 100):
        recently.sent(1, step)
    assert recently.since(2, 50) == 51, "no report of the branch that was left is near"
    recently.sent(1, 2000)
    assert recently.since(2, 50) == 51, "and one of that branch that comes into the store late counts for nothing"


def test_what_rank_0_missed_is_told_and_the_first_step_behind_it_is_logged_though_it_is_as_rank_0s() -> None:
    ranges = RankRanges(attempt=1)
    assert ranges.observe([report(rank, even(1, 100)) for rank in (1, 2)], even(1, 100), 1) == []
    late = [report(rank, even(161, 200), since=161) for rank in (1, 2)]
    found = table(ranges.observe(late, even(1, 200), 1))
    assert found["data_first.1"] == found["data_first.2"] == {161: 320.0}
    (gap,) = ranges.gaps
    assert (gap.first, gap.last, gap.ranks) == (101, 160, [1, 2])
    assert str(gap).startswith("which data ranks 1, 2 made steps 101 to 160 of is not recorded")
    assert ranges.observe(late, even(1, 200), 1) == []
    assert len(ranges.gaps) == 1, "told once"


def test_what_is_too_much_for_a_report_is_a_gap_and_steps_of_no_batch_are_none() -> None:
    ranges = RankRanges(attempt=1)
    ragged = [(step, (10 * step, 10 * step)) for step in range(1, 3 * RUNS_A_REPORT + 1)]
    ranges.observe([report(1, ragged)], even(1, 1000), 1)
    (gap,) = ranges.gaps
    assert (gap.first, gap.last) == (1, 2 * RUNS_A_REPORT)
    idle = RankRanges(attempt=1)
    idle.observe([report(1, [*even(1, 5), *even(50, 60)])], even(1, 60), 1)
    for step in range(70, 100, 10):
        idle.observe([report(1, [], since=step - 10, step=step)], even(1, 100), 1)
    idle.observe([report(1, even(95, 100), since=90, step=100)], even(1, 100), 1)
    assert idle.gaps == []


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["seen", "not seen", "not sent"])), min_size=1, max_size=200)
)
def test_whatever_reports_are_missed_every_step_is_told_once_or_is_in_a_gap_that_is(
    moves: list[tuple[int, str]],
) -> None:
    mine, own, recently, told = DataRanges(), DataRanges(), Recently(), RankRanges(attempt=1)
    step = index = not_seen = longest = 0
    seen: list[tuple[int, float]] = []
    for batches, fate in [*moves, (1, "seen")]:
        step += 1
        for _ in range(batches):
            mine.took(index)
            index += 1
        mine.close(step)
        own.took(10_000 + step)
        own.close(step)
        since = recently.since(1, 0)
        report_now = report(1, mine.since(since), since=since, step=step)
        if fate != "not sent":
            recently.sent(1, step)
            not_seen = 0 if fate == "seen" else not_seen + 1
            longest = max(longest, not_seen)
        if fate == "seen":
            for rows in told.observe([report_now], own.since(1), 1):
                seen += table([rows])["data_first.1"].items()
    ranges = {number: mine.of(number) for number in range(1, step + 1)}
    lacking = {number for gap in told.gaps for number in range(gap.first, gap.last + 1)}
    assert seen == [(n, float(made_of[0])) for n, made_of in ranges.items() if made_of and n not in lacking]
    assert longest >= 9 or not lacking, "nine reports may be missed in a row, and any number not sent"
