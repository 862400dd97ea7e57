"""From `log()` calls to rows: what belongs to a step is one row, and what is no number costs nothing but itself."""

import sys
from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainctl.trainer.buffer import Entry, NotANumber, Rewind, StepMark
from trainctl.trainer.names import NAMES_LIMIT
from trainctl.trainer.rows import RowMaker, columns
from trainctl.trainer.tally import Tally
from trainctl.wire import codec
from trainctl.wire.messages import LinkRecord, Rows


def logged(step: int, /, **values: object) -> Entry:
    return (step, values, ())


def mark(step: int, *, data: tuple[int, int] | None = None, mfu: float | None = None) -> Entry:
    return StepMark(step, float(step), 0.5, 10, 4, 0.1, 0.2, data, mfu)


def table(made: list[Rows]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for rows in made:
        for column in rows.columns:
            values = np.frombuffer(column.data, f"<{column.dtype}").tolist()
            found.setdefault(column.name, []).extend(zip(rows.steps, values, strict=True))
    return found


def test_what_is_logged_in_one_step_is_one_row_with_the_steps_own_figures() -> None:
    maker = RowMaker(attempt=1)
    (rows,) = maker.feed([logged(1, loss=2.0), logged(1, acc=0.5), mark(1, data=(0, 3), mfu=0.25)])
    assert rows.steps == [1]
    assert table([rows]) == {
        "loss": [(1, 2.0)], "acc": [(1, 0.5)], "step_time_s": [(1, 0.5)], "lr": [(1, 0.1)], "lr_scheduled": [(1, 0.2)],
        "tokens_per_s": [(1, 20.0)], "samples_per_s": [(1, 8.0)], "mfu": [(1, 0.25)],
        "data_first": [(1, 0.0)], "data_last": [(1, 3.0)],
    }  # fmt: skip


def test_a_row_of_a_past_step_is_told_under_that_step() -> None:
    maker = RowMaker(attempt=1)
    maker.feed([logged(5, loss=1.0), mark(5)])
    (late,) = maker.feed([logged(3, val_loss=0.5)])
    assert (late.steps, table([late])) == ([3], {"val_loss": [(3, 0.5)]})


def test_a_row_has_the_time_of_its_steps_end_and_without_one_the_time_it_was_seen() -> None:
    maker = RowMaker(attempt=1)
    (row,) = maker.feed([logged(5, loss=1.0), mark(5)], now=99.0)
    assert row.times == [5.0]
    (evaluated,) = maker.feed([logged(5, val_loss=0.5)], now=99.5)
    assert (evaluated.steps, evaluated.times) == ([5], [99.5])


def test_a_rollback_ends_the_rows_of_its_branch_and_drops_the_step_in_progress() -> None:
    maker = RowMaker(attempt=1)
    made = maker.feed(
        [logged(5, loss=1.0), mark(5), logged(6, loss=9.0), Rewind(3, 2, {}), logged(4, loss=2.0), mark(4)]
    )
    assert [(rows.incarnation, rows.steps) for rows in made] == [(1, [5]), (2, [4])]


def test_what_was_logged_behind_the_last_step_belongs_to_it_and_in_a_step_that_was_begun_to_that() -> None:
    maker = RowMaker(attempt=1)
    maker.feed([logged(5, loss=1.0), mark(5), logged(6, test=0.9)])
    (rows,) = maker.finish(5, begun=False)
    assert table([rows]) == {"test": [(5, 0.9)]}
    assert maker.finish(5, begun=False) == []
    maker.feed([logged(6, loss=float("inf"))])
    (rows,) = maker.finish(5, begun=True)
    assert table([rows]) == {"loss": [(6, float("inf"))]}


def test_a_step_whose_mark_was_refused_keeps_its_number_at_the_end() -> None:
    maker = RowMaker(attempt=1)
    maker.feed([logged(5, loss=1.0), mark(5), logged(6, loss=2.0), logged(7, loss=3.0), logged(8, test=0.9)])
    made = maker.finish(7, begun=False)
    assert table(made) == {"loss": [(6, 2.0), (7, 3.0)], "test": [(7, 0.9)]}


def test_each_bad_name_and_value_is_said_once() -> None:
    maker = RowMaker(attempt=1)
    for step in range(1, 4):
        maker.feed(
            [
                logged(step, text="x", none=None, big=10**400, tensor=NotANumber("Tensor of shape (3,)"), ok=1),
                mark(step),
            ]
        )
        maker.feed([logged(step, **{"a\x1b[31mb": 1.0, "\x07": 2.0, "": 3.0, "n" * 500: 4.0})])
    texts = maker.complaints
    for words in (
        "'text' is a str",
        "'none' is a NoneType",
        "'big' is a int",
        "Tensor of shape (3,)",
        "'a\\x1b[31mb'",
        "'\\x07'",
    ):
        assert len([text for text in texts if words in text]) == 1, words
    assert len(texts) == 8
    assert maker.refused_values == 3 * 4
    assert maker.refused_names == 3 * 2


def test_a_name_that_is_another_ones_without_its_control_characters_never_takes_its_place() -> None:
    for first, second in (("loss", "lo\x1bss"), ("lo\x1bss", "loss")):
        maker = RowMaker(attempt=1)
        values = {"loss": 1.0, "lo\x1bss": 99.0}
        made = maker.feed([logged(1, **{name: values[name] for name in (first, second)}), mark(1)])
        made += maker.feed([logged(2, **{name: values[name] for name in (first, second)}), mark(2)])
        assert table(made)["loss"] == [(1, 1.0), (2, 1.0)]
        assert len([text for text in maker.complaints if "'lo\\x1bss' is left out" in text]) == 1
    maker = RowMaker(attempt=1)
    long = "n" * 300
    (rows,) = maker.feed([logged(1, **{f"{long}a": 1.0, f"{long}b": 2.0}), mark(1)])
    assert table([rows])["n" * 200] == [(1, 1.0)]
    assert "b' is left out" in maker.complaints[1]
    assert maker.refused_names == 1


def test_the_runs_own_figures_stand_and_a_script_that_logs_others_by_their_names_hears_of_it_once() -> None:
    maker = RowMaker(attempt=1)
    made = []
    for step in range(1, 4):
        made += maker.feed([logged(step, lr=7.0, data_first=3.0, lr_scheduled=0.2), mark(step, data=(1, 2))])
    assert table(made)["lr"] == [(1, 0.1), (2, 0.1), (3, 0.1)]
    assert table(made)["data_first"] == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert [text.split()[1] for text in maker.remarks] == ["'lr'", "'data_first'"], "the third is the same in both"
    assert not maker.complaints


def test_a_scripts_own_count_that_goes_back_is_told_once_by_name_unless_a_rollback_took_it_back() -> None:
    maker = RowMaker(attempt=1)
    maker.feed([logged(3, step=3, **{"train/global_step": 3.0}), mark(3), Rewind(1, 2, {})])
    maker.feed([logged(2, step=2, **{"train/global_step": 2.0}, loss=1.0), mark(2)])
    assert not maker.remarks
    for step in range(3, 6):
        maker.feed([logged(step, step=-step, **{"train/global_step": float(step)}, loss=-step), mark(step)])
    (told,) = maker.remarks
    assert told.startswith("metric 'step' went back from 2 to -3: ")


def test_a_value_whose_class_raises_anything_is_refused() -> None:
    class Odd:
        def __float__(self) -> float:
            raise AttributeError("not today")

    maker = RowMaker(attempt=1)
    (rows,) = maker.feed([logged(1, odd=Odd(), loss=1.0), mark(1)])
    assert "loss" in table([rows])
    assert "odd" not in table([rows])


def test_names_without_end_are_bounded_and_said_once() -> None:
    maker = RowMaker(attempt=1)
    for step in range(1, 11):
        maker.feed([logged(step, **{f"sample_{step}_{number}": 1.0 for number in range(1000)}), mark(step)])
    assert len([text for text in maker.complaints if "metric names" in text]) == 1
    assert maker.refused_names == 10_000 - NAMES_LIMIT
    assert len(maker.newest) == NAMES_LIMIT
    assert len(maker._names.shown) == NAMES_LIMIT


def test_of_a_name_beyond_the_limit_no_more_is_looked_at_than_that_it_is_beyond_it() -> None:
    class Read(str):
        __slots__ = ()
        read = 0

        def __iter__(self) -> Iterator[str]:
            Read.read += 1
            return super().__iter__()

    maker = RowMaker(attempt=1)
    maker.feed([logged(1, **{f"metric_{number}": 1.0 for number in range(NAMES_LIMIT)}), mark(1)])
    for step in range(2, 5):
        maker.feed([(step, {Read(f"sample_{step}_{number}"): 1.0 for number in range(100)}, ()), mark(step)])
    assert maker.refused_names == 300
    assert Read.read == 1, "the first, which is told"


def test_a_wide_row_costs_few_calls_a_value() -> None:
    maker, tally, calls = RowMaker(attempt=1), Tally(), 0
    values = {f"layer{number}/grad_norm": 1.0 + number / 3 for number in range(1000)}
    maker.feed([logged(1, **values), mark(1)])

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        for rows in maker.feed([logged(2, **values), mark(2)]):
            tally.observe(rows, None)
    finally:
        sys.setprofile(None)
    assert calls < 6 * len(values), "each of them keeps the interpreter from the training thread"


NUMBERS = st.one_of(st.floats(), st.floats(width=32), st.sampled_from([0.1, 2.0**24 + 1, 1e300, -0.0]))


@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=5))
def test_every_bit_of_a_value_is_kept_and_float32_where_that_does(table: list[list[float]]) -> None:
    wide = np.array(table, "<f8")
    made = columns([str(number) for number in range(len(table))], wide)
    for values, column in zip(wide, made, strict=True):
        back = np.frombuffer(column.data, f"<{column.dtype}").astype("<f8")
        numbers = ~np.isnan(values)
        assert (np.isnan(back) == np.isnan(values)).all()
        assert back[numbers].tobytes() == values[numbers].tobytes()
        with np.errstate(over="ignore"):
            narrow = values.astype("<f4").astype("<f8")
        assert column.dtype == ("f4" if np.array_equal(narrow, values, equal_nan=True) else "f8")


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 120))
def test_whatever_is_logged_fits_a_packet_of_the_link(steps: int, names: int, length: int) -> None:
    maker = RowMaker(attempt=1)
    values = {f"{number}-".ljust(length, "ü"): float(number) for number in range(names)}
    entries: list[Entry] = []
    for step in range(1, steps + 1):
        entries += [logged(step, **values), mark(step)]
    made = maker.feed(entries)
    assert all(len(codec.encode(LinkRecord(link=10**9, body=rows))) < 128 * 1024 for rows in made)
    found = table(made)
    assert all(found[name] == [(step, value) for step in range(1, steps + 1)] for name, value in values.items())


def test_what_waited_in_a_backlog_fits_too_also_where_a_row_has_one_value() -> None:
    first = 10**9  # steps and times take more than the value
    entries: list[Entry] = [
        StepMark(step, 1.7e9 + step, 0.1, 0, 0, None, None) for step in range(first, first + 20_000)
    ]
    made = RowMaker(attempt=1, completed=first - 1).feed(entries)
    assert [step for rows in made for step in rows.steps] == list(range(first, first + 20_000))
    assert max(len(codec.encode(LinkRecord(link=10**9, body=rows))) for rows in made) < 128 * 1024
