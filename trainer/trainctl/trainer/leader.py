"""Rank 0's part of the agreement: one command after another, each with one truthful outcome."""

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from trainctl.trainer.agreement import (
    ABORT,
    CANCEL,
    COMMIT,
    DOUBT_S,
    FIRST_MARGIN,
    GO,
    TRIES,
    Answer,
    Outcome,
    Position,
    Proposal,
    boundary_for,
    decode_answer,
    decode_outcome,
    decode_proposal,
    eased,
    encode,
    fitted,
    judge,
    keep,
    left_evaluation,
    next_margin,
    no_common_step,
    patience,
    verdict_on,
)
from trainctl.trainer.boundary import Boundary
from trainctl.trainer.meeting import Connection, StoreSilent
from trainctl.trainer.outcomes import update_of
from trainctl.trainer.protocol import Lead, LeadEvent, lead_step, leaves_open, may_have_applied
from trainctl.trainer.reverts import LEAD_LIMIT
from trainctl.trainer.spent import Spent, of_all
from trainctl.trainer.superseded import GivingWay
from trainctl.wire.commands import Abort, Command, Resume, Rollback, Stop, spec_of
from trainctl.wire.messages import CommandUpdate, LinkCancel, LinkCommand
from trainctl.wire.own_ids import undoing_id

log = logging.getLogger(__name__)

_ANSWERS_S = 30.0
_FIRST_AGREEMENT_S = 0.01
_POLL_S = (0.002, 0.05)
_WAIT_OVER_S = 0.05
_SIGN_S = 1.0
_BLIP_S = 3.0

_Item: TypeAlias = tuple[LinkCommand, str | None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What rank 0 resolved before proposing."""

    two_phase: bool = False
    checkpoint: str | None = None
    incarnation: int = 0


class Leader(threading.Thread):
    """Takes commands from a queue, proposes them, tells where each one stands through `tell`.

    A stop or an abort gives up a rollback that is still being prepared: it may read data for as long as it likes.
    `prepare(command)` returns what a proposal needs, or the reason why the command is rejected at once; one for which
    `later(command)` is true is taken up again after those that came behind it. `ending()`: whether the run ends, unless
    the checkpoint of its stop fails; an undoing waits for that. The outcome of what finishes in the background (a
    checkpoint) is told by who waits for it, the sender.
    """

    def __init__(
        self,
        *,
        world_size: int,
        boundary: Boundary,
        connection: Connection,
        prepare: Callable[[Command], Prepared | str],
        later: Callable[[Command], bool] = lambda _command: False,
        ending: Callable[[], bool] = lambda: False,
        tell: Callable[[CommandUpdate], None],
        incarnation: Callable[[], int],
    ) -> None:
        super().__init__(name="trainctl-leader", daemon=True)
        self._ranks = range(world_size)
        self._boundary = boundary
        self._connection = connection
        self._prepare = prepare
        self._later = later
        self._ending = ending
        self._tell = tell
        self._incarnation = incarnation
        self._commands: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._aside: deque[_Item] = deque()  # they wait for the end of an evaluation, or of a save
        self._queued: dict[str, LinkCommand] = {}
        self._cancelled: dict[str, LinkCancel] = {}
        self._giving_way = GivingWay()
        self._seen: set[str] = set()
        self._due: dict[str, int] = {}  # of undoings: not before this step
        self._number = 0
        self._margin = FIRST_MARGIN
        self._agreement_s = _FIRST_AGREEMENT_S
        self._left: Position | None = None  # the end of an evaluation that another rank has behind it already
        self._leading: str | None = None
        self._rolls_back = False  # what is led
        self._slowest_s = 0.0  # of the last agreements, forgotten little by little
        self._state = Lead.IDLE  # by the table in `protocol`
        self._proposal: Proposal | None = None  # the newest
        self._spent = Spent()

    @property
    def problem(self) -> str | None:
        """Why no command can be agreed on, as long as it is so."""
        cut = self._connection.problem
        return f"the job's store does not answer rank 0: {cut}" if cut else None

    def submit(self, message: LinkCommand | LinkCancel) -> None:
        if isinstance(message, LinkCancel) and message.superseded_by is not None:
            if message.id in self._queued:  # else it is begun, and what is sent in its place comes behind it
                self._giving_way.take(message)
        elif isinstance(message, LinkCancel):
            queued = self._queued.pop(message.id, None)
            if queued is not None:  # not begun: it need not wait for what is before it in the queue
                self._say_cancelled(queued.command, queued.actor, message)
            else:
                self._cancelled[message.id] = message
        elif message.command.id not in self._seen:  # a hub that came back may hand a command over again
            self._seen.add(message.command.id)
            if self._rolls_back and self._leading is not None and isinstance(message.command.action, Stop | Abort):
                name = spec_of(message.command.action).name
                by = f"{message.actor}, who sent {name} before it was prepared"
                self._cancelled.setdefault(self._leading, LinkCancel(id=self._leading, actor=by))
            self._queued[message.command.id] = message
            self._commands.put((message, None))

    def undo(self, command: Command, actor: str, *, due: int, asked: int = 0) -> None:
        """Propose to undo a change on trial at step `due`; told as a command of its own, `ID.undo`.

        `asked`: how often that was proposed before, in vain or on a branch that was left: each has its own outcome.
        """
        # In two phases where there is a condition: rank 0 looks at it at the boundary.
        condition = f"not ({command.unless})" if command.unless is not None else None
        number = asked + 1
        while (name := undoing_id(command.id, number)) in self._seen:
            number += 1
        undoing = Command(id=name, action=command.action, condition=condition)
        self._seen.add(name)
        self._due[name] = due
        self._commands.put((LinkCommand(command=undoing, actor=actor, accepted=time.time()), command.id))

    def holds(self, command_id: str) -> bool:
        """Whether a command was submitted and has no outcome yet."""
        return command_id in self._queued or command_id == self._leading

    def close(self) -> None:
        self._commands.put(None)

    def run(self) -> None:
        while (item := self._next()) is not None:
            self._serve(item)
        for item in self._aside:
            self._serve(item)

    def _next(self) -> _Item | None:
        """The next command whose boundary can come soon: what waits for an evaluation or a save lets others pass."""
        while True:
            ready = next((waiting for waiting in self._aside if not self._waits(waiting)), None)
            if ready is not None:
                self._aside.remove(ready)
                return ready
            again_s = _WAIT_OVER_S if self._aside else _SIGN_S if self._unsettled else None
            try:
                item = self._commands.get(timeout=again_s)
            except queue.Empty:
                if self._unsettled:
                    self._settle()
                continue
            if item is None or not self._waits(item):
                return item
            self._aside.append(item)

    def _waits(self, item: _Item) -> bool:
        boundary, (message, undo) = self._boundary, item
        if undo is None and (self._later(message.command) or self._gives_way(message.command.id)):
            return True
        if undo is not None and self._ending():
            return True
        held_at = boundary.held_at
        if held_at is not None and held_at.mark:
            return undo is not None
        if not boundary.position.evaluating:
            return False
        action = message.command.action
        # A resume is of the pause in which the evaluation was asked for.
        return undo is not None or not spec_of(action).inside or isinstance(action, Resume)

    def _gives_way(self, command_id: str) -> bool:
        """Whether a newer command, which may take the place of this one, has no outcome yet."""
        newer = self._giving_way.newer_than(command_id)
        return newer is not None and (newer not in self._seen or self.holds(newer))

    def _serve(self, item: _Item) -> None:
        message, undo = item
        if undo is None and self._queued.pop(message.command.id, None) is None:
            return  # cancelled while it waited
        if self._unsettled and (why := self._settle()) is not None:
            if undo is None:
                self._say(message.command, message.actor, "rejected", reason=f"{why}. Nothing was changed")
            else:
                time.sleep(_SIGN_S)
                self._commands.put(item)
            return
        self._rolls_back = undo is None and isinstance(message.command.action, Rollback)
        self._leading = message.command.id
        try:
            settled = self._lead(message, undo)
            if undo is not None and not settled:
                self._commands.put(item)  # an undoing was promised: it is proposed until it is done
        except StoreSilent as error:
            why = self.problem or f"the job's store does not answer: {error}"
            if self._may_apply:
                self._say(message.command, message.actor, "unknown", reason=why)
            elif undo is not None:
                self._commands.put(item)
            else:
                self._say(message.command, message.actor, "rejected", reason=f"{why}. Nothing was changed")
        except Exception as error:
            log.exception("trainctl: a command failed, training goes on")
            self._say(message.command, message.actor, "failed", reason=f"rank 0: {error}")
        finally:
            self._leading = None
        self._clear_away()

    def _clear_away(self) -> None:
        """Take away what no rank asks for any more, once the operator has the outcome."""
        with contextlib.suppress(StoreSilent):  # then after the next command
            for number in self._spent.due():
                self._connection.delete(of_all(number))
                self._spent.gone(number)

    def _on(self, event: LeadEvent) -> None:
        """Go on by the table. While nothing can have been applied the outcome is known; else it is worth patience."""
        self._state = lead_step(self._state, event, two_phase=self._two_phase)
        self._connection.patience_s = DOUBT_S if self._may_apply else _BLIP_S

    @property
    def _two_phase(self) -> bool:
        return self._proposal is not None and self._proposal.two_phase

    @property
    def _may_apply(self) -> bool:
        return may_have_applied(self._state, two_phase=self._two_phase)

    @property
    def _unsettled(self) -> bool:
        return self._state is not Lead.IDLE or self.problem is not None

    def _settle(self) -> str | None:
        """Withdraw what the store's silence left undecided; why that cannot be done yet, or None."""
        try:
            self._connection.mend()
            if (proposal := self._proposal) is not None and leaves_open(self._state):
                self._connection.decide(f"d/{proposal.number}", ABORT)
                self._connection.decide(f"c/{proposal.number}", CANCEL)
                # Perhaps it never came to be proposed: every rank would wait for this number for ever.
                held = self._connection.decide(f"p/{proposal.number}", encode(proposal))
                if held is not None and decode_proposal(held).leaving is not None:
                    self._number -= 1
        except StoreSilent as error:
            return self.problem or f"the job's store does not answer: {error}"
        self._on(LeadEvent.SETTLED)
        return None

    def _lead(self, message: LinkCommand, undo: str | None) -> bool:
        """Bring one command to its outcome; false when the ranks found no step for it."""
        command, actor = message.command, message.actor
        prepared = self._held_inside(command) or self._prepare(command)
        if isinstance(prepared, str):
            if undo is not None and self._ending():
                return False
            self._say(command, actor, "rejected", reason=prepared)
            return True
        for _ in range(TRIES):
            # An undoing is withdrawn where it is staged: every rank has to learn that the change stays.
            if undo is None and (by := self._cancelled.pop(command.id, None)) is not None:
                self._say_cancelled(command, actor, by)
                return True
            proposal = self._propose(message, prepared, undo)
            if proposal.leaving is not None:
                left = f"rank {proposal.leaving} has left its loop: there is no further boundary"
                self._say(command, actor, "rejected", reason=left)
                return True
            verdict, reason = self._decide(proposal)
            if verdict == "silent" and undo is not None:
                return False
            if verdict in {"refused", "silent"}:
                self._say(command, actor, "rejected", reason=reason)
                return True
            if verdict == "go":
                self._margin = eased(self._margin)
                self._say(command, actor, "scheduled", step=proposal.step)
                return self._conclude(proposal, command, actor)
        if undo is None:  # an undoing is proposed again, and has its one outcome then
            reason = f"the ranks could not agree on a step in {TRIES} tries: nothing was changed; try again"
            self._say(command, actor, "failed", reason=reason)
        return False

    def _held_inside(self, command: Command) -> str | None:
        held_at = self._boundary.held_at
        if held_at is None or not held_at.mark or spec_of(command.action).inside:
            return None
        return (
            f"the run is paused inside an evaluation, after {held_at.batch} of its batches, and this needs the end of "
            "a step: resume first"
        )

    def _propose(self, message: LinkCommand, prepared: Prepared, undo: str | None) -> Proposal:
        command, expires_s = message.command, message.command.expires_s
        self._number += 1
        position = self._next_position(command, undo)
        proposal = Proposal(
            number=self._number,
            command=command,
            actor=message.actor,
            expires_at=None if expires_s is None or undo is not None else message.accepted + expires_s,
            step=position.step,
            mark=position.mark,
            at=self._boundary.completed,
            two_phase=prepared.two_phase,
            checkpoint=prepared.checkpoint,
            incarnation=prepared.incarnation,
            undo=undo,
            patience_s=patience(self._slowest_s),
        )
        self._proposal = proposal
        self._on(LeadEvent.PROPOSE)
        held = self._connection.decide(f"p/{self._number}", encode(proposal))
        if held is None:
            raise StoreSilent("a proposal that no rank of this run has signed is in the way")
        accepted = decode_proposal(held)
        if accepted.leaving is not None:
            self._on(LeadEvent.NOBODY)
            self._number -= 1  # the goodbye stays where it is, for the next command to find
        return accepted

    def _next_position(self, command: Command, undo: str | None) -> Position:
        boundary, due = self._boundary, self._due.get(command.id, 0)
        at, since_s = boundary.position, time.perf_counter() - boundary.reached
        margin = fitted(self._margin, step_s=boundary.step_s, since_s=since_s, agreement_s=self._agreement_s)
        inside = undo is None and spec_of(command.action).inside and at.ends() != self._left
        position = boundary_for(at, margin, boundary.held_at, inside=inside)
        # Never ahead of a pause: a resume would wait behind it for ever. A later rollback leaves it far ahead: no.
        ahead = boundary.held_at is None and position.step < due <= at.step + LEAD_LIMIT
        return Position(due) if ahead else position

    def _decide(self, proposal: Proposal) -> tuple[str, str | None]:
        number = proposal.number
        keys = [f"a/{number}/{rank}" for rank in self._ranks]
        asked = time.perf_counter()
        try:
            self._connection.wait(keys, _ANSWERS_S)
        except StoreSilent:
            silent = [rank for rank, key in zip(self._ranks, keys, strict=True) if not self._connection.has([key])]
            self._connection.decide(f"d/{number}", ABORT)
            self._on(LeadEvent.NOT_READY)
            return "silent", f"rank {silent[0] if silent else '?'} did not answer within {_ANSWERS_S:.0f} s"
        sealed = self._connection.get_all(keys)
        if None not in sealed:
            self._spent.past(number - 1)  # each rank follows this one
        answers = [_read_answer(given) for given in sealed]
        # The newest counts a quarter, so that one rank with its hands full does not slow a hundred commands.
        took_s = time.perf_counter() - asked
        self._agreement_s += (took_s - self._agreement_s) / 4
        self._slowest_s = max(took_s, 0.9 * self._slowest_s)
        verdict, reason = judge(answers)
        if verdict != "refused" and (stray := self._stray(answers)) is not None:
            verdict, reason = "refused", stray
        if verdict != "go":
            self._connection.decide(f"d/{number}", ABORT)
            self._on(LeadEvent.NOT_READY)
            if verdict == "again":
                self._margin = next_margin(self._margin, proposal.position, answers)
                if proposal.mark and any(left_evaluation(given) for given in answers):
                    self._left = proposal.position.ends()
            return verdict, reason
        self._on(LeadEvent.READY)
        if self._connection.decide(f"d/{number}", GO) == GO:
            self._on(LeadEvent.WENT)
            return "go", None
        self._on(LeadEvent.LOST)
        self._margin = min(1000, self._margin + 1)
        return "again", None

    def _stray(self, answers: list[Answer]) -> str | None:
        """Whether rank 0 itself is far behind what another rank had answered."""
        ahead = max(self._ranks, key=lambda rank: answers[rank].step)
        own, other = self._boundary.completed, answers[ahead].step
        found = no_common_step(own=own, other=other, whose=f"rank {ahead}")
        return None if found is None else f"rank 0: {found}"

    def _conclude(self, proposal: Proposal, command: Command, actor: str) -> bool:
        """Have it applied, or not; false for an undoing that came to nothing, and is on trial still."""
        staged: list[Outcome] = []
        if proposal.two_phase:
            found = self._outcomes("l", proposal, unless=command.id)
            if found is None:
                return self._withdraw(proposal, command, actor)
            staged = found
        cancelled = any(not outcome.ok for outcome in staged)
        forced = self._judge(proposal, verdict_on(staged)) if proposal.two_phase else False
        outcomes = self._outcomes("r", proposal) or []
        self._on(LeadEvent.REPORTED)
        if proposal.mark and any(outcome.waited for outcome in outcomes):
            self._left = proposal.position.ends()  # a rank without these batches waits elsewhere in its on_eval
        first = outcomes[0]
        if forced and proposal.undo is not None:
            return False
        if forced:
            reason = "rank 0 was not heard of while all were ready, so a rank called it off: nothing was changed"
            self._say(command, actor, "failed", reason=reason)
        elif cancelled:
            self._say_failed(command, actor, staged, done=[])
        elif any(not outcome.ok for outcome in outcomes):
            self._say_failed(command, actor, outcomes, done=[rank for rank in self._ranks if outcomes[rank].ok])
        elif not first.pending:
            given = (first.before, first.after, first.reason)
            self._say(command, actor, "applied", step=first.step, before=given[0], after=given[1], reason=given[2])
        return True

    def _judge(self, proposal: Proposal, verdict: bytes) -> bool:
        """Write the verdict; whether a rank that had not heard of this one for long wrote another before."""
        if verdict == COMMIT:
            self._on(LeadEvent.STAGED)
        held = self._connection.decide(f"c/{proposal.number}", verdict)
        self._on(LeadEvent.JUDGED if verdict == COMMIT else LeadEvent.NOT_STAGED)
        return held != verdict

    def _withdraw(self, proposal: Proposal, command: Command, actor: str) -> bool:
        """Nothing was touched yet, and nothing will be: told at once, though the ranks may be far from the boundary.

        False where a rank had called an undoing off before, so that the change is on trial still.
        """
        by = self._cancelled[command.id]
        verdict = CANCEL if proposal.undo is None else keep(by.actor)
        held = self._connection.decide(f"c/{proposal.number}", verdict)
        self._on(LeadEvent.NOT_STAGED)
        if held == verdict:
            self._say_cancelled(command, actor, self._cancelled.pop(command.id))
        self._outcomes("r", proposal)
        self._on(LeadEvent.REPORTED)  # the next proposal has to wait until every rank is past this one
        return held == verdict

    def _say_cancelled(self, command: Command, actor: str, cancel: LinkCancel) -> None:
        if cancel.actor == "hub":
            self._say(command, actor, "expired", reason="it was not applied in time: nothing was changed")
        else:
            self._say(command, actor, "rejected", reason=f"cancelled by {cancel.actor}")

    def _say_failed(self, command: Command, actor: str, outcomes: list[Outcome], *, done: list[int]) -> None:
        """`done`: the ranks that applied it."""
        failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if not outcome.ok]
        rank, outcome = next((found for found in failed if not found[1].waited), failed[0])
        alike = len(failed) == len(outcomes) and len({given.reason for _, given in failed}) == 1
        strays = outcome.declined and any(given.waited for _, given in failed) and not outcome.waited
        named = alike or (outcome.declined and not strays) or str(outcome.reason).startswith("rank ")
        where = f"rank {rank}: " if len(outcomes) > 1 and not named else ""
        reason = f"{where}{outcome.reason}"
        if done and outcome.declined:  # it left its loop after all had said that they are ready
            reason = f"rank {rank}: {outcome.reason}; it was applied on rank {', '.join(map(str, done))}"
        state = "expired" if outcome.expired else "rejected" if outcome.declined and not done else "failed"
        self._say(command, actor, state, step=outcome.step, reason=reason)

    def _outcomes(self, kind: str, proposal: Proposal, unless: str | None = None) -> list[Outcome] | None:
        """What every rank reports, as soon as the last one has; None when the command `unless` was withdrawn before.

        A step may take minutes, so there is no limit here. Asked for one rank after another, and less often the longer
        it takes: hundreds of ranks would otherwise cost rank 0 and the store as many look-ups each time.
        """
        keys = [f"{kind}/{proposal.number}/{rank}" for rank in self._ranks]
        began = time.monotonic()
        signs = 0
        for key in keys:
            while not self._connection.has([key]):
                if unless in self._cancelled:
                    return None
                waited_s = time.monotonic() - began
                if kind == "l" and waited_s >= signs * _SIGN_S:  # else a rank that is ready would call it off
                    signs += 1
                    self._connection.put(f"v/{proposal.number}", str(signs).encode())
                time.sleep(min(max(waited_s / 20, _POLL_S[0]), _POLL_S[1]))
        return [_read_outcome(sealed) for sealed in self._connection.get_all(keys)]

    def _say(
        self,
        command: Command,
        actor: str,
        state: str,
        *,
        step: int | None = None,
        before: object = None,
        after: object = None,
        reason: str | None = None,
    ) -> None:
        self._tell(
            update_of(
                command,
                actor,
                state,
                step,
                self._boundary,
                self._incarnation(),
                len(self._ranks),
                before,
                after,
                reason,
            )
        )
        for cancel in self._giving_way.ended(command.id, state):
            if (older := self._queued.pop(cancel.id, None)) is not None:
                reason = f"{cancel.actor} sent {command.id} in its place"
                self._say(older.command, older.actor, "superseded", reason=reason)


def _read_answer(sealed: bytes | None) -> Answer:
    if sealed is None:
        return Answer(verdict="refused", step=0, reason="an answer that no rank of this run has signed")
    return decode_answer(sealed)


def _read_outcome(sealed: bytes | None) -> Outcome:
    if sealed is None:
        return Outcome(ok=False, step=0, reason="a report that no rank of this run has signed")
    return decode_outcome(sealed)
