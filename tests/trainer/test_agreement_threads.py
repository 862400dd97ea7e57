"""Leader, control threads and boundaries as they run, over one store in this process, ranks tied by a barrier."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch.distributed import HashStore

from trainctl.trainer import actions as actions_module
from trainctl.trainer.actions import Actions, Staged, refusal
from trainctl.trainer.agreement import CANCEL, KEEP, Outcome, Proposal, Seal, in_two_phases
from trainctl.trainer.boundary import Boundary
from trainctl.trainer.buffer import RowBuffer
from trainctl.trainer.control import Control, InDoubt
from trainctl.trainer.core import Callbacks, Core
from trainctl.trainer.exchange import Exchange
from trainctl.trainer.identity import RankIdentity, RunIdentity
from trainctl.trainer.leader import Leader, Prepared
from trainctl.trainer.meeting import Connection, StoreSilent
from trainctl.trainer.phases import Phases
from trainctl.trainer.reach import GRACE_S, Reach
from trainctl.trainer.reverts import Revert
from trainctl.trainer.tunables import Tunables, TunableValue
from trainctl.wire.commands import Action, Command, Pause, Resume, SetTunable, Stop
from trainctl.wire.messages import Anomaly, CommandUpdate, LinkCancel, LinkCommand, Note
from trainctl.wire.own_ids import undoing_id
from waiting import until


class Recording(Actions):
    """Writes down what is set, as it is set."""

    applied: list[tuple[int, object]]

    def _apply(self, proposal: Proposal, staged: Staged) -> Outcome:
        outcome = super()._apply(proposal, staged)
        if outcome.ok and isinstance(proposal.command.action, SetTunable):
            self.applied.append((outcome.step, outcome.after))
        return outcome


class Rank:
    """One rank whose training thread does nothing but meet the others and reach boundaries."""

    def __init__(self, number: int, ranks: int, store: HashStore, together: threading.Barrier, directory: Path) -> None:
        identity = RunIdentity(
            name="t",
            id="t",
            directory=directory,
            attempt=1,
            incarnation=1,
            created=0.0,
            authenticated=True,
            problem=None,
        )
        self.core = Core(
            place=RankIdentity(rank=number, world_size=ranks, local_rank=number, node="n"),
            identity=identity,
            total_steps=None,
            boundary=Boundary(),
            buffer=RowBuffer(),
            phases=Phases(),
            tunables=Tunables(),
            callbacks=Callbacks(),
        )
        self.applied: list[tuple[int, object]] = []
        self.core.tunables.add(TunableValue("x", 0))
        seal = Seal(b"secret", 1)
        self.control = Control(
            rank=number,
            ranks=ranks,
            boundary=self.core.boundary,
            waiting=Connection(store, "p", seal),
            talking=Connection(store, "p", seal),
            refusal=lambda proposal: refusal(self.core, proposal),
        )
        self.actions = Recording(self.core, self.control)
        self.actions.applied = self.applied
        self.together = together
        self.work = threading.Event()
        self.free = threading.Event()
        self.free.set()
        self.training = threading.Thread(target=self._train, daemon=True)

    def _train(self) -> None:
        boundary = self.core.boundary
        while self.core.ending is None:
            self.together.wait(30)
            self.free.wait(30)
            self.work.wait(0.001)  # what a step costs
            boundary.completed += 1
            if boundary.armed is not None:
                self.actions.meet()
        boundary.close()


class Job:
    def __init__(
        self,
        ranks: int,
        directory: Path,
        later: Callable[[Command], bool] = lambda _command: False,
        ending: Callable[[], bool] = lambda: False,
    ) -> None:
        store, together = HashStore(), threading.Barrier(ranks)
        self.ranks = [Rank(number, ranks, store, together, directory) for number in range(ranks)]
        self.updates: list[CommandUpdate] = []
        self.connection = Connection(store, "p", Seal(b"secret", 1))  # rank 0's
        self.leader = Leader(
            world_size=ranks,
            boundary=self.ranks[0].core.boundary,
            connection=self.connection,
            prepare=lambda command: "the run is ending" if ending() else Prepared(two_phase=in_two_phases(command)),
            later=later,
            ending=ending,
            tell=self.updates.append,
            incarnation=lambda: 1,
        )
        for rank in self.ranks:
            rank.control.start()
            rank.training.start()
        self.leader.start()
        self._count = 0

    def send(self, action: Action, condition: str | None = None, expires_s: float | None = None) -> str:
        self._count += 1
        command = Command(id=f"c{self._count}", action=action, condition=condition, expires_s=expires_s)
        self.leader.submit(LinkCommand(command=command, actor="mk", accepted=0.0))
        return command.id

    def outcome(self, command: str) -> CommandUpdate:
        def final() -> CommandUpdate | None:
            return next((u for u in self.updates if u.id == command and u.state not in {"accepted", "scheduled"}), None)

        found = until(final, 20, what=f"outcome of {command}")
        assert found is not None
        return found

    def close(self) -> None:
        self.outcome(self.send(Stop()))
        self.leader.close()
        for rank in self.ranks:
            rank.control.leave(20)
        for thread in (self.leader, *(r.training for r in self.ranks), *(r.control for r in self.ranks)):
            thread.join(20)
            assert not thread.is_alive()


def test_once_a_rank_has_left_its_loop_no_command_is_said_to_be_possible(tmp_path: Path) -> None:
    store, together = HashStore(), threading.Barrier(2)
    ranks = [Rank(number, 2, store, together, tmp_path) for number in range(2)]
    for rank in ranks:
        rank.control.start()
    core, control = ranks[0].core, ranks[0].control
    reach = Reach(core, None, Exchange(core, None, None), control)
    reach.look(0.0)
    assert core.unreachable is None
    ranks[1].control.leave(20)
    until(lambda: control.gone == 1, 20)
    for now, told in ((1.0, None), (1.0 + GRACE_S, "rank 1 has left its loop: there is no further boundary")):
        reach.look(now)
        assert core.unreachable == told
    reach.look(60.0)
    (told_of,) = [event.text for event in core.events if isinstance(event, Anomaly)]
    assert told_of == (
        "rank 1 has left its loop: there is no further boundary, and each command is refused; training goes on, "
        "abort --now ends it"
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_commands_are_applied_at_one_step_on_every_rank(
    ranks: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(ranks, tmp_path)
    sent = [job.send(SetTunable(name="x", value=number)) for number in range(1, 21)]
    outcomes = [job.outcome(command) for command in sent]
    job.close()
    applied = [(u.step, u.after) for u in outcomes if u.state == "applied"]
    for rank in job.ranks:
        assert rank.applied == applied, "each rank did exactly what the operator was told, at the step that was told"
    assert {u.state for u in outcomes} <= {"applied", "failed"}
    assert all("could not agree" in str(u.reason) for u in outcomes if u.state == "failed")
    # The margin adapts, so that even on a busy machine, where steps of a millisecond are hard to meet, few fail.
    assert len(applied) >= 15
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "each event is in the table"


def test_what_expired_before_its_boundary_is_never_applied(tmp_path: Path) -> None:
    job = Job(2, tmp_path)
    late = job.outcome(job.send(SetTunable(name="x", value=7), expires_s=1.0))  # it was accepted in 1970
    in_time = job.outcome(job.send(SetTunable(name="x", value=8), expires_s=1e11))
    job.close()
    assert (late.state, in_time.state) == ("expired", "applied")
    assert all(rank.applied == [(in_time.step, 8)] for rank in job.ranks)


def test_a_command_that_is_better_taken_up_later_holds_up_none_that_came_behind_it(tmp_path: Path) -> None:
    full = threading.Event()
    full.set()
    job = Job(2, tmp_path, later=lambda command: command.id == "c1" and full.is_set())
    save, behind, withdrawn = (job.send(SetTunable(name="x", value=value)) for value in (1, 2, 3))
    job.outcome(withdrawn)
    assert job.outcome(behind).state == "applied"
    assert all(update.id != save for update in job.updates)
    full.clear()
    saved = job.outcome(save)
    job.close()
    assert [value for _, value in job.ranks[1].applied] == [2, 3, 1]
    assert saved.state == "applied"


@pytest.mark.parametrize(("actor", "state"), [("hub", "expired"), ("dana", "rejected")])
def test_what_is_scheduled_can_be_withdrawn_while_the_boundary_does_not_come(
    actor: str, state: str, tmp_path: Path
) -> None:
    job = Job(2, tmp_path)
    for rank in job.ranks:
        rank.free.clear()  # a step that does not end
    sent = job.send(SetTunable(name="x", value=7), expires_s=1e11)
    until(lambda: any(update.state == "scheduled" for update in job.updates), 20, what="the command to be scheduled")
    job.leader.submit(LinkCancel(id=sent, actor=actor))
    assert job.outcome(sent).state == state, "told while no rank can have met the boundary"
    for rank in job.ranks:
        rank.free.set()
    after = job.outcome(job.send(SetTunable(name="x", value=8)))
    job.close()
    assert all(rank.applied == [(after.step, 8)] for rank in job.ranks)


def test_a_paused_run_holds_every_rank_at_one_step_and_takes_commands(tmp_path: Path) -> None:
    job = Job(2, tmp_path)
    paused = job.outcome(job.send(Pause()))
    assert (paused.state, paused.after) == ("applied", "paused")
    assert {rank.core.boundary.completed for rank in job.ranks} == {paused.step}
    changed = job.outcome(job.send(SetTunable(name="x", value=7)))
    assert (changed.state, changed.step) == ("applied", paused.step)
    refused = job.outcome(job.send(Pause()))
    assert (refused.state, refused.reason) == ("rejected", "the run is paused already")
    assert job.outcome(job.send(Resume())).state == "applied"
    until(lambda: job.ranks[0].core.boundary.completed > paused.step, 10)
    job.close()


@pytest.mark.parametrize("number", [0, 1])
def test_a_paused_rank_that_no_command_reaches_stays_paused_until_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(actions_module, "DOUBT_S", 0.05)
    job = Job(2, tmp_path)
    assert job.outcome(job.send(Pause())).state == "applied"
    cut = job.ranks[number]
    cut.control._waiting.problem = "connection refused"  # what is left of a connection while its store refuses one
    why = f"no command reaches rank {number} (the job's store does not answer rank {number}: connection refused)"
    until(lambda: why in caplog.text, 20)
    cut.control._waiting.problem = None
    until(lambda: f"commands reach rank {number} again" in caplog.text, 20)
    assert cut.training.is_alive()
    told = [event.severity for event in cut.core.events if isinstance(event, Anomaly)]
    assert told == (["error", "good"] if number == 0 else []), "rank 0 speaks for the run"
    assert job.outcome(job.send(Resume())).state == "applied"
    job.close()


def test_a_condition_is_decided_once_by_rank_0_for_all(tmp_path: Path) -> None:
    job = Job(2, tmp_path)
    refused = job.outcome(job.send(SetTunable(name="x", value=1), condition="step < 0"))
    assert refused.state in {"rejected", "failed"}
    assert "'step < 0' does not hold" in str(refused.reason)
    assert job.outcome(job.send(SetTunable(name="x", value=2), condition="step >= 0")).state == "applied"
    job.close()
    assert [value for _, value in job.ranks[0].applied] == [2]
    assert job.ranks[0].applied == job.ranks[1].applied


def test_each_change_on_trial_is_undone_at_once_whatever_the_others_ids_are(tmp_path: Path) -> None:
    job = Job(2, tmp_path)
    trials = {"x": "a", "y": "long" * 24 + "1", "z": "long" * 24 + "2"}
    for rank in job.ranks:
        for name in ("y", "z"):
            rank.core.tunables.add(TunableValue(name, 0))
    for command in (
        Command(id="a.undo", action=SetTunable(name="x", value=1)),  # of a hub that still took such ids
        *(Command(id=of, action=SetTunable(name=name, value=5), revert_after=1) for name, of in trials.items()),
    ):
        job.leader.submit(LinkCommand(command=command, actor="mk", accepted=0.0))
        assert job.outcome(command.id).state == "applied"
    for of in trials.values():
        revert = job.ranks[0].core.reverts.get(of)
        assert revert is not None
        job.leader.undo(revert.command, "mk", due=revert.due)
    undoings = ["a.undo.2", undoing_id(trials["y"]), undoing_id(trials["z"])]
    assert [job.outcome(name).state for name in undoings] == ["applied"] * 3
    job.close()
    for rank in job.ranks:
        assert rank.core.tunables.values() == {"x": 1, "y": 0, "z": 0}


class TestATrialWhoseUndoingIsDisturbed:
    """What is on trial is confirmed by a word of rank 0 alone, never by an undoing that came to nothing."""

    def on_trial(self, job: Job, unless: str) -> Revert:
        command = Command(id="c", action=SetTunable(name="x", value=7), revert_after=1, unless=unless)
        job.leader.submit(LinkCommand(command=command, actor="mk", accepted=0.0))
        assert job.outcome("c").state == "applied"
        found = job.ranks[0].core.reverts.get("c")
        assert found is not None
        return found

    def undo(self, job: Job, revert: Revert) -> None:
        job.leader.undo(revert.command, "mk", due=revert.due)

    def ends(self, job: Job) -> tuple[list[object], list[str]]:
        """What the ranks have in the end, alike and no more on trial, and the notes of it."""
        job.close()
        assert [rank.core.reverts.steps_left(0) for rank in job.ranks] == [{}, {}]
        notes = [event.text for event in job.ranks[0].core.events if isinstance(event, Note)]
        return [rank.core.tunables.values()["x"] for rank in job.ranks], notes

    @pytest.mark.parametrize(("unless", "value", "notes"), [("step < 0", 0, 0), ("step > 0", 7, 1)])
    def test_a_store_that_is_silent_for_once_puts_it_off(
        self, unless: str, value: int, notes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = Job(2, tmp_path)
        revert = self.on_trial(job, unless)
        look, silent = job.connection.has, iter([True])

        def has(keys: Sequence[str]) -> bool:
            if keys[0].startswith("l/") and next(silent, False):
                raise StoreSilent("cut")
            return look(keys)

        monkeypatch.setattr(job.connection, "has", has)
        self.undo(job, revert)
        told = job.outcome("c.undo")
        assert told.state == ("rejected" if notes else "applied"), told.reason
        assert [update.state for update in job.updates].count("scheduled") == 3, "it was put off"
        found, said = self.ends(job)
        assert (found, len(said)) == ([value] * 2, notes)

    def test_a_stop_that_fails_puts_it_off_and_does_not_refuse_it(self, tmp_path: Path) -> None:
        ends = threading.Event()
        job = Job(2, tmp_path, ending=ends.is_set)
        revert = self.on_trial(job, "step < 0")
        ends.set()
        self.undo(job, revert)
        assert job.outcome(job.send(SetTunable(name="x", value=8))).reason == "the run is ending"
        assert not [update for update in job.updates if update.id == "c.undo"], "nobody knows yet"
        ends.clear()
        assert job.outcome("c.undo").state == "applied"
        assert self.ends(job) == ([0, 0], [])

    def test_where_the_answer_to_the_verdict_is_lost_it_counts_and_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = Job(2, tmp_path)
        revert = self.on_trial(job, "step > 0")
        decide = job.connection.decide

        def lost(key: str, content: bytes) -> bytes | None:
            held = decide(key, content)
            if key.startswith("c/") and content == KEEP:
                raise StoreSilent("cut behind it")
            return held

        monkeypatch.setattr(job.connection, "decide", lost)
        self.undo(job, revert)
        told = job.outcome("c.undo")
        why = "step > 0 holds: the change of command c stays"
        assert (told.state, told.reason) == ("rejected", why)
        assert self.ends(job) == ([7, 7], [why])

    def test_a_rank_that_calls_it_off_for_it_did_not_hear_of_rank_0_confirms_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = Job(2, tmp_path)
        revert = self.on_trial(job, "step < 0")
        decide, called_off = job.connection.decide, iter([True])

        def late(key: str, content: bytes) -> bytes | None:
            if key.startswith("c/") and next(called_off, False):
                assert job.ranks[1].control.decide(key, CANCEL) == CANCEL
            return decide(key, content)

        monkeypatch.setattr(job.connection, "decide", late)
        self.undo(job, revert)
        assert job.outcome("c.undo").state == "applied"
        assert self.ends(job) == ([0, 0], [])

    def test_an_operator_who_withdraws_it_keeps_the_change_and_is_named(self, tmp_path: Path) -> None:
        job = Job(2, tmp_path)
        revert = self.on_trial(job, "step < 0")
        for rank in job.ranks:
            rank.free.clear()  # a step that does not end
        self.undo(job, revert)
        until(lambda: any(u.id == "c.undo" for u in job.updates), 20, what="the undoing to be scheduled")
        job.leader.submit(LinkCancel(id="c.undo", actor="dana"))
        told = job.outcome("c.undo")
        assert (told.state, told.reason) == ("rejected", "cancelled by dana")
        for rank in job.ranks:
            rank.free.set()
        assert self.ends(job) == ([7, 7], ["c.undo was cancelled: the change of command c stays"])
        assert next(e.actor for e in job.ranks[0].core.events if isinstance(e, Note)) == "dana"


def test_a_command_that_comes_after_the_end_is_answered(tmp_path: Path) -> None:
    job = Job(2, tmp_path)
    job.outcome(job.send(Stop()))
    late = job.outcome(job.send(SetTunable(name="x", value=1)))
    assert late.state in {"rejected", "failed"}
    for rank in job.ranks:
        rank.control.leave(20)
    last = job.outcome(job.send(SetTunable(name="x", value=2)))
    assert (last.state, last.reason) == ("rejected", "rank 0 has left its loop: there is no further boundary")
    job.leader.close()


def test_a_rank_whose_store_is_silent_stops_rather_than_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainctl.trainer import control as module
    from trainctl.trainer.boundary import Armed

    class Dead(Connection):
        def decide(self, key: str, content: bytes) -> bytes | None:
            raise StoreSilent("gone")

    monkeypatch.setattr(module, "DOUBT_S", 0.2)
    dead = Dead(HashStore(), "p", Seal(b"", 1))
    control = Control(rank=0, ranks=1, boundary=Boundary(), waiting=dead, talking=dead, refusal=lambda proposal: None)
    armed = Armed(Proposal(number=1, command=Command(id="c", action=Resume()), actor="mk", step=1))
    started = time.monotonic()
    with pytest.raises(InDoubt, match="no rank trains on with half of it"):
        control.going(armed)
    assert time.monotonic() - started >= 0.2
