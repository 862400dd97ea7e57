"""What each command does on one rank, at the boundary where all ranks do it.

`refusal` says beforehand why a rank cannot; `stage` does what may fail and touches nothing; `apply` is assignment.
"""

import time
from dataclasses import dataclass

import msgspec
import torch

from trainctl.trainer.agreement import DOUBT_S, Outcome, Position, Proposal, keeps
from trainctl.trainer.boundary import Armed
from trainctl.trainer.changes import Changes, condition_values
from trainctl.trainer.checkpoint import CheckpointError, Loaded
from trainctl.trainer.control import Control, InDoubt
from trainctl.trainer.core import Core, Hold, PromisedStop, RunningSave
from trainctl.trainer.data_place import DataPlace, DataUnreadable, move_back, move_data
from trainctl.trainer.evaluated import Evaluated, put_back, survey_of, survives
from trainctl.trainer.evaluation import evaluate
from trainctl.trainer.gathering import not_all_came
from trainctl.trainer.newest import on_their_way
from trainctl.trainer.on_the_way import CalledOff, Reading
from trainctl.trainer.outcomes import update_of
from trainctl.trainer.preemption import Signalled, heard_while_paused
from trainctl.trainer.rolling_back import roll_back
from trainctl.trainer.steering import is_field, problem_with
from trainctl.wire.commands import (
    Abort,
    Act,
    CheckpointSave,
    Command,
    Evaluate,
    LrRelease,
    LrScale,
    LrSet,
    Pause,
    Resume,
    Rollback,
    SetTunable,
    Stop,
    spec_of,
)
from trainctl.wire.expressions import parse
from trainctl.wire.messages import Scalar

_HOLD_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What `stage` got ready."""

    problem: str | None = None
    declined: bool = False
    expired: bool = False
    keeps: bool = False  # a change on trial, whose condition holds
    loaded: Loaded | None = None
    data: DataPlace | None = None  # where a rollback's data are open already
    tried: Scalar = None  # what a tunable was before the script's own callback was tried with the new value


class Actions:
    """Meets armed proposals in the training thread."""

    def __init__(self, core: Core, control: Control, signalled: Signalled | None = None) -> None:
        self._core = core
        self._control = control
        self._signalled = signalled
        self._changes = Changes(core)
        self._held_at: Position | None = None  # the pause in which an evaluation was asked for
        self._evaluated: Evaluated | None = None  # the newest that was asked for
        self._broke: BaseException | None = None  # what meeting raised: ours, whoever it passes through

    def meet(self, *, inside: bool = False) -> None:
        """Act on what is armed for this boundary; while the run is paused, stay here.

        `inside` an evaluation only what was proposed for one of its batches is met. Raises `control.InDoubt`, or what
        applying raised: half a command is worse than a stopped job.
        """
        core = self._core
        try:
            self._meet_one(inside=inside)
            if core.hold is not None and core.ending is None:
                with heard_while_paused(self._signalled):
                    self._stay(inside=inside)
        except BaseException as error:
            self._broke = error
            raise

    def _stay(self, *, inside: bool) -> None:
        core = self._core
        unreachable_since: float | None = None
        told = False
        while core.hold is not None and core.ending is None:
            core.boundary.wake.wait(_HOLD_POLL_S)
            core.boundary.wake.clear()
            self._meet_one(inside=inside)
            if self._control.is_alive() and self._control.problem is None:
                unreachable_since = None
                if told:
                    told = False
                    core.tell("control", f"commands reach rank {core.place.rank} again", "good")
                continue
            unreachable_since = unreachable_since or time.monotonic()
            if told or time.monotonic() - unreachable_since <= DOUBT_S:
                continue
            why = self._control.problem or "a rank left its loop"
            if not self._control.is_alive():
                raise InDoubt(
                    f"the run is paused and no command reaches this rank any more ({why}): it stops, because nobody "
                    "could ever resume it. Go on from the last good checkpoint"
                )
            # A connection that is cut is tried again as long as the pause lasts, and nothing is undecided meanwhile.
            told = True
            core.tell(
                "control",
                f"the run is paused, and no command reaches rank {core.place.rank} ({why}): it stays paused and "
                "goes on asking; abort --now ends it",
                "error",
            )

    def _meet_one(self, *, inside: bool) -> None:
        boundary = self._core.boundary
        armed = boundary.armed
        if armed is None or not boundary.position.meets(armed.proposal.position):
            return
        if inside and not armed.proposal.mark:
            return  # it is for the boundary of the step, behind this evaluation
        armed.met = True
        going = self._control.going(armed)
        boundary.disarm(armed)
        if not going:
            return
        try:
            if not self._control.together(armed):
                reason = not_all_came(armed.proposal.step, self._control.gather_limit_s)
                armed.finish(Outcome(ok=False, step=boundary.completed, reason=reason, declined=True, waited=True))
                return
            outcome = self._two_phases(armed) if armed.proposal.two_phase else self._apply(armed.proposal, Staged())
        except BaseException as error:
            armed.finish(
                Outcome(ok=False, step=boundary.completed, reason=f"{type(error).__name__}: {error}"), fell=True
            )
            raise
        # Before the outcome is told: the next proposal looks at it.
        here = armed.proposal.position if inside else Position(boundary.completed)
        boundary.held_at = here if self._core.hold is not None else self._held_at
        armed.finish(outcome)
        if outcome.pending and isinstance(armed.proposal.command.action, Evaluate):
            self._evaluate(armed.proposal)

    def _evaluate(self, proposal: Proposal) -> bool:
        """After the agreement on it is over, so that others may act meanwhile; whether it was complete here.

        How it ended rank 0 tells. What the script's own on_eval raises costs the evaluation, and where the job can bear
        it not the job.
        """
        core, boundary = self._core, self._core.boundary
        # A paused run evaluates when asked to, and stays where it is held; inside it may be paused once more.
        hold, core.hold = core.hold, None
        self._held_at = boundary.held_at
        survey = self._evaluated = survey_of(core, self._control, proposal, self._evaluated)
        complete = False
        try:
            with put_back(core.models):
                complete = evaluate(core, lambda: self.meet(inside=True))
            left = None if complete else f"left before it was complete: stopped by {core.ended_by}"
            survey.report(complete=complete, reason=left)
        except Exception as error:
            if self._broke is not None or not survives(core, survey, error, lambda: self.meet(inside=True)):
                raise
        inner = self._core.hold  # of a pause that nobody ended before the evaluation was
        core.hold, boundary.held_at, self._held_at = hold, self._held_at, None
        self.settle_stop()
        if core.ending is None and core.hold is None and inner is not None:  # paused inside, and could not be stopped
            core.hold, boundary.held_at = inner, Position(boundary.completed)
        return complete

    def leave(self, timeout_s: float) -> None:
        """The loop is left: an evaluation that ended just now may still have its outcome."""
        if self._evaluated is not None:
            self._evaluated.close(timeout_s)

    def _two_phases(self, armed: Armed) -> Outcome:
        staged = self._stage(armed)
        told = Outcome(
            ok=staged.problem is None,
            step=self._core.boundary.completed,
            reason=staged.problem or "another rank could not: nothing was changed",
            declined=staged.declined,
            expired=staged.expired,
            keeps=staged.keeps,
        )
        if self._control.staged(armed, told):
            return self._apply(armed.proposal, staged)
        if staged.data is not None and self._core.feed is not None:
            move_back(self._core.feed, staged.data)
        action = armed.proposal.command.action
        if staged.tried is not None and isinstance(action, SetTunable):
            self._core.tunables.take_back(action.name, staged.tried)
        undo, verdict = armed.proposal.undo, armed.verdict
        if undo is not None and verdict is not None and keeps(verdict):  # else it is still on trial, and tried again
            self._changes.keep(undo, armed.proposal.command.id, verdict)
        return msgspec.structs.replace(told, ok=False)

    def _stage(self, armed: Armed) -> Staged:
        core, proposal = self._core, armed.proposal
        loaded, data = None, None
        expired = core.place.leads and proposal.expires_at is not None and time.time() > proposal.expires_at
        if isinstance(proposal.command.action, Rollback) and proposal.undo is None:
            assert core.checkpointer is not None
            assert proposal.checkpoint is not None
            core.doing = "checkpointing"
            try:
                # A collective, so every rank comes here, whatever rank 0 will find of the condition.
                loaded = core.checkpointer.load(proposal.checkpoint)
                if core.feed is not None:
                    skip = proposal.command.action.skip_batches
                    reading = Reading(
                        skip,
                        called_off=lambda: self._control.called_off(armed),
                        tell=lambda text: core.note("rollback", text),
                    )
                    data = move_data(core.feed, loaded, skip=skip, between=reading)
            except (CheckpointError, DataUnreadable) as error:
                return Staged(problem=f"{error}")
            except CalledOff as end:
                return Staged(problem=f"{end}", declined=True)
            finally:
                core.doing = None
        if expired:
            late = "it was not applied in time: nothing was changed"
            return Staged(problem=late, declined=True, expired=True, data=data)
        undo = proposal.undo
        problem = unmet(core, proposal.command) if undo is None else self._changes.not_due(undo)
        if problem is not None:
            return Staged(problem=problem, declined=True, data=data)
        if undo is not None and (why := self._changes.stays(undo)) is not None:
            return Staged(problem=why, declined=True, keeps=True)
        action = proposal.command.action
        if undo is None and isinstance(action, SetTunable) and core.tunables.may_raise(action.name):
            return self._try_out(action)
        return Staged(loaded=loaded, data=data)

    def _try_out(self, action: SetTunable) -> Staged:
        """The script's own callback is the one thing about a tunable that may fail: on every rank before it counts."""
        tunables = self._core.tunables
        before = tunables.values()[action.name]
        problem = tunables.try_out(action.name, action.value)
        return Staged(problem=f"{problem}. The value is as it was" if problem else None, tried=before)

    def _apply(self, proposal: Proposal, staged: Staged) -> Outcome:
        core, action, step = self._core, proposal.command.action, self._core.boundary.completed
        before: Scalar = None
        after: Scalar = None
        if proposal.undo is not None:
            return self._changes.undo(proposal.undo)
        replaced = self._changes.replaced(proposal)
        match action:
            case Pause() | Resume():
                before, after = self._hold(action, proposal.actor)
            case SetTunable(name=name) if not is_field(core, name):
                before, after = self._changes.set(action, proposal, replaced, tried=staged.tried)
            case LrScale() | LrSet() | LrRelease() | SetTunable():
                before, after = self._changes.override(action, proposal, replaced)
            case CheckpointSave(note=note):
                return self._save(proposal, note)
            case Evaluate():
                return Outcome(ok=True, step=step, pending=True)
            case Rollback():
                assert staged.loaded is not None
                before, after = roll_back(core, staged.loaded, action, proposal, staged.data)
            case Stop(preempted=None) if core.checkpointer is not None:
                return self._save_and_stop(proposal)
            case Stop() | Abort():
                before, after = self._end(action, proposal)
            case _:
                return Outcome(ok=False, step=step, reason=f"this trainer does not know {spec_of(action).name!r}")
        trial = core.reverts.get(proposal.command.id)
        return Outcome(ok=True, step=step, before=before, after=after, reason=trial.words() if trial else None)

    def _end(self, action: Act, proposal: Proposal) -> tuple[Scalar, Scalar]:
        """End without waiting for a checkpoint: abort, and preemption, whose machine goes away in any case."""
        core, before = self._core, self._core.state()
        why = action.preempted if isinstance(action, Stop) else None
        core.ending, core.ended_by, core.preempted = "preempted" if why else "stopped", proposal.actor, why
        if why and core.checkpointer is not None and not saved_here(core):
            if proposal.mark:  # saved behind the evaluation, which may have swapped weights
                core.last_save = PromisedStop(
                    command=proposal.command, actor=proposal.actor, before=before, preempted=why
                )
            else:
                begin_save(core, note=f"preempted: {why}")
        return before, core.ending

    def _save_and_stop(self, proposal: Proposal) -> Outcome:
        """A run that cannot be saved is not stopped: it goes on, or stays paused, as it was."""
        core, before, step = self._core, self._core.state(), self._core.boundary.completed
        if proposal.mark:  # saved behind the evaluation, which may have swapped weights
            core.ending, core.ended_by = "stopped", proposal.actor
            core.last_save = PromisedStop(command=proposal.command, actor=proposal.actor, before=before)
            return Outcome(ok=True, step=step, before=before, after="stopped", pending=True)
        problem = last_save(core, actor=proposal.actor)
        if problem is not None:
            return Outcome(ok=False, step=step, before=before, reason=problem)
        core.ending, core.ended_by = "stopped", proposal.actor
        return Outcome(ok=True, step=step, before=before, after="stopped")

    def settle_stop(self) -> Outcome | None:
        """Behind an evaluation: make the checkpoint of a stop that was met inside it, and tell what became of it.

        Where it cannot be made the run is not stopped. Raises `control.InDoubt` as `last_save` does.
        """
        core, asked = self._core, self._core.last_save
        if asked is None:
            return None
        core.last_save = None
        if asked.preempted is not None:
            begin_save(core, note=f"preempted: {asked.preempted}")
            return None  # told already: nobody waits for it
        problem, step = last_save(core, actor=asked.actor), core.boundary.completed
        if problem is not None:
            core.ending = core.ended_by = None
            if core.hold is not None:  # paused inside the evaluation that is over: from now on behind its step
                core.boundary.held_at = Position(step)
        outcome = Outcome(ok=problem is None, step=step, before=asked.before, after="stopped", reason=problem)
        state, after = ("applied", "stopped") if outcome.ok else ("failed", None)
        ranks, incarnation = core.place.world_size, core.incarnation
        core.event(
            update_of(
                asked.command, asked.actor, state, step, core.boundary, incarnation, ranks, asked.before, after, problem
            )
        )
        return outcome

    def _hold(self, action: Act, actor: str) -> tuple[Scalar, Scalar]:
        core, before = self._core, self._core.state()
        if isinstance(action, Pause):
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()  # nothing stays enqueued, so no watchdog's clock runs
            now = time.time()
            core.hold = Hold(since=now, by=actor, resumes_at=now + action.for_s if action.for_s else None)
        else:
            core.hold = None
        return before, core.state()

    def _save(self, proposal: Proposal, note: str | None) -> Outcome:
        save = begin_save(self._core, note=note, command=proposal.command, actor=proposal.actor)
        return Outcome(ok=True, step=save.step, after=save.id, pending=True)


def refusal(core: Core, proposal: Proposal) -> str | None:
    """Why this rank cannot do what is proposed. Called by the control thread: reads only."""
    action = proposal.command.action
    if proposal.undo is not None:
        return None if core.reverts.get(proposal.undo) is not None else core.reverts.why_gone(proposal.undo)
    at, total = core.boundary.completed, core.total_steps
    if core.feed is not None and total is not None and at <= total < proposal.step:
        return f"the run ends at step {total}, before the boundary of step {proposal.step}"
    capability = spec_of(action).capability
    if capability is not None and (able := core.capabilities.get(capability, True)) is not True:
        return str(able)
    match action:
        case Resume() if core.hold is None:
            return "the run is not paused"
        case Pause() if core.hold is not None:
            return "the run is paused already"
        case SetTunable():
            return problem_with(core, action)
        case LrScale() | LrSet() | LrRelease():
            return _rate_problem(core, action)
        case Rollback(lr_scale=float() as factor):
            return _rate_problem(core, LrScale(factor=factor))
        case _:
            return None


def _rate_problem(core: Core, action: Act) -> str | None:
    if core.overrides is None:
        return "there is no optimizer"
    return core.overrides.check(action, boundary=core.boundary.completed)


def unmet(core: Core, command: Command) -> str | None:
    """Why the command's condition does not hold now; decided by rank 0 alone, so that there is one answer."""
    if command.condition is None or not core.place.leads:
        return None
    values = condition_values(core)
    expression = parse(command.condition)
    if expression(values):
        return None
    found = ", ".join(f"{name} is {values.get(name, 'unknown')}" for name in sorted(expression.names))
    late = sorted(expression.names & on_their_way(core))
    of = f" (of an earlier step: a newer {', '.join(late)} is still on its device)" if late else ""
    return f"the condition {command.condition!r} does not hold: {found}{of}"


def begin_save(
    core: Core,
    *,
    note: str | None = None,
    command: Command | None = None,
    actor: str = "",
    may_leave_out: bool = False,
) -> RunningSave:
    """Copy the state and start writing it. Every rank does this at the same boundary, so all make the same id.

    `may_leave_out`: rather no checkpoint than a wait for one that is still being written.
    """
    assert core.checkpointer is not None
    step = core.boundary.completed
    core.saves_begun += 1
    core.counters["step"] = step
    checkpoint = f"step-{step:08d}-{core.identity.attempt}.{core.saves_begun}"
    core.doing = "checkpointing"
    started = time.perf_counter()
    try:
        pending = core.checkpointer.begin_save(
            id=checkpoint,
            step=step,
            incarnation=core.incarnation,
            attempt=core.identity.attempt,
            metrics=dict(core.last_metrics),
            note=note,
            may_leave_out=may_leave_out,
        )
    finally:
        core.doing = None
        core.phases.add("checkpoint", time.perf_counter() - started)
    save = RunningSave(
        id=checkpoint,
        pending=pending,
        step=step,
        incarnation=core.incarnation,
        metrics=dict(core.last_metrics),
        note=note,
        command=command,
        actor=actor,
    )
    core.saves.append(save)
    core.newest_save = save
    return save


def last_save(core: Core, *, actor: str) -> str | None:
    """Make the checkpoint that a stop promises and wait until it is one; why there is none, alike on every rank.

    The training thread waits here, for nothing else is to be done after a stop. Raises `control.InDoubt` where this
    rank cannot know whether the others have the checkpoint, and so whether they stop.
    """
    save = begin_save(core, note=f"stopped by {actor}")
    core.doing = "checkpointing"
    try:
        result = save.pending.result()
    finally:
        core.doing = None
    if result.error is None:
        return None
    if not result.agreed:
        raise InDoubt(f"the checkpoint of a stop was not agreed on by all ranks, and this one stops: {result.error}")
    return f"nothing was saved, so the run is not stopped: {result.error}"


def saved_here(core: Core) -> bool:
    """Whether the interval began a save at this very boundary, after which nothing was changed."""
    save = core.newest_save
    here = (core.boundary.completed, core.incarnation)
    return save is not None and core.hold is None and (save.step, save.incarnation) == here
