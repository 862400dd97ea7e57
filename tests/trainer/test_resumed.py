"""What a script tracks after a resume is restored as it is tracked, by each rank alone; what it no longer tracks is
told once the loop begins, and not before."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from one_rank import OneRank

from jobs import job
from trainctl.trainer import Run
from trainctl.trainer import run as run_module
from trainctl.trainer.attach import Parts, Script
from trainctl.trainer.checkpoint import CheckpointError
from trainctl.trainer.checkpoint.rng import capture_rng, restore_rng
from trainctl.trainer.feed import Feed
from trainctl.trainer.resuming import resume
from trainctl.trainer.rolling_back import begin_branch, skipped_from
from trainctl.trainer.tunables import TunableValue
from trainctl.wire.lineage import Branch
from trainctl.wire.messages import Anomaly
from waiting import until


class Curriculum:
    """A loader that asks the script how hard the samples are to be, when an epoch is opened."""

    def __init__(self) -> None:
        self.hardness = {"level": torch.tensor(1.0)}

    def __iter__(self) -> Iterator[float]:
        level = float(self.hardness["level"])
        return iter([level * (index + 1) for index in range(4)])


class Attempt:
    """One attempt of a run of one rank, with the loader and the handle of a script."""

    def __init__(self, directory: Path, attempt: int) -> None:
        self.rank = OneRank(directory, attempt=attempt)
        self.core = core = self.rank.core
        assert core.checkpointer is not None
        self.loader = Curriculum()
        core.feed = Feed(self.loader, capture_rng=capture_rng, restore_rng=restore_rng)
        object.__setattr__(core.checkpointer.state, "loader", core.feed)
        tracked = cast(dict[str, Any], core.checkpointer.state.tracked)
        nothing: Any = None
        parts = Parts(
            core=core,
            actions=None,
            control=None,
            leader=None,
            sender=nothing,
            place_file=None,
            tracked=tracked,
            preemption=nothing,
        )
        self.run = Run(parts, Script(name="one"))

    def resume(self) -> None:
        assert resume(self.core, None) == 2
        assert self.core.checkpointer is not None
        self.core.checkpointer._ranks = None  # type: ignore[assignment] # nobody else is there to talk to from now on

    def track_hardness(self) -> None:
        self.run.track("hardness", get=lambda: self.loader.hardness, set=self.loader.hardness.update)

    @property
    def notes(self) -> list[str]:
        return [text.partition(": ")[2] for text in self.rank.notes()]


@pytest.fixture
def second(tmp_path: Path) -> Attempt:
    """The second attempt of a run that tracked `hardness` and `old`; the data stand behind one batch of an epoch."""
    first = Attempt(tmp_path, 1)
    first.track_hardness()
    first.run.track("old", get=lambda: 7, set=lambda _value: None)
    first.loader.hardness["level"] += 2.0
    assert next(first.run.batches()) == 3.0
    first.rank.train(2)
    first.rank.save()
    return Attempt(tmp_path, 2)


def test_what_is_tracked_before_the_loop_is_restored_without_any_other_rank_and_no_falsehood_is_told(
    second: Attempt,
) -> None:
    second.resume()
    assert second.notes == []
    told = [event for event in second.core.events if isinstance(event, Anomaly)]
    assert told == [], "nobody set anything, so no settings are missing"
    second.track_hardness()
    assert float(second.loader.hardness["level"]) == 3.0
    assert next(second.run.batches()) == 6.0, "the loader read what was tracked"
    assert second.notes == ["tracked.old is in the checkpoint and not tracked now: left out"]


def test_random_numbers_are_the_checkpoints_whatever_taking_a_state_draws(second: Attempt) -> None:
    second.resume()
    expected = capture_rng()["torch"]
    second.run.track("old", get=lambda: 0, set=lambda _value: torch.rand(3))
    second.track_hardness()
    assert torch.equal(torch.get_rng_state(), expected)
    torch.manual_seed(5)  # a script's own, before its loop
    next(second.run.batches())
    assert torch.equal(torch.get_rng_state(), expected)


def test_random_numbers_that_a_first_step_has_drawn_already_are_not_drawn_again(second: Attempt) -> None:
    """As where a script takes no batches from us: its first step is over when its loop is known to have begun."""
    second.resume()
    second.track_hardness()
    torch.rand(3)
    expected = torch.get_rng_state()
    second.run.step_done()
    assert torch.equal(torch.get_rng_state(), expected)


def test_what_the_checkpoint_does_not_have_stays_as_it_is_and_is_told(second: Attempt) -> None:
    second.resume()
    second.run.track("new", get=lambda: 1, set=lambda _value: pytest.fail("there is no state to set"))
    assert second.notes == ["tracked.new is not in the checkpoint and stays as it is"]


def test_a_script_with_batches_of_its_own_is_told_at_its_first_step(second: Attempt) -> None:
    second.resume()
    second.run.step_done()
    assert len(second.notes) == 2
    second.run.step_done()
    assert len(second.notes) == 2


def test_what_is_tracked_in_the_loop_is_not_restored_and_the_log_says_so(
    second: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    second.resume()
    next(second.run.batches())
    with caplog.at_level(logging.WARNING):
        second.track_hardness()
    assert float(second.loader.hardness["level"]) == 1.0
    assert "hardness is tracked after training began again and is not restored" in caplog.text


def test_files_that_are_gone_meanwhile_are_named(second: Attempt) -> None:
    second.resume()
    assert second.core.checkpointer is not None
    for file in second.core.checkpointer.directory.glob("step-*/*.distcp"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"step-00000002-1.1 cannot be read any more: .*\.distcp"):
        second.track_hardness()


class TestDataThatARollbackLeftOut:
    @pytest.fixture
    def left_out(self, tmp_path: Path) -> str:
        """Its checkpoint: the run had read 1 then, left out 2 and 3 by a rollback to it, and died behind 4, 1 and 2."""
        first = Attempt(tmp_path, 1)
        first.track_hardness()
        batches = first.run.batches()
        assert next(batches) == 1.0
        first.rank.train(2)
        checkpoint = first.rank.save()
        assert first.rank.roll_back(checkpoint, skip_batches=2).ok
        assert [next(batches) for _ in range(3)] == [4.0, 1.0, 2.0]
        return checkpoint

    @pytest.mark.parametrize("tracked", [True, False])
    def test_are_left_out_by_every_restart_before_the_next_checkpoint(
        self, tracked: bool, left_out: str, tmp_path: Path
    ) -> None:
        for attempt in (3, 4):
            again = Attempt(tmp_path, attempt)
            assert resume(again.core, None) == 2
            if tracked:
                again.track_hardness()
            batches = again.run.batches()
            assert [next(batches) for _ in range(3)] == [4.0, 1.0, 2.0]
            assert again.notes[0] == (
                "the 2 micro-batches on each rank that the rollback to step 2 left out are left out again"
            )
        again.rank.train(1)
        again.rank.save()
        later = Attempt(tmp_path, 5)
        assert resume(later.core, None) == 3
        assert next(later.run.batches()) == 3.0, "where the data stand is in the newer checkpoint"
        assert not [text for text in later.notes if "left out again" in text]

    def test_are_read_where_the_operator_names_the_checkpoint(
        self, left_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TRAINCTL_RESUME", left_out)
        again = Attempt(tmp_path, 3)
        again.resume()
        assert next(again.run.batches()) == 2.0

    def test_are_told_to_be_read_again_where_only_an_older_checkpoint_is_left(self, tmp_path: Path) -> None:
        first = Attempt(tmp_path, 1)
        first.rank.train(2)
        first.rank.save()
        first.core.incarnation = 2
        begin_branch(first.core, parent=1, after_step=20, skipped=7)
        again = Attempt(tmp_path, 3)
        again.resume()
        assert again.notes[0] == (
            "the 7 micro-batches on each rank that the rollback to step 20 left out are read again: this checkpoint is "
            "not the one that it went back to"
        )

    def test_are_shared_by_another_number_of_ranks(self, left_out: str, tmp_path: Path) -> None:
        second = Attempt(tmp_path, 3).rank.core
        assert second.checkpointer is not None
        branches = {2: Branch(incarnation=2, parent=1, after_step=2, skipped=7, ranks=2)}
        count, told = skipped_from(branches, second.checkpointer.load(left_out), 4)
        assert count == 3
        assert len(told) == 1

    def test_are_known_however_many_restarts_and_rollbacks_lie_between(self, left_out: str, tmp_path: Path) -> None:
        """Checkpoint and restart of a later branch, whose checkpoint then is damaged."""
        core = Attempt(tmp_path, 5).rank.core
        assert core.checkpointer is not None
        loaded = core.checkpointer.load(left_out)
        branches = {
            1: Branch(incarnation=1),
            2: Branch(incarnation=2, parent=1, after_step=2, skipped=7),
            3: Branch(incarnation=3, parent=2, after_step=9),
            4: Branch(incarnation=4, parent=3, after_step=12, skipped=5),
        }
        count, told = skipped_from(branches, loaded, 1)
        assert count == 7
        assert [text.partition(" micro")[0] for text in told] == ["the 7", "the 5"]
        assert [text.partition("left out are ")[2][:10] for text in told] == ["left out a", "read again"]
        left = branches | {4: Branch(incarnation=4, parent=1, after_step=2)}
        assert skipped_from(left, loaded, 1) == (0, []), "a rollback to before them, which skipped nothing"


def test_only_the_last_save_by_the_interval_is_never_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps are faster than the disk training goes on without; behind the last one there is nothing to wait."""
    only = Attempt(tmp_path, 1)
    only.core.total_steps = 6
    only.run._checkpoint_every = TunableValue("checkpoint_every", 2)
    saved: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        run_module, "begin_save", lambda core, *, may_leave_out: saved.append((core.boundary.completed, may_leave_out))
    )
    for _ in range(6):
        only.run.step_done()
    assert saved == [(2, True), (4, True), (6, False)]


@pytest.mark.ranks
@pytest.mark.thorough
def test_a_script_that_tracks_something_on_one_rank_only_goes_on_after_a_restart(tmp_path: Path) -> None:
    with job("tracked_alone.py", 2, tmp_path, ["--steps", "6"]) as running:
        until(lambda: running.process.poll() is not None, 120, what="the first attempt")
    with job("tracked_alone.py", 2, tmp_path, ["--steps", "8"], TRAINCTL_RESUME="last") as running:
        until(lambda: running.step(0) == running.step(1) == 8, 60, what="both ranks to go on")
        assert "not tracked now" not in running.log()
        resumed = running.lines(0)[6:]
        assert resumed[0]["step"] < 8, "the last save may have been left out: steps are faster than the disk"
        assert all(line["seen"] == line["step"] for line in resumed)
        assert {line["seen"] for line in running.lines(1)} == {0}
