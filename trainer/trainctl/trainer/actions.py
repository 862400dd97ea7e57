"""What each command does on one rank, at the boundary where all ranks do it.

`refusal` says beforehand why a rank cannot; `stage` does what may fail and touches nothing; `apply` is assignment.
"""

import contextlib
import time
from dataclasses import dataclass

import msgspec
import torch

from trainctl.trainer.agreement import DOUBT_S, Outcome, Proposal
from trainctl.trainer.boundary import Armed
from trainctl.trainer.buffer import Rewind
from trainctl.trainer.changes import Changes, condition_values
from trainctl.trainer.checkpoint import CheckpointError, Loaded
from trainctl.trainer.checkpoint.rng import capture_rng, restore_rng
from trainctl.trainer.control import Control, InDoubt
from trainctl.trainer.core import Core, Hold, RunningSave
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
from trainctl.wire.lineage import Branch, record_branch
from trainctl.wire.messages import RolledBack, Scalar
from trainctl.wire.rundir import RunDir

_HOLD_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What `stage` got ready."""

    problem: str | None = None
    declined: bool = False
    expired: bool = False
    loaded: Loaded | None = None


class Actions:
    """Meets armed proposals in the training thread."""

    def __init__(self, core: Core, control: Control) -> None:
        self._core = core
        self._control = control
        self._changes = Changes(core)

    def meet(self) -> None:
        """Act on what is armed for this boundary; while the run is paused, stay here.

        Raises `control.InDoubt`, or what applying raised: half a command is worse than a stopped job.
        """
        core = self._core
        self._meet_one()
        unreachable_since: float | None = None
        while core.hold is not None and core.ending is None:
            core.boundary.wake.wait(_HOLD_POLL_S)
            core.boundary.wake.clear()
            self._meet_one()
            if self._control.is_alive():
                continue
            unreachable_since = unreachable_since or time.monotonic()
            if time.monotonic() - unreachable_since > DOUBT_S:
                why = self._control.problem or "a rank left its loop"
                raise InDoubt(
                    f"the run is paused and no command reaches this rank any more ({why}): it stops, because nobody "
                    "could ever resume it. Go on from the last good checkpoint"
                )

    def _meet_one(self) -> None:
        boundary = self._core.boundary
        armed = boundary.armed
        if armed is None or armed.proposal.step != boundary.completed:
            return
        going = self._control.going(armed)
        boundary.disarm(armed)
        if not going:
            return
        try:
            outcome = self._two_phases(armed) if armed.proposal.two_phase else self._apply(armed.proposal, Staged())
        except BaseException as error:
            armed.finish(Outcome(ok=False, step=boundary.completed, reason=f"{type(error).__name__}: {error}"))
            raise
        # Before the outcome is told: the next proposal looks at it.
        boundary.held_at = boundary.completed if self._core.hold is not None else None
        armed.finish(outcome)

    def _two_phases(self, armed: Armed) -> Outcome:
        staged = self._stage(armed.proposal)
        told = Outcome(
            ok=staged.problem is None,
            step=self._core.boundary.completed,
            reason=staged.problem or "another rank could not: nothing was changed",
            declined=staged.declined,
            expired=staged.expired,
        )
        if self._control.staged(armed, told):
            return self._apply(armed.proposal, staged)
        undo = armed.proposal.undo
        if undo is not None and self._changes.not_due(undo) is None:
            self._core.reverts.take(undo)  # its condition holds: confirmed, on every rank alike
            self._core.steered()
        return msgspec.structs.replace(told, ok=False)

    def _stage(self, proposal: Proposal) -> Staged:
        core = self._core
        loaded = None
        expired = core.place.leads and proposal.expires_at is not None and time.time() > proposal.expires_at
        if isinstance(proposal.command.action, Rollback) and proposal.undo is None:
            assert core.checkpointer is not None
            assert proposal.checkpoint is not None
            core.doing = "checkpointing"
            try:
                # A collective, so every rank comes here, whatever rank 0 will find of the condition.
                loaded = core.checkpointer.load(proposal.checkpoint)
            except CheckpointError as error:
                return Staged(problem=f"{error}")
            finally:
                core.doing = None
        if expired:
            return Staged(problem="it was not applied in time: nothing was changed", declined=True, expired=True)
        undo = proposal.undo
        problem = unmet(core, proposal.command) if undo is None else self._changes.still_on_trial(undo)
        if problem is not None:
            return Staged(problem=problem, declined=True)
        return Staged(loaded=loaded)

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
            case LrScale() | LrSet() | LrRelease():
                before, after = self._changes.override(action, proposal, replaced)
            case SetTunable(name=name) if is_field(core, name):
                before, after = self._changes.override(action, proposal, replaced)
            case SetTunable():
                before, after = self._changes.set(action, proposal, replaced)
            case CheckpointSave(note=note):
                return self._save(proposal, note)
            case Evaluate():
                evaluate(core)
            case Rollback():
                assert staged.loaded is not None
                before, after = roll_back(core, staged.loaded, action, proposal)
            case Stop():
                before, after, core.ending, core.ended_by = core.state(), "stopped", "stopped", proposal.actor
                if core.checkpointer is not None:
                    begin_save(core, note=f"stopped by {proposal.actor}")
            case Abort():
                before, after, core.ending, core.ended_by = core.state(), "stopped", "stopped", proposal.actor
            case _:
                return Outcome(ok=False, step=step, reason=f"this trainer does not know {spec_of(action).name!r}")
        trial = core.reverts.get(proposal.command.id)
        return Outcome(ok=True, step=step, before=before, after=after, reason=trial.words() if trial else None)

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
        return None if core.reverts.get(proposal.undo) is not None else "a newer change took its place"
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
            if core.overrides is None:
                return "there is no optimizer"
            return core.overrides.check(action, boundary=core.boundary.completed)
        case _:
            return None


def unmet(core: Core, command: Command) -> str | None:
    """Why the command's condition does not hold now; decided by rank 0 alone, so that there is one answer."""
    if command.condition is None or not core.place.leads:
        return None
    values = condition_values(core)
    expression = parse(command.condition)
    if expression(values):
        return None
    found = ", ".join(f"{name} is {values.get(name, 'unknown')}" for name in sorted(expression.names))
    return f"the condition {command.condition!r} does not hold: {found}"


def evaluate(core: Core) -> None:
    """Run the script's evaluation and log what it returns under the step just completed."""
    if core.callbacks.on_eval is None:
        return
    core.doing = "evaluating"
    started = time.perf_counter()
    # An evaluation may swap weights, as EMA does.
    writing = core.overrides.expected_writes() if core.overrides is not None else contextlib.nullcontext()
    try:
        with writing:
            metrics = core.callbacks.on_eval()
    finally:
        core.doing = None
        core.phases.add("eval", time.perf_counter() - started)
    if metrics is not None:
        numbers = _numbers(core, metrics)
        core.last_metrics.update(numbers)
        core.log(core.boundary.completed, numbers)


def _numbers(core: Core, returned: object) -> dict[str, float]:
    """What an evaluation returned, as far as it is numbers by name; what is not is told of, and raises nothing."""
    numbers: dict[str, float] = {}
    try:
        items = [(str(name), value) for name, value in dict(returned).items()]  # type: ignore[call-overload]
    except Exception:  # noqa: BLE001 - a script may return anything, of a class that raises anything
        what = type(returned).__name__
        core.complain("metric", f"on_eval returned a {what}, no metrics by name: return a dict of floats, or None")
        return numbers
    for name, value in items:
        try:
            numbers[name] = float(value)
        except Exception:  # noqa: BLE001 - the same
            core.complain("metric", f"on_eval returned {name!r} as a {type(value).__name__}: it is no number, left out")
    return numbers


def begin_save(core: Core, *, note: str | None = None, command: Command | None = None, actor: str = "") -> RunningSave:
    """Copy the state and start writing it. Every rank does this at the same boundary, so all make the same id."""
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
    return save


def roll_back(core: Core, loaded: Loaded, action: Rollback, proposal: Proposal) -> tuple[Scalar, Scalar]:
    """Restore what was loaded; the operator's newest overrides and tunables stay, unless asked otherwise."""
    assert core.checkpointer is not None
    from_step, from_incarnation = core.boundary.completed, core.incarnation
    core.checkpointer.commit(loaded, restore_overrides=action.restore_overrides)
    if action.lr_scale is not None and core.overrides is not None:
        core.reverts.replaced_by(action)  # also those that came with the checkpoint
        core.overrides.scale_lr(action.lr_scale)
    core.steered()
    step = position(core, loaded, skip=action.skip_batches)
    core.incarnation = proposal.incarnation
    begin_branch(core, parent=loaded.incarnation, after_step=step)
    core.last_metrics.clear()  # those of the branch that is left are not this one's
    core.last_metrics.update(loaded.metrics)
    core.event(
        RolledBack(
            time=time.time(),
            step=step,
            incarnation=core.incarnation,
            from_step=from_step,
            from_incarnation=from_incarnation,
            checkpoint=str(proposal.checkpoint),
            skipped_batches=action.skip_batches,
            lr_scale=action.lr_scale,
            actor=proposal.actor,
        )
    )
    core.buffer.put(Rewind(step, core.incarnation, dict(loaded.metrics)))
    return from_step, step


def begin_branch(core: Core, *, parent: int = 0, after_step: int = 0) -> None:
    """Write down where this incarnation begins, so that `last` and a restart never go back to an abandoned branch."""
    if not core.place.leads or core.identity.problem is not None:
        return
    branch = Branch(incarnation=core.incarnation, parent=parent, after_step=after_step)
    try:
        record_branch(RunDir(core.identity.directory), branch)
    except OSError as error:
        core.complain("lineage", f"incarnation {core.incarnation} could not be written down: {error.strerror or error}")


def position(core: Core, loaded: Loaded, *, skip: int = 0, tell: bool = True) -> int:
    """Put counters, data and random state where a committed checkpoint says; return its step.

    `tell` calls the script's on_rollback; at a resume the script has not begun, and starts from `run.step`.
    """
    step = int(core.counters["step"])
    core.boundary.completed = step
    core.row_step = step
    core.ranges.rewind(step)
    core.reverts.rewound(step)
    if core.overrides is not None:
        core.overrides.begin_anew(step)
    if core.feed is not None:
        own = None if loaded.same_ranks else capture_rng()
        core.feed.reopen(skip=skip)
        if own is not None:
            restore_rng(own)  # the replay drew from another rank's stream
    if tell and core.callbacks.on_rollback is not None:
        core.callbacks.on_rollback(step)
    loaded.restore_rng()  # last: making an iterator draws random numbers
    return step
