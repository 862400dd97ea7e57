"""Which data other ranks used: every step is compared once, whatever report is missed, and what differs is told."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainctl.trainer.ranges import DataRanges, Range
from trainctl.trainer.rank_ranges import RANKS_TOLD, RankRanges, Recently, Report, decode_report, encode_report, in_runs
from trainctl.wire.messages import RankFigures, Rows


def report(rank: int, ranges: list[tuple[int, Range]], incarnation: int = 1) -> Report:
    figures = RankFigures(rank=rank, node="n", pid=1, state="running", step=0, time=0.0)
    return decode_report(encode_report(Report(figures, incarnation, in_runs(ranges))))


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
    ranges.rewound(10)
    assert ranges.observe([report(1, even(1, 20, batches=3))], even(1, 12), 2) == [], "a report of the old branch"
    found = ranges.observe([report(1, even(1, 12, batches=3), 2)], even(1, 12), 2)
    assert [rows.incarnation for rows in found] == [2]
    assert table(found)["data_first.1"].keys() == {11, 12}


def test_the_number_of_ranks_that_are_told_of_is_bounded() -> None:
    ranges = RankRanges(attempt=1)
    reports = [report(rank, even(1, 2, batches=3)) for rank in range(RANKS_TOLD + 10)]
    assert len(ranges.observe(reports, even(1, 2), 1)) == RANKS_TOLD
    assert ranges.passed_over == 9, "rank 0 is not among them"


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=200))
def test_whatever_reports_are_missed_every_step_is_told_once_if_no_ten_in_a_row_are(
    moves: list[tuple[int, bool]],
) -> None:
    mine, own, recently, told = DataRanges(), DataRanges(), Recently(), RankRanges(attempt=1)
    step = missed = index = 0
    seen: list[tuple[int, float]] = []
    for batches, reads in [*moves, (1, True)]:
        step += 1
        for _ in range(batches):
            mine.took(index)
            index += 1
        mine.close(step)
        own.took(10_000 + step)
        own.close(step)
        sent = report(1, mine.since(recently.since(step)))
        missed = 0 if reads or missed == 8 else missed + 1
        if missed == 0:
            for rows in told.observe([sent], own.since(1), 1):
                seen += table([rows])["data_first.1"].items()
    expected = [mine.of(number) for number in range(1, step + 1)]
    assert seen == [(number, float(made_of[0])) for number, made_of in enumerate(expected, 1) if made_of]
