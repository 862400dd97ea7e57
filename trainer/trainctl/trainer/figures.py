"""What a rank reports about itself once a second, and the speed that rank 0 makes of its steps."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from trainctl.trainer import steering
from trainctl.trainer.buffer import StepMark
from trainctl.trainer.core import Core
from trainctl.trainer.overrides import Overrides
from trainctl.trainer.tally import Tally
from trainctl.wire.messages import LrState, RankFigures, RunState

_WINDOW_S = 15.0
_PAGE = os.sysconf("SC_PAGE_SIZE")


def gpu_uuid() -> str | None:
    """The UUID under which NVML knows this process's device."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    with contextlib.suppress(RuntimeError, AttributeError):
        return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    return None


def memory_bytes() -> int | None:
    """Device memory where there is a device, else this process's resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.memory_allocated())
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    return None


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What rank 0 makes of the last seconds; None is "not known"."""

    steps_per_s: float | None = None
    tokens_per_s: float | None = None
    samples_per_s: float | None = None
    mfu: float | None = None
    phases: dict[str, float] = field(default_factory=dict)  # share of the time, 0 to 1


class Pace:
    """Steps, tokens and samples per second over the last seconds, and what share of that time each phase took."""

    def __init__(self) -> None:
        self._marks: deque[StepMark] = deque()
        self._phases: deque[tuple[float, dict[str, float]]] = deque()

    def step(self, mark: StepMark) -> None:
        self._marks.append(mark)

    def phases(self, at: float, seconds: dict[str, float]) -> None:
        self._phases.append((at, seconds))

    def rewind(self) -> None:
        self._marks.clear()

    def rates(self, now: float) -> Rates:
        """The rates at `now`; nothing while fewer than two steps are known."""
        while len(self._marks) > 2 and now - self._marks[0].time > _WINDOW_S:
            self._marks.popleft()
        while len(self._phases) > 1 and now - self._phases[0][0] > _WINDOW_S:
            self._phases.popleft()
        seconds = self._marks[-1].time - self._marks[0].time if len(self._marks) > 1 else 0.0
        if seconds <= 0:
            return Rates()
        marks = list(self._marks)[1:]
        sums: dict[str, float] = {}
        for _, taken in self._phases:
            for name, value in taken.items():
                sums[name] = sums.get(name, 0.0) + value
        covered = max(seconds, sum(sums.values()))
        used = [mark.mfu * mark.seconds for mark in marks if mark.mfu is not None]
        return Rates(
            steps_per_s=len(marks) / seconds,
            tokens_per_s=sum(mark.tokens for mark in marks) / seconds or None,
            samples_per_s=sum(mark.samples for mark in marks) / seconds or None,
            mfu=sum(used) / seconds if used else None,
            phases={name: value / covered for name, value in sums.items()},
        )


def figures_of(core: Core, phases_s: dict[str, float], steps: int, steps_s: float) -> RankFigures:
    """This rank's figures over the last second, in which it completed `steps` that took `steps_s` together."""
    busy, data, now = sum(phases_s.values()), core.ranges.newest(), time.time()
    phase, position = core.phases.current(), core.boundary.position
    return RankFigures(
        rank=core.place.rank,
        node=core.place.node,
        pid=os.getpid(),
        state=core.state(),
        step=position.step,
        time=now,
        step_time_s=steps_s / steps if steps else None,
        data_wait_s=phases_s.get("data", 0.0) / steps if steps else None,
        memory_bytes=memory_bytes(),
        gpu_uuid=gpu_uuid(),
        phases_s={name: value / steps for name, value in phases_s.items()} if steps and busy else {},
        loss=core.own_loss,
        data_first=data[0] if data is not None else None,
        data_last=data[1] if data is not None else None,
        phase=phase[0] if phase is not None else None,
        phase_since=now - phase[1] if phase is not None else None,
        checkpoint_memory_bytes=core.checkpointer.memory_bytes if core.checkpointer is not None else None,
        eval_batch=position.batch if position.evaluating else None,
    )


def lost_here(core: Core) -> dict[str, int]:
    """What this rank itself could not keep of what was logged and timed, by reason, since this attempt began."""
    buffer = core.buffer
    return {
        "buffer": buffer.refused,
        "buffer-memory": buffer.refused_wide,
        "device": buffer.not_copied + buffer.not_read,
        "phase": core.phases.lost,
    }


def lr_state(overrides: Overrides | None, logged: Mapping[str, float]) -> LrState:
    """The first group's rate and its rule; `logged` is what is known of a rate that lies on a device, or of none."""
    rule = overrides.lr_rule() if overrides is not None else None
    if overrides is not None and not overrides.on_device:
        known = LrState(scheduled=overrides.scheduled_lr(), effective=overrides.effective_lr())
    else:
        effective = logged.get("lr")
        known = LrState(scheduled=logged.get("lr_scheduled", effective), effective=effective)
    if rule is None:
        return known
    return msgspec.structs.replace(known, rule=rule.kind, value=None if rule.kind == "free" else rule.value)


def run_state(
    core: Core, pace: Pace, tally: Tally, *, since: float, step_time: float, dropped: dict[str, int]
) -> RunState:
    """What is true of the run now, as rank 0 sees it."""
    rates = pace.rates(time.time())
    hold = core.hold
    return RunState(
        state=core.state(),
        since=since,
        step=core.boundary.completed,
        step_time=step_time,
        total_steps=core.total_steps,
        incarnation=core.incarnation,
        attempt=core.identity.attempt,
        lr=lr_state(core.overrides, core.last_metrics),
        steps_per_s=rates.steps_per_s,
        tokens_per_s=rates.tokens_per_s,
        samples_per_s=rates.samples_per_s,
        mfu=rates.mfu,
        phases=rates.phases,
        clipped=tally.clipped,
        nans=dict(tally.nans),
        infs=dict(tally.infs),
        by=hold.by if hold is not None else core.ended_by,
        resumes_at=hold.resumes_at if hold is not None else None,
        paused_since=hold.since if hold is not None else None,
        revert_in=core.reverts.steps_left(core.boundary.completed),
        overrides=steering.in_words(core),
        dropped={reason: count for reason, count in dropped.items() if count},
        in_memory=core.checkpointer.in_memory if core.checkpointer is not None else [],
    )
