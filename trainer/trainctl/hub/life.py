"""What state the run is in, from what rank 0 says and what the clock says. Pure."""

from typing import Literal

import msgspec

from trainctl.hub.stalled import StallDetector
from trainctl.wire.messages import FINAL_STATES, LinkBye, LinkHello, RunState, StateChanged


class RunLife:
    """Each method takes one happening and returns the state that is true after it."""

    def __init__(self, state: RunState) -> None:
        self.state = state
        self._said: RunState | None = None
        self._said_bye = False
        self._detector = StallDetector()

    @property
    def ended(self) -> bool:
        return self.state.state in FINAL_STATES

    def hello(self, hello: LinkHello, wall: float) -> RunState:
        """Rank 0 of a new attempt is there."""
        self._said = None
        self._said_bye = False
        self._detector = StallDetector()
        self.state = RunState(
            state="starting",
            since=wall,
            step=hello.step,
            step_time=wall,
            total_steps=hello.info.total_steps,
            incarnation=hello.incarnation,
            attempt=hello.info.attempt,
        )
        return self.state

    def progress(self, run: RunState, wall: float, now: float) -> RunState:
        """Rank 0 said where it is; `now` is monotonic."""
        if self._said_bye:
            return self.state
        self._said = run
        self._detector.observe(run, now)
        return self.tick(wall, now)

    def advanced(self, step: int, step_time: float, incarnation: int) -> RunState:
        """Rows of a step came: they are newer than what rank 0 last said of itself."""
        if not self.ended and incarnation == self.state.incarnation and step > self.state.step:
            self.state = msgspec.structs.replace(self.state, step=step, step_time=step_time)
            if self._said is not None:
                self._said = msgspec.structs.replace(self._said, step=step, step_time=step_time)
        return self.state

    def tick(self, wall: float, now: float) -> RunState:
        """Time went by."""
        if self._said is None:
            return self.state
        verdict = self._detector.verdict(now)
        if verdict is None:
            self.state = self._said
        else:
            reason, for_s = verdict
            since = self.state.since if self.state.state == "stalled" else wall - for_s
            self.state = msgspec.structs.replace(self._said, state="stalled", since=since, reason=reason)
        return self.state

    def bye(self, bye: LinkBye, wall: float, run: RunState | None = None) -> RunState:
        """Rank 0 ended in order; `run` is what it said of itself last, where that is not known yet."""
        self._said_bye = True
        self.state = self.state if run is None else run
        state = bye.state if bye.state in FINAL_STATES else "failed"
        reason = bye.reason if bye.reason or state == bye.state else f"rank 0 left while {bye.state}"
        return self._end(state, reason, wall, bye.step)

    def lost(self, reason: str, wall: float) -> RunState:
        """Rank 0 is gone without a word."""
        return self.state if self.ended else self._end("lost", reason, wall, self.state.step)

    def ended_by(self, state: Literal["stopped", "starting", "preempted"], reason: str, wall: float) -> RunState:
        """The ranks were ended, by an operator or a preemption; whatever rank 0 still had on its way does not count.
        `starting` waits for the hello of the next attempt."""
        self._said_bye = True
        return self._end(state, reason, wall, self.state.step)

    def _end(self, state: str, reason: str | None, wall: float, step: int) -> RunState:
        self._said = None
        self.state = msgspec.structs.replace(
            self.state,
            state=state,
            since=wall,
            reason=reason,
            step=step,
            steps_per_s=None,
            tokens_per_s=None,
            samples_per_s=None,
            mfu=None,
            resumes_at=None,
            paused_since=None,
            revert_in={},
        )
        return self.state


def change(before: RunState, after: RunState, wall: float) -> StateChanged | None:
    """The event that tells subscribers of a new state, or None where the state is the same."""
    same = (before.state, before.attempt) == (after.state, after.attempt)
    if same and not (after.state == "starting" and after.reason != before.reason):
        return None
    return StateChanged(
        time=wall,
        step=after.step,
        incarnation=after.incarnation,
        state=after.state,
        before=before.state,
        reason=after.reason,
        attempt=after.attempt,
    )
