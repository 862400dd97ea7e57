"""All ranks said *ready*, and one does not come to the boundary: then no rank applies, and the operator hears why."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_agreement_threads import Rank
from torch.distributed import HashStore

from trainctl.trainer import control as control_module
from trainctl.trainer.actions import refusal
from trainctl.trainer.agreement import MAX_SKEW, Proposal, Seal
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
            prepare=lambda _: Prepared(),
            tell=self.told.append,
            incarnation=lambda: 1,
        )
        for rank in self.ranks:
            rank.control.start()
        self.leader.start()

    def send(self, action: Action) -> None:
        self.leader.submit(LinkCommand(command=Command(id="c", action=action), actor="mk", accepted=0.0))

    def scheduled(self) -> int:
        """The step that all ranks agreed on, once each of them knows it."""
        until(lambda: any(update.state == "scheduled" for update in self.told), 20, what="the agreement")
        for rank in self.ranks:
            until(lambda rank=rank: rank.core.boundary.armed is not None, 20)  # type: ignore[misc]
        return next(update.step for update in self.told if update.state == "scheduled")

    def meet(self, rank: int, step: int) -> None:
        self.ranks[rank].core.boundary.completed = step
        self.ranks[rank].actions.meet()

    def outcome(self) -> tuple[str, str]:
        found = until(lambda: next((u for u in self.told if u.state not in {"accepted", "scheduled"}), None), 20)
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
