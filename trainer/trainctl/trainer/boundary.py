"""The boundary: where the training thread and the control thread meet.

The training thread, at the end of every step, tests one attribute. The control thread arms a proposal by setting it
and then reads how far training is; the training thread sets how far it is and then reads the attribute. Whichever
comes second sees the other, so a proposal is either met or known to be late.
"""

import threading
import time
from typing import TYPE_CHECKING

from trainctl.trainer.agreement import GO, PATIENCE_S, Outcome, Position, Proposal

if TYPE_CHECKING:
    from collections.abc import Callable

_new = tuple.__new__  # a NamedTuple's own constructor costs half a microsecond, and this is done at each step


class Armed:
    """One proposal on this rank: the control thread tells the decision, the training thread the outcome."""

    def __init__(self, proposal: Proposal) -> None:
        self.proposal = proposal
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

    def decide(self, decision: bytes) -> None:
        self.decision = decision
        self.decided.set()

    def judge(self, verdict: bytes) -> None:
        self.verdict = verdict
        self.judged.set()

    def finish(self, outcome: Outcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self.applied.set()
            self.prepared.set()

    def fail(self, doubt: Exception) -> None:
        """The control thread can no longer learn what was decided."""
        self.doubt = doubt
        self.decided.set()
        self.judged.set()

    def going(self) -> bool | None:
        """Whether it was decided to go; None after `PATIENCE_S` without a decision."""
        if not self.decided.wait(PATIENCE_S) or self.doubt is not None:
            return None
        return self.decision == GO


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
        armed.finish(Outcome(ok=False, step=self.completed, reason=reason, declined=True))
        if self.withdraw is not None:
            self.withdraw(armed)
