"""A change on trial undoes itself N steps later unless its condition holds, whatever happens to the run meanwhile."""

from pathlib import Path

import msgspec
import pytest
from one_rank import OneRank

from trainctl.trainer.agreement import Proposal
from trainctl.trainer.boundary import Armed
from trainctl.trainer.override_rules import RELEASE
from trainctl.trainer.reverts import Reverts
from trainctl.wire.commands import Command, LrRelease, LrScale, LrSet, SetTunable

N = 6


@pytest.fixture
def rank(tmp_path: Path) -> OneRank:
    made = OneRank(tmp_path)
    made.train(10)
    return made


def scaled(rank: OneRank) -> dict[int, float]:
    """By step, the LR that was used as a share of the scheduled one."""
    return {step: round(used[0] / (0.1 / (1.0 + (step - 1) / 10.0)), 6) for step, used in rank.used.items()}


def test_after_n_steps_it_is_as_before_and_the_undoing_is_told_as_a_command(rank: OneRank) -> None:
    rank.do(LrScale(factor=0.5), command_id="a", revert_after=N)
    assert rank.core.reverts.steps_left(rank.step) == {"a": N}
    rank.train(10)
    assert [scaled(rank)[step] for step in range(9, 21)] == [1.0] * 2 + [0.5] * N + [1.0] * 4
    assert rank.outcomes() == {"a": "applied", "a.undo": "applied"}
    assert rank.core.reverts.steps_left(rank.step) == {}


def test_it_takes_back_its_own_change_and_nothing_else(rank: OneRank) -> None:
    rank.do(SetTunable(name="weight_decay", value=0.3))
    rank.do(LrScale(factor=0.5), revert_after=N)
    rank.train(2)
    rank.do(SetTunable(name="weight_decay", value=0.05))
    rank.do(LrSet(value=1e-4, group=1))
    rank.do(SetTunable(name="clip", value=0.5))
    rank.train(8)
    assert rank.overrides.describe() == {"weight_decay": "= 0.05", "lr": "group 1 = 0.0001"}
    assert rank.clip.value == 0.5
    assert rank.overrides.effective_lr(0) == rank.overrides.scheduled_lr(0)


def test_two_groups_on_trial_go_back_one_by_one(rank: OneRank) -> None:
    rank.do(LrScale(factor=0.5, group=0), revert_after=3)
    rank.do(LrScale(factor=0.2, group=1), revert_after=N)
    rank.train(4)
    assert rank.overrides.describe() == {"lr": "group 1 × 0.2"}
    rank.train(4)
    assert not rank.overrides.active


def test_a_trial_upon_a_trial_goes_back_to_what_was_before_both(rank: OneRank) -> None:
    rank.do(LrScale(factor=0.9))
    rank.do(LrScale(factor=0.5), command_id="a", revert_after=N)
    rank.do(SetTunable(name="clip", value=0.5), revert_after=N)
    rank.train(2)
    rank.do(LrSet(value=1e-4), command_id="b", revert_after=N)
    rank.do(SetTunable(name="clip", value=0.7), revert_after=N)
    assert "b takes the place of a, which was on trial" in rank.notes()
    rank.train(10)
    assert rank.overrides.describe() == {"lr": "× 0.9"}
    assert (rank.clip.value, rank.core.tunables.steered()) == (1.0, {})
    assert "a.undo" not in rank.outcomes()


def test_a_newer_change_that_is_not_on_trial_stays(rank: OneRank) -> None:
    rank.do(LrScale(factor=0.5), revert_after=N)
    rank.train(2)
    rank.do(LrScale(factor=0.8))
    rank.train(10)
    assert rank.overrides.describe() == {"lr": "× 0.8"}


def test_a_release_on_trial_puts_the_override_back(rank: OneRank) -> None:
    rank.do(SetTunable(name="beta1", value=0.5))
    rank.do(SetTunable(name="beta1", value=RELEASE), revert_after=N)
    assert rank.overrides.effective("beta1") == 0.9
    rank.train(10)
    assert rank.overrides.describe() == {"beta1": "= 0.5"}


def test_so_does_a_release_of_the_rate(rank: OneRank) -> None:
    rank.do(LrScale(factor=0.5))
    rank.do(LrRelease(), revert_after=N)
    rank.train(10)
    assert [scaled(rank)[step] for step in range(11, 21)] == [1.0] * N + [0.5] * 4


@pytest.mark.parametrize(("unless", "stays"), [("loss < 3", True), ("loss < 1", False), ("unheard_of < 1", False)])
def test_the_condition_is_looked_at_when_the_time_is_over_and_decides_once(
    rank: OneRank, unless: str, stays: bool
) -> None:
    rank.core.last_metrics["loss"] = 0.5
    rank.do(LrScale(factor=0.5), command_id="a", revert_after=N, unless=unless)
    rank.train(3)
    rank.core.last_metrics["loss"] = 2.0
    rank.train(5)
    rank.core.last_metrics["loss"] = 9.0
    rank.train(300)
    assert rank.overrides.describe() == ({"lr": "× 0.5"} if stays else {})
    assert rank.core.reverts.steps_left(rank.step) == {}
    assert rank.outcomes()["a.undo"] == ("rejected" if stays else "applied")
    if stays:
        assert f"{unless} holds: the change of command a stays" in rank.notes()
        rank.do(LrScale(factor=0.3), revert_after=N)
        rank.train(10)
        assert rank.overrides.describe() == {"lr": "× 0.5"}, "what was confirmed is what a later trial goes back to"


def test_a_paused_run_is_not_undone_before_its_step(rank: OneRank) -> None:
    rank.do(LrScale(factor=0.5), command_id="a", revert_after=N)
    reverts = rank.core.reverts
    assert reverts.due(rank.step + N - 2, held=True) == []
    assert [asked for _, asked in reverts.due(rank.step + N - 2)] == [0]
    assert reverts.due(rank.step + N) == [], "it was asked for"
    assert [asked for _, asked in reverts.due(rank.step + N + 100)] == [1], "and again, where nothing came of it"


def test_where_steps_are_short_it_is_asked_for_early_enough(rank: OneRank) -> None:
    rank.do(LrScale(factor=0.5), command_id="a", revert_after=500)
    looks = range(rank.step, rank.step + 500, 40)  # forty steps go by between two looks
    found = [step for step in looks if rank.core.reverts.due(step)]
    assert found[0] + 40 < rank.step + 500, "before its step"
    assert len(found) == 1


# --- rollbacks and restarts


def test_rolled_back_to_before_the_change_its_trial_begins_anew_twice_over(rank: OneRank) -> None:
    checkpoint = rank.save()
    rank.train(2)
    rank.do(LrScale(factor=0.5), command_id="a", revert_after=N)
    for _ in range(2):
        rank.train(4)
        rank.roll_back(checkpoint)
        assert rank.step == 10
        assert rank.overrides.describe() == {"lr": "× 0.5"}, "the operator's newest is re-applied"
        assert rank.core.reverts.steps_left(rank.step) == {"a": N}
    rank.used.clear()
    rank.train(N + 3)
    assert list(scaled(rank).values()) == [0.5] * N + [1.0] * 3


def test_rolled_back_into_the_trial_it_ends_at_the_same_step(rank: OneRank) -> None:
    rank.do(LrScale(factor=0.5), command_id="a", revert_after=N)
    rank.train(2)
    checkpoint = rank.save()
    rank.train(3)
    rank.roll_back(checkpoint)
    assert rank.core.reverts.steps_left(rank.step) == {"a": N - 2}
    rank.train(N)
    assert not rank.overrides.active


def test_an_undoing_that_a_rollback_overtakes_waits_for_the_new_trial(rank: OneRank) -> None:
    checkpoint = rank.save()
    rank.do(LrScale(factor=0.5), command_id="a", revert_after=N)
    ((revert, _asked),) = rank.core.reverts.due(rank.step + N - 1)
    rank.roll_back(checkpoint)
    rank.train(1)
    early = Proposal(
        number=9, command=Command(id="a.undo", action=revert.command.action), actor="mk", step=11, undo="a"
    )
    armed = Armed(early)
    rank.core.boundary.arm(armed)
    rank.actions.meet()
    assert armed.outcome is not None
    assert (armed.outcome.ok, armed.outcome.declined) == (False, True)
    assert "began its trial anew: it is undone at step 16" in str(armed.outcome.reason)
    rank.train(N)
    assert not rank.overrides.active


def test_undone_before_the_rollback_it_stays_undone(rank: OneRank) -> None:
    rank.do(LrScale(factor=0.5), revert_after=3)
    checkpoint = rank.save()
    rank.train(8)
    rank.roll_back(checkpoint)
    assert not rank.overrides.active
    assert rank.core.reverts.steps_left(rank.step) == {}


def test_with_the_checkpoints_overrides_come_the_checkpoints_trials(rank: OneRank) -> None:
    before = rank.save()
    rank.do(LrScale(factor=0.5), command_id="a", revert_after=N)
    rank.do(SetTunable(name="clip", value=0.5), command_id="b", revert_after=N)
    rank.train(2)
    during = rank.save()
    rank.train(8)
    assert not rank.overrides.active
    rank.roll_back(during, restore_overrides=True)
    assert (rank.overrides.describe(), rank.clip.value) == ({"lr": "× 0.5"}, 0.5)
    assert rank.core.reverts.steps_left(rank.step) == {"a": N - 2, "b": N - 2}
    rank.train(8)
    assert (rank.overrides.describe(), rank.clip.value) == ({}, 1.0)
    assert {"a.undo", "a.undo.2", "b.undo", "b.undo.2"} <= rank.outcomes().keys(), "each undoing has its one outcome"
    rank.do(LrScale(factor=0.5), revert_after=N)
    rank.roll_back(before, restore_overrides=True)
    assert rank.core.reverts.steps_left(rank.step) == {}
    assert not rank.overrides.active


def test_a_rollback_that_scales_the_rate_takes_the_place_of_a_trial(rank: OneRank) -> None:
    checkpoint = rank.save()
    rank.do(LrSet(value=1e-4), revert_after=N)
    rank.roll_back(checkpoint, lr_scale=0.25)
    rank.train(12)
    assert rank.overrides.describe() == {"lr": "× 0.25"}


def test_what_is_on_trial_survives_as_text(rank: OneRank) -> None:
    rank.do(LrScale(factor=0.5, group=1), revert_after=N, unless="loss < 2")
    rank.do(SetTunable(name="clip", value=2.0), revert_after=3)
    rank.do(LrRelease(group=0))
    kept = rank.core.reverts.state_dict()
    other = Reverts()
    other.load_state_dict(msgspec.json.decode(msgspec.json.encode(kept)))
    assert other.state_dict() == kept
    assert other.steps_left(rank.step) == {"c1": N, "c2": 3}
