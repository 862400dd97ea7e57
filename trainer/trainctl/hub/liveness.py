"""Which rank is dead or stuck. Pure: the clock is an argument.

*Dead* is what the agent of its node says: its process is gone and it did not end well. *Stuck* is a rank of which no
figures come, or which stays in one phase for longer than the larger of `AT_LEAST_S` and five times that phase's median
(`UNKNOWN_S` while no median is known); where it is in no phase, the same holds for the time since its last step.
An evaluation or a save takes as long as it takes until three of them are known, and while one rank is at it the others
may wait for it. Between two batches of an evaluation the same limit holds as between steps, once three are known.
In its first step, where nothing is known yet and a compilation takes minutes, the limit is `FIRST_STEP_S`; once another
rank has that step behind it, it is no compilation that keeps a rank there, and the limit is `AT_LEAST_S` from then on.

A rank's figures come by way of the store and rank 0. Where rank 0 itself is not heard the others are not judged, and
where rank 0 is heard and brings nobody's figures, the store is to blame and not the ranks.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from trainctl.wire.messages import ProcessReading, RankFigures, RankPlace, Severity

# Figures are made, relayed and looked at once a second each: this is told within ten.
AT_LEAST_S: Final = 7.5
UNKNOWN_S: Final = 10.0
MEDIANS: Final = 5.0
_KNOWN_BUSY = 3  # the first evaluation is often a short trial of it, and its first batch compiles
RELAY_S: Final = 3.0
STORE_S: Final = 5.0
FIRST_STEP_S: Final = 120.0
_AWAKE_S = 5.0  # as in `stalled`: time in which the hub itself stood still counts for nothing
_OBSERVED = 50
_SAME_S = 0.05  # two readings of when a phase began differ by how the clocks are read
_BUSY = frozenset({"evaluating", "checkpointing"})  # as long as it takes, unless it is known how long that is
_NOT_JUDGED = frozenset({"starting", "paused"})
_NO_STEP_DUE = _BUSY | _NOT_JUDGED


@dataclass(frozen=True, kw_only=True)
class Finding:
    """News of a rank. `state` is `dead`, `stuck`, or what it says of itself once it goes on."""

    rank: int
    node: str
    step: int
    state: str
    text: str
    severity: Severity


@dataclass(kw_only=True)
class _Rank:
    place: RankPlace
    heard_at: float
    stepped_at: float
    figures: RankFigures | None = None
    excused_at: float = float("-inf")  # until then it may have waited for a rank that was busy
    behind_at: float | None = None  # since when another rank has this one's first step behind it
    ahead: str = ""  # that rank, in words
    judged: str | None = None  # "stuck", "dead" or "left"
    seen_alive: bool = False
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=_OBSERVED))
    phases_s: dict[str, deque[float]] = field(default_factory=dict)  # stays that reports met, in no phase: in a state
    shares_s: dict[str, float] = field(default_factory=dict)  # of a step, by phase
    state_at: float = 0.0  # when it was first heard to be in its state
    batch_at: float = 0.0  # when its evaluation was first heard of, or a batch of it was heard to be done
    batches_s: deque[float] = field(default_factory=lambda: deque(maxlen=_OBSERVED))  # of evaluations

    @property
    def where(self) -> str:
        """Where it was when it was last heard of."""
        figures = self.figures
        if figures is None:
            return "before its first report"
        between = " between two phases" if figures.phases_s else ""
        return f"after step {figures.step}" + (f" in {figures.phase}" if figures.phase else between)

    @property
    def is_busy(self) -> bool:
        """Whether others may be waiting for its evaluation or its save."""
        return self.judged is None and self.figures is not None and self.figures.state in _BUSY

    @property
    def _in_known_batches(self) -> bool:
        """Whether the next batch of its evaluation is due within a time that is known."""
        if self.figures is None or not self.figures.eval_batch or self.figures.state != "evaluating":
            return False
        return len(self.batches_s) >= _KNOWN_BUSY

    def take(self, figures: RankFigures, now: float) -> None:
        before, self.figures, self.heard_at = self.figures, figures, now
        if before is None:
            self.stepped_at = self.state_at = now
            return
        if figures.state != before.state:
            if before.state in _BUSY and before.phase is None:
                self.phases_s.setdefault(before.state, deque(maxlen=_OBSERVED)).append(now - self.state_at)
            self.state_at = now
        self.shares_s |= figures.phases_s
        self._take_batch(before, figures, now)
        if figures.step != before.step:
            if figures.step > before.step and before.state not in _NO_STEP_DUE:
                self.steps_s.append((now - self.stepped_at) / (figures.step - before.step))
            self.stepped_at = now
        elif before.state in _NO_STEP_DUE and figures.state not in _NO_STEP_DUE:
            self.stepped_at = now  # the next step begins here
        if before.phase is not None and before.phase_since is not None and not same_phase(before, figures):
            stay_s = before.time - before.phase_since
            if before.state in _BUSY or self.excused_at < now - stay_s:  # waiting for somebody says nothing of a phase
                self.phases_s.setdefault(before.phase, deque(maxlen=_OBSERVED)).append(stay_s)

    def _take_batch(self, before: RankFigures, figures: RankFigures, now: float) -> None:
        if figures.eval_batch == before.eval_batch and before.state == figures.state:
            return
        done = (figures.eval_batch or 0) - (before.eval_batch or 0)
        # The first one of an evaluation is no measure: workers start, and what is new compiles.
        if done > 0 and before.eval_batch and before.state == "evaluating":
            self.batches_s.extend([(now - self.batch_at) / done] * min(done, _OBSERVED))
        self.batch_at = now

    def shift(self, by_s: float) -> None:
        self.heard_at += by_s
        self.stepped_at += by_s
        self.state_at += by_s
        self.batch_at += by_s
        if self.behind_at is not None:
            self.behind_at += by_s

    def compare(self, other: "_Rank | None", now: float) -> None:
        """`other` is the one of all ranks that has come furthest, None where nothing is known of it."""
        mine, theirs = self.figures, other.figures if other is not None else None
        if mine is None or theirs is None or mine.state != "starting" or theirs.step <= mine.step:
            self.behind_at = None
        elif self.behind_at is None:
            self.behind_at, self.ahead = now, f"rank {theirs.rank} is at step {theirs.step}"

    def why_stuck(self, now: float) -> str | None:
        """A sentence, or None while nothing is wrong."""
        silent_s = now - self.heard_at
        if silent_s > AT_LEAST_S:
            return f"nothing was heard of it for {silent_s:.0f} s: it was {self.where}"
        figures = self.figures
        if figures is not None and figures.state == "starting":
            return self._why_not_started(figures, now, silent_s)
        if figures is None or figures.state in _NOT_JUDGED:
            return None
        if self._in_known_batches:
            return self._why_no_batch(figures, now)
        if figures.phase is not None and figures.phase_since is not None:
            known = self.phases_s.get(figures.phase)
            for_s = figures.time - figures.phase_since + silent_s
            where = f"in {figures.phase}"
        elif figures.state in _BUSY:
            known, for_s, where = self.phases_s.get(figures.state), now - self.state_at, figures.state
        else:
            known, for_s, where = self.steps_s, now - self.stepped_at, "no step"
        # A short phase is hardly ever met by a report; then what it takes of a step on average says that it is short.
        median_s = statistics.median(known) if known else self.shares_s.get(figures.phase or "")
        if figures.state in _BUSY and len(known or ()) < _KNOWN_BUSY:
            return None
        limit_s = UNKNOWN_S if median_s is None else max(AT_LEAST_S, MEDIANS * median_s)
        if min(for_s, now - self.excused_at) <= limit_s:
            return None
        what = f"{where} for {for_s:.0f} s"
        usual = f", usually {median_s:.3g} s" if median_s is not None else ""
        return f"{what} after step {figures.step}{usual}"

    def _why_no_batch(self, figures: RankFigures, now: float) -> str | None:
        """Nobody excuses it: who is outside of the batches is not waited for in one."""
        median_s, for_s = statistics.median(self.batches_s), now - self.batch_at
        if for_s <= max(AT_LEAST_S, MEDIANS * median_s):
            return None
        where = f"after batch {figures.eval_batch} of the evaluation at step {figures.step}"
        return f"no batch for {for_s:.0f} s {where}, usually {median_s:.3g} s"

    def _why_not_started(self, figures: RankFigures, now: float, silent_s: float) -> str | None:
        """Its first step may have to compile, load and connect; what hangs in it is named all the same."""
        if figures.phase is not None and figures.phase_since is not None:
            for_s, where = figures.time - figures.phase_since + silent_s, f"in {figures.phase}"
        else:
            for_s, where = now - self.stepped_at, "in no phase"
        words = f"{where} for {for_s:.0f} s, in its first step after step {figures.step}"
        if self.behind_at is not None:
            return f"{words}, and {self.ahead}" if now - max(self.behind_at, self.excused_at) > AT_LEAST_S else None
        return words if for_s > FIRST_STEP_S else None

    def finding(self, state: str, text: str, severity: Severity) -> Finding:
        step = self.figures.step if self.figures is not None else 0
        return Finding(rank=self.place.rank, node=self.place.node, step=step, state=state, text=text, severity=severity)


class Liveness:
    """The ranks of one attempt. Everything but `tick` takes what was heard; `now` is a monotonic clock."""

    def __init__(self, places: Sequence[RankPlace], now: float, *, total_steps: int | None = None) -> None:
        self._ranks = {place.rank: _Rank(place=place, heard_at=now, stepped_at=now) for place in places}
        self._total_steps = total_steps
        self._relay_at = now
        self._looked_at = now
        self._figures_at: float | None = None
        self.store_silent = False

    def state_of(self, rank: int) -> str | None:
        """`stuck`, `dead` or `left` (it ended well, before the others did) where that was found."""
        found = self._ranks.get(rank)
        return found.judged if found is not None else None

    def relay(self, now: float) -> None:
        """Rank 0 said something."""
        self._relay_at = now

    def figures(self, ranks: Sequence[RankFigures], now: float) -> list[Finding]:
        """What rank 0 brought of everybody; figures that came before are no sign of life."""
        self._figures_at = now
        found = []
        for figures in ranks:
            rank = self._ranks.get(figures.rank)
            if rank is None or figures.pid != rank.place.pid:
                continue
            if rank.figures is not None and figures.time <= rank.figures.time:
                continue
            rank.take(figures, now)
            if rank.judged == "stuck" and rank.why_stuck(now) is None:
                rank.judged = None
                found.append(rank.finding(figures.state, f"goes on, {rank.where}", "good"))
        return found

    def processes(self, node: str, readings: Sequence[ProcessReading], run_id: str) -> list[Finding]:
        """What the agent of a node sees."""
        seen = {reading.pid: reading for reading in readings if reading.run_id == run_id}
        found = []
        for rank in self._ranks.values():
            if rank.place.node != node or rank.judged in {"dead", "left"}:
                continue
            reading = seen.get(rank.place.pid)
            if reading is not None and reading.alive:
                rank.seen_alive = True
            elif reading is not None:
                rank.judged = "dead"
                how = reading.ended or "died, of what is not known"
                found.append(rank.finding("dead", f"pid {reading.pid} {how}: it was {rank.where}", "error"))
            elif rank.seen_alive:
                rank.judged = "left"  # it took its place file away: it ended well
        return found

    def tick(self, now: float) -> list[Finding]:
        """Time went by; to be asked once a second."""
        passed_s, self._looked_at = now - self._looked_at, now
        if passed_s > _AWAKE_S:
            self._sleep(passed_s)
        muted = now - self._relay_at > RELAY_S
        self.store_silent = not muted and self._figures_at is not None and now - self._figures_at > STORE_S
        found = []
        furthest = max(
            (rank for rank in self._ranks.values() if rank.figures is not None),
            key=lambda rank: rank.figures.step if rank.figures is not None else 0,
            default=None,
        )
        busy = {number for number, rank in self._ranks.items() if rank.is_busy}
        for number, rank in self._ranks.items():
            if busy - {number}:
                rank.excused_at = now
            if number == 0:
                rank.heard_at = max(rank.heard_at, self._relay_at)
            if self.store_silent or (muted and number != 0):
                rank.shift(0.0 if passed_s > _AWAKE_S else passed_s)
                continue
            rank.compare(furthest, now)
            if rank.judged is None and not self._done(rank) and (why := rank.why_stuck(now)) is not None:
                rank.judged = "stuck"
                found.append(rank.finding("stuck", why, "warning"))
        return found

    def _done(self, rank: _Rank) -> bool:
        """Whether no further step is due; what a script does after its last one takes as long as it takes."""
        total = self._total_steps
        return total is not None and rank.figures is not None and rank.figures.step >= total

    def _sleep(self, for_s: float) -> None:
        self._relay_at += for_s
        if self._figures_at is not None:
            self._figures_at += for_s
        for rank in self._ranks.values():
            rank.shift(for_s)


def same_phase(one: RankFigures, other: RankFigures) -> bool:
    """Whether two figures of a rank were taken in one and the same stay in a phase."""
    if one.phase != other.phase or one.phase_since is None or other.phase_since is None:
        return False
    return abs(one.phase_since - other.phase_since) < _SAME_S
