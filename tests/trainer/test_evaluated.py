"""What becomes of an evaluation that an operator asked for, from what every rank reports of it."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import pytest
import torch
from test_agreement_threads import Rank
from torch import nn
from torch._C._distributed_c10d import HashStore

from trainctl.trainer.actions import Actions
from trainctl.trainer.agreement import Proposal, Seal
from trainctl.trainer.control import InDoubt
from trainctl.trainer.core import Callbacks
from trainctl.trainer.evaluated import Evaluated, Report, in_step, put_back, survives, told, words_for
from trainctl.trainer.meeting import Connection
from trainctl.wire.commands import Command, Evaluate
from trainctl.wire.messages import CommandUpdate
from waiting import until

WHOLE = Report(complete=True, collectives=4)
LEFT = Report(complete=False, reason="left before it was complete: stopped by mk", collectives=4)


def raised(words: str = "on_eval raised ValueError: bad", collectives: int | None = 4) -> Report:
    return Report(complete=False, reason=words, raised=True, collectives=collectives)


class Ranks:
    """Ranks that follow one evaluation; each has made as many collectives as `made` says."""

    def __init__(self, made: list[int]) -> None:
        self.made = [0] * len(made)
        self.told: list[Sequence[Report]] = []
        store = HashStore()

        def count(rank: int) -> Callable[[], int]:
            return lambda: self.made[rank]

        self.each = [
            Evaluated(
                Connection(store, "t", Seal(b"secret", 1)),
                number=1,
                rank=rank,
                ranks=len(made),
                tell=self.told.append,
                collectives=count(rank),
            )
            for rank in range(len(made))
        ]
        self.made = made

    def __enter__(self) -> Self:
        for one in self.each:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.each:
            one.close(0.5)


def test_it_is_applied_once_every_rank_is_done() -> None:
    with Ranks([2, 2]) as ranks:
        ranks.each[0].report(complete=True)
        assert not ranks.each[0].over.wait(0.3), "the other still evaluates"
        assert not ranks.told
        ranks.each[1].report(complete=True)
        assert ranks.each[0].over.wait(10)
    (reports,) = ranks.told
    assert told(reports) is None


def test_a_rank_that_raised_learns_how_the_others_went() -> None:
    with Ranks([2, 2, 2]) as ranks:
        ranks.each[1].report(complete=False, reason="on_eval raised ValueError: bad", raised=True)
        ranks.each[2].report(complete=True)
        assert not ranks.each[1].over.wait(0.3), "rank 0 still evaluates, perhaps in a collective"
        ranks.each[0].report(complete=True)
        assert ranks.each[1].over.wait(10)
        assert in_step(ranks.each[1].reports)
        assert ranks.each[0].over.wait(10)
    assert told(ranks.told[0]) == "rank 1: on_eval raised ValueError: bad"


def test_a_rank_that_waits_in_a_collective_to_which_the_one_that_raised_does_not_come_is_no_riddle_for_ever() -> None:
    with Ranks([3, 2]) as ranks:
        ranks.each[1].report(complete=False, reason="on_eval raised ValueError: bad", raised=True)
        assert ranks.each[1].over.wait(10), "though rank 0 never returns from its on_eval"
        assert not in_step(ranks.each[1].reports)
        assert ranks.each[0].over.wait(10)
    reason = told(ranks.told[0])
    assert reason is not None
    assert reason.startswith("rank 1: on_eval raised ValueError: bad; the ranks have not made the same collectives")


def test_a_rank_that_is_merely_slower_is_not_taken_for_one_that_hangs() -> None:
    with Ranks([1, 2]) as ranks:
        ranks.each[1].report(complete=False, reason="on_eval raised ValueError: bad", raised=True)
        assert not ranks.each[1].over.wait(0.6)
        ranks.made[0] = 2
        ranks.each[0].report(complete=True)
        assert ranks.each[1].over.wait(10)
        assert in_step(ranks.each[1].reports)
        assert ranks.each[0].over.wait(10)


def test_a_rank_that_is_done_and_in_its_next_step_when_it_is_counted_is_not_taken_for_one_that_hangs() -> None:
    with Ranks([2, 2]) as ranks:
        honest, first = ranks.each[0]._count, ranks.each[0]

        def counted() -> int | None:
            """What the training thread does between two lines of the other thread."""
            first._count = honest
            first.report(complete=True)
            ranks.made[0] = 3
            return honest()

        first._count = counted
        ranks.each[1].report(complete=False, reason="on_eval raised ValueError: bad", raised=True)
        assert ranks.each[1].over.wait(10)
        assert in_step(ranks.each[1].reports)


@pytest.mark.parametrize(
    ("reports", "words"),
    [
        ([WHOLE, WHOLE], None),
        ([LEFT, LEFT], LEFT.reason),
        ([raised()], "on_eval raised ValueError: bad"),
        ([raised(), raised()], "every rank: on_eval raised ValueError: bad"),
        ([WHOLE, raised()], "rank 1: on_eval raised ValueError: bad"),
        ([LEFT, raised()], "rank 1: on_eval raised ValueError: bad"),
        ([raised("one"), raised("other")], "rank 0: one"),
        ([WHOLE, raised(collectives=None)], "rank 1: on_eval raised ValueError: bad"),
    ],
)
def test_what_the_operator_is_told(reports: list[Report], words: str | None) -> None:
    assert told(reports) == words


def test_a_model_trains_on_in_the_mode_in_which_it_was() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model[1].eval()  # a part that the script keeps frozen

    @put_back([model])
    def evaluate() -> None:
        model.eval()
        torch.set_grad_enabled(False)
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        evaluate()
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()


def test_an_exception_is_told_in_one_line_of_bounded_length() -> None:
    assert words_for(ValueError("two\nlines")) == "on_eval raised ValueError: two lines"
    assert len(words_for(ValueError("x" * 10_000))) < 400


def test_no_thread_is_left_of_an_evaluation_that_nobody_else_reports() -> None:
    with Ranks([0, 0]) as ranks:
        ranks.each[0].report(complete=True)
        ranks.each[0].close(0.2)
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "trainctl-evaluated"], 10)


def asked_for(tmp_path: Path, on_eval: Callable[[Actions], dict[str, float]]) -> tuple[Actions, list[CommandUpdate]]:
    """A rank by itself whose meeting, inside an evaluation, ends in doubt."""
    rank = Rank(0, 1, HashStore(), threading.Barrier(1), tmp_path)
    rank.core.callbacks = Callbacks(on_eval=lambda: on_eval(rank.actions))

    def in_doubt(*, inside: bool) -> None:
        raise InDoubt("the store is silent")

    rank.actions._meet_one = in_doubt  # type: ignore[method-assign]
    return rank.actions, rank.core.events  # type: ignore[return-value]


ASKED = Proposal(number=1, command=Command(id="look", action=Evaluate()), actor="mk", step=1)


def test_what_the_scripts_own_on_eval_raises_is_told_and_passes_no_further(tmp_path: Path) -> None:
    def on_eval(_: Actions) -> dict[str, float]:
        raise KeyError("val")

    actions, events = asked_for(tmp_path, on_eval)
    assert not actions._evaluate(ASKED)
    assert [(event.state, event.reason) for event in events] == [("failed", "on_eval raised KeyError: 'val'")]


def test_what_trainctl_itself_raises_inside_an_evaluation_passes_whatever_the_script_makes_of_it(
    tmp_path: Path,
) -> None:
    def honest(actions: Actions) -> dict[str, float]:
        actions.meet(inside=True)
        return {}

    def wrapping(actions: Actions) -> dict[str, float]:
        try:
            actions.meet(inside=True)
        except InDoubt as error:
            raise ValueError("the evaluation failed") from error
        return {}

    for on_eval, raised in ((honest, InDoubt), (wrapping, ValueError)):
        actions, events = asked_for(tmp_path, on_eval)
        with pytest.raises(raised):
            actions._evaluate(ASKED)
        assert not events, "nobody knows yet"


class Ending(Evaluated):
    """Its thread ends, all said, between two looks of the training thread."""

    def __init__(self, reports: list[Report]) -> None:
        super().__init__(Connection(HashStore(), "t", Seal(b"", 1)), number=1, rank=1, ranks=2, tell=lambda _: None)
        self.all = reports

    def is_alive(self) -> bool:
        if self.all:
            self._end(self.all)
        return False


@pytest.mark.parametrize(("reports", "goes_on"), [([WHOLE, raised()], True), ([], False)])
def test_what_was_learnt_in_the_last_moment_counts(reports: list[Report], goes_on: bool, tmp_path: Path) -> None:
    core = Rank(1, 2, HashStore(), threading.Barrier(1), tmp_path).core
    assert survives(core, Ending(reports), ValueError("bad"), lambda: None) == goes_on
