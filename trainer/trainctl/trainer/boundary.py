"""The boundary: where the training thread and the control thread meet.

The training thread, at the end of every step, tests one attribute. The control thread arms a proposal by setting it
and then reads how far training is; the training thread sets how far it is and then reads the attribute. Whichever
comes second sees the other, so a proposal is either met or known to be late.
"""

import logging
import threading
import time
from typing import TYPE_CHECKING

from trainctl.trainer.agreement import COMMIT, GO, Outcome, Position, Proposal
from trainctl.trainer.protocol import Do, ProtocolError, Rank, RankEvent, rank_step

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_new = tuple.__new__  # a NamedTuple's own constructor costs half a microsecond, and this is done at each step


class Armed:
    """One proposal on this rank: the control thread tells the decision, the training thread the outcome.

    Where it stands is `state`, by the table in `protocol`; the events wake whoever waits for one of them.
    """

    def __init__(self, proposal: Proposal) -> None:
        self.proposal = proposal
        self.state = Rank.ARMED
        self._turn = threading.Lock()
        self.decision: bytes | None = None
        self.decided = threading.Event()
        self.verdict: bytes | None = None
        self.judged = threading.Event()
        self.met = False  # the training thread is at the boundary
        self.staged = False
        self.prepared = threading.Event()  # staged, or over before it came to that
        self.outcome: Outcome | None = None
        self.applied = threading.Event()
        self.doubt: Exception | None = None

    def on(self, event: RankEvent) -> Do:
        """Go on by the table; an error of ours is told and changes nothing, for training comes first."""
        with self._turn:
            try:
                self.state, do = rank_step(self.state, event, two_phase=self.proposal.two_phase)
            except ProtocolError as error:
                log.exception("trainctl: proposal %d: %s", self.proposal.number, error)  # noqa: TRY401
                return Do.NOTHING
            return do

    def decide(self, decision: bytes) -> None:
        self.on(RankEvent.GO if decision == GO else RankEvent.ABORT)
        self.decision = decision
        self.decided.set()

    def judge(self, verdict: bytes) -> None:
        self.on(RankEvent.COMMIT if verdict == COMMIT else RankEvent.CANCEL)
        self.verdict = verdict
        self.judged.set()

    def stage(self) -> None:
        """All that can fail was done, well or not, and is told."""
        self.on(RankEvent.STAGE)
        self.staged = True
        self.prepared.set()
        if self.verdict is not None:  # called off before that
            self.judge(self.verdict)

    def finish(self, outcome: Outcome, *, fell: bool = False) -> None:
        """`fell`: this rank left its loop, or raised."""
        if self.outcome is None:
            self.on(RankEvent.FALL if fell else RankEvent.DONE)
            self.outcome = outcome
            self.applied.set()
            self.prepared.set()

    def fail(self, doubt: Exception) -> None:
        """The control thread can no longer learn what was decided."""
        self.doubt = doubt
        self.decided.set()
        self.judged.set()

    def going(self) -> bool | None:
        """At the boundary: whether it was decided to go; None where the proposal's patience ends without a decision."""
        self.on(RankEvent.REACH)
        self.decided.wait(self.proposal.patience_s)
        if self.state is Rank.WAITING:
            self.on(RankEvent.IMPATIENT)
            return None
        return self.state is not Rank.DROPPED


class Boundary:
    """How far this rank is, and what waits for it there."""

    def __init__(self) -> None:
        self.position = Position(0)  # one attribute, so that no thread reads half of it
        self.reached = 0.0  # when the last step was completed, on time.perf_counter's clock; 0 before the first
        self.step_s = 0.0  # how long it took
        self.held_at: Position | None = None
        self.armed: Armed | None = None
        self.closed = False
        self.withdraw: Callable[[Armed], None] | None = None  # asks the others to drop what is not decided
        self.wake = threading.Event()

    @property
    def completed(self) -> int:
        """Completed steps."""
        return self.position[0]

    @completed.setter
    def completed(self, step: int) -> None:
        self.position = _new(Position, (step, 0))

    def begin_evaluation(self) -> None:
        self.position = self.position.begins()

    def next_batch(self) -> None:
        """One more batch of the evaluation is done."""
        step, mark = self.position
        now = time.perf_counter()
        self.reached, self.step_s = now, now - self.reached
        self.position = Position(step, mark + 1)

    def end_evaluation(self) -> None:
        if self.position.evaluating:
            self.position = self.position.ends()

    def arm(self, armed: Armed) -> None:
        self.armed = armed
        self.wake.set()

    def disarm(self, armed: Armed) -> None:
        if self.armed is armed:
            self.armed = None

    def close(self) -> None:
        """This rank left its loop: what is armed will not be met."""
        self.closed = True
        armed = self.armed
        if armed is not None:
            step = self.completed
            reason = f"the run ended at step {step}, before the boundary of step {armed.proposal.step}"
            self.miss(armed, reason)

    def miss(self, armed: Armed, reason: str) -> None:
        """This rank will not come to the boundary for which it is armed: nobody is to apply it."""
        armed.finish(Outcome(ok=False, step=self.completed, reason=reason, declined=True), fell=True)
        if self.withdraw is not None:
            self.withdraw(armed)
