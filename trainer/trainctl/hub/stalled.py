"""Does the run still step? Pure: the clock is an argument."""

import statistics
from collections import deque

from trainctl.wire.messages import FINAL_STATES, RunState

AT_LEAST_S = 10.0
MEDIANS = 5.0
_WINDOW = 50
# The hub looks once a second. Where it did not for longer, it was frozen or starved itself, and so were its readings.
_AWAKE_S = 5.0
# No step is due before the first one, nor while rank 0 says what it is busy with.
_NOT_STEPPING = frozenset({"starting", "paused", "evaluating", "checkpointing"}) | FINAL_STATES


class StallDetector:
    """Stalled is no step and no held boundary for longer than 10 s and five median steps, whichever is more.

    A rank 0 that says nothing at all for as long is stalled too, whatever it said last. Time in which nobody looked,
    because the hub itself stood still, counts for nothing.
    """

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=_WINDOW)
        self._step = -1
        self._state = "starting"
        self._stepped_at: float | None = None  # when the newest step was seen, or the last hold ended
        self._heard_at: float | None = None
        self._looked_at: float | None = None

    def observe(self, run: RunState, now: float) -> None:
        """Take what rank 0 says; `now` is seconds of a monotonic clock."""
        self._look(now)
        held = run.state in _NOT_STEPPING or self._state in _NOT_STEPPING
        if run.step > self._step and self._stepped_at is not None and not held:
            self._durations.append((now - self._stepped_at) / (run.step - self._step))
        if run.step != self._step or held or self._stepped_at is None:
            self._stepped_at = now
        self._step, self._state, self._heard_at = run.step, run.state, now

    def limit_s(self) -> float:
        """How long a step may take before it counts as a stall."""
        if not self._durations:
            return AT_LEAST_S
        return max(AT_LEAST_S, MEDIANS * statistics.median(self._durations))

    def verdict(self, now: float) -> tuple[str, float] | None:
        """Why the run is stalled and for how many seconds, or None; to be asked once a second."""
        self._look(now)
        if self._heard_at is None or self._stepped_at is None or self._state in FINAL_STATES | {"starting"}:
            return None
        limit_s = self.limit_s()
        silent_s, still_s = now - self._heard_at, now - self._stepped_at
        if silent_s > limit_s:
            return f"rank 0 has not reported for {silent_s:.0f} s", silent_s
        if still_s > limit_s and self._state not in _NOT_STEPPING:
            usual = f", usually {statistics.median(self._durations):.3g} s" if self._durations else ""
            return f"no step for {still_s:.0f} s{usual}", still_s
        return None

    def _look(self, now: float) -> None:
        asleep_s = 0.0 if self._looked_at is None else now - self._looked_at
        if asleep_s > _AWAKE_S:
            if self._heard_at is not None:
                self._heard_at += asleep_s
            if self._stepped_at is not None:
                self._stepped_at += asleep_s
        self._looked_at = now
