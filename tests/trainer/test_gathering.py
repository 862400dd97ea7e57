"""All ranks said *ready*, and one does not come to the boundary: then no rank applies, and the operator hears why."""

import gc
import sys
import threading
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
from test_agreement_threads import Rank
from torch.distributed import HashStore

from trainctl.trainer import control as control_module
from trainctl.trainer.actions import refusal
from trainctl.trainer.agreement import MAX_SKEW, Proposal, Seal, in_two_phases
from trainctl.trainer.core import Callbacks
from trainctl.trainer.evaluation import evaluate
from trainctl.trainer.gathering import frame_of
from trainctl.trainer.leader import Leader, Prepared
from trainctl.trainer.meeting import Connection
from trainctl.wire.commands import Action, Command, Pause, SetTunable
from trainctl.wire.messages import CommandUpdate, LinkCommand
from waiting import until


class Pair:
    """Two ranks whose steps the test makes by hand."""

    def __init__(self, directory: Path) -> None:
        store, together = HashStore(), threading.Barrier(2)
        self.ranks = [Rank(number, 2, store, together, directory) for number in range(2)]
        self.told: list[CommandUpdate] = []
        self.leader = Leader(
            world_size=2,
            boundary=self.ranks[0].core.boundary,
            connection=Connection(store, "p", Seal(b"secret", 1)),
            prepare=lambda command: Prepared(two_phase=in_two_phases(command)),
            tell=self.told.append,
            incarnation=lambda: 1,
        )
        for rank in self.ranks:
            rank.control.start()
        self.leader.start()

    def send(self, action: Action, *, name: str = "c", condition: str | None = None) -> None:
        command = Command(id=name, action=action, condition=condition)
        self.leader.submit(LinkCommand(command=command, actor="mk", accepted=0.0))

    def scheduled(self, name: str = "c") -> int:
        """The step that all ranks agreed on, once each of them knows it."""

        def found() -> CommandUpdate | None:
            return next((update for update in self.told if (update.id, update.state) == (name, "scheduled")), None)

        agreed = until(found, 20, what="the agreement")
        for rank in self.ranks:
            until(lambda rank=rank: rank.core.boundary.armed is not None, 20)  # type: ignore[misc]
        assert agreed is not None
        return agreed.step

    def meet(self, rank: int, step: int) -> None:
        self.ranks[rank].core.boundary.completed = step
        self.ranks[rank].actions.meet()

    def evaluate(self, rank: int) -> None:
        """This rank's `on_eval` as the rank's training thread calls it."""
        one = self.ranks[rank]
        evaluate(one.core, lambda: one.actions.meet(inside=True))

    def outcome(self, name: str = "c") -> tuple[str, str]:
        def final() -> CommandUpdate | None:
            ends = (u for u in self.told if u.id == name and u.state not in {"accepted", "scheduled"})
            return next(ends, None)

        found = until(final, 20, what=f"the outcome of {name}")
        assert found is not None
        return found.state, str(found.reason)

    def applied(self) -> list[list[tuple[int, object]]]:
        return [rank.applied for rank in self.ranks]

    def close(self) -> None:
        for rank in self.ranks:
            rank.core.boundary.close()
        self.leader.close()
        for rank in self.ranks:
            rank.control.leave(20)
        for thread in (self.leader, *(rank.control for rank in self.ranks)):
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_a_rank_that_leaves_after_all_were_ready_takes_the_command_with_it(pair: Pair) -> None:
    pair.send(SetTunable(name="x", value=7))
    step = pair.scheduled()
    pair.ranks[1].core.boundary.close()
    pair.meet(0, step)
    assert pair.outcome() == ("rejected", f"rank 1: the run ended at step 0, before the boundary of step {step}")
    assert pair.applied() == [[], []]
    pair.close()


def test_nobody_is_paused_alone(pair: Pair) -> None:
    pair.send(Pause())
    step = pair.scheduled()
    pair.ranks[0].core.boundary.close()
    pair.meet(1, step)  # returns
    assert pair.outcome()[0] == "rejected"
    assert [rank.core.hold for rank in pair.ranks] == [None, None]
    pair.close()


def test_a_rank_whose_data_ended_within_join_is_known_while_the_others_wait_for_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.send(SetTunable(name="x", value=7))
    step = pair.scheduled()
    shadows = pair.ranks[1].control
    monkeypatch.setattr(shadows, "_training", -1)
    monkeypatch.setattr(control_module, "in_shadow", lambda thread: thread == -1)
    pair.meet(0, step)
    state, reason = pair.outcome()
    assert (state, pair.applied()) == ("rejected", [[], []])
    assert reason == "rank 1: it only shadows the other ranks in torch's Join: it has no boundary now"
    pair.close()


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_the_limit(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "GATHER_S", 0.2)
    pair.send(SetTunable(name="x", value=7))
    step = pair.scheduled()
    pair.meet(0, step)
    pair.meet(1, step)  # too late: it obeys what was decided
    state, reason = pair.outcome()
    assert (state, pair.applied()) == ("rejected", [[], []])
    assert f"not every rank came to the boundary of step {step}" in reason
    pair.close()


@pytest.mark.parametrize("condition", [None, "step >= 0"])
def test_a_rank_that_is_past_a_boundary_that_it_did_not_act_on_is_the_end_of_that_command_and_not_of_the_next(
    condition: str | None, pair: Pair
) -> None:
    pair.send(SetTunable(name="x", value=7), condition=condition)
    step = pair.scheduled()
    pair.ranks[1].core.boundary.completed = step + 1
    pair.meet(0, step)  # called off while it waits
    reason = "it went past the boundary without acting on it; nothing was changed on any rank"
    assert pair.outcome() == ("rejected", f"rank 1: {reason}")
    assert pair.applied() == [[], []]

    pair.ranks[0].core.boundary.completed = step + 1
    pair.send(SetTunable(name="x", value=8), name="next")
    step = pair.scheduled("next")
    other = threading.Thread(target=pair.meet, args=(1, step))
    other.start()
    pair.meet(0, step)
    other.join(20)
    assert pair.outcome("next")[0] == "applied"
    assert pair.applied() == [[(step, 8)], [(step, 8)]]
    pair.close()


def test_a_rank_without_the_evaluation_in_which_a_command_was_agreed_on_takes_part_when_its_on_eval_returns(
    pair: Pair,
) -> None:
    first, other = pair.ranks
    other.core.callbacks = Callbacks(on_eval=lambda: None)
    first.core.boundary.begin_evaluation()
    pair.send(SetTunable(name="x", value=7))
    pair.scheduled()
    proposed = first.core.boundary.armed
    assert proposed is not None
    assert proposed.proposal.mark, "rank 1 is as far as a rank that is about to begin its own"
    returning = threading.Thread(target=pair.evaluate, args=(1,))
    returning.start()
    while first.core.boundary.position < proposed.proposal.position:
        first.core.boundary.next_batch()
    first.actions.meet(inside=True)
    returning.join(20)
    assert pair.outcome()[0] == "applied"
    assert pair.applied() == [[(0, 7)], [(0, 7)]]

    pair.send(SetTunable(name="x", value=8), name="next")
    step = pair.scheduled("next")
    assert step > 0, "rank 1 is done: the next one is for a boundary that it has"
    returning = threading.Thread(target=pair.meet, args=(1, step))
    returning.start()
    pair.meet(0, step)
    returning.join(20)
    assert pair.outcome("next")[0] == "applied"
    pair.close()


def test_when_all_come_all_apply(pair: Pair) -> None:
    pair.send(SetTunable(name="x", value=7))
    step = pair.scheduled()
    other = threading.Thread(target=pair.meet, args=(1, step))
    other.start()
    pair.meet(0, step)
    other.join(20)
    assert pair.outcome()[0] == "applied"
    assert pair.applied() == [[(step, 7)], [(step, 7)]]
    pair.close()


@pytest.mark.parametrize(("ahead", "words"), [(0, "rank 1: it is at step 0 and rank 0 at step"), (1, "rank 0: it is")])
def test_ranks_that_have_drifted_apart_have_no_common_step(pair: Pair, ahead: int, words: str) -> None:
    pair.ranks[ahead].core.boundary.completed = MAX_SKEW + 1
    pair.send(SetTunable(name="x", value=7))
    state, reason = pair.outcome()
    assert (state, pair.applied()) == ("rejected", [[], []])
    assert words in reason
    assert "max_skew" in reason
    pair.close()


def test_no_rank_is_ready_for_a_boundary_behind_the_end_of_its_run(tmp_path: Path) -> None:
    core = Rank(0, 1, HashStore(), threading.Barrier(1), tmp_path).core
    core.total_steps, core.feed = 10, SimpleNamespace()  # type: ignore[assignment]
    core.boundary.completed = 9
    command = Command(id="c", action=SetTunable(name="x", value=1))

    def refused(step: int) -> str | None:
        return refusal(core, Proposal(number=1, command=command, actor="mk", step=step))

    assert refused(10) is None
    assert refused(11) == "the run ends at step 10, before the boundary of step 11"


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_while_the_frames_are_looked_at_and_the_collector_is_left_as_it_was(
    collects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process could stand still for ever otherwise, before CPython 3.11.9."""
    seen: list[bool] = []
    frames = sys._current_frames

    def looked_at() -> dict[int, FrameType]:
        seen.append(gc.isenabled())
        return frames()

    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    monkeypatch.setattr(sys, "_current_frames", looked_at)
    try:
        if not collects:
            gc.disable()
        assert frame_of(threading.get_ident()) is not None
        assert frame_of(-1) is None
        assert (seen, gc.isenabled()) == ([False, False], collects)
    finally:
        gc.enable()
