"""A session that says what a test tells it to: real messages into a real model, no network."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import numpy as np

from trainctl.client.model import Item, Link, RunModel
from trainctl.client.points import Points
from trainctl.wire.commands import Action, args_of, spec_of
from trainctl.wire.messages import (
    Beat,
    Body,
    CheckpointInfo,
    Checkpoints,
    CheckpointSaved,
    Column,
    CommandUpdate,
    Envelope,
    Event,
    GpuReading,
    LastValue,
    LrState,
    NodeReading,
    RankFigures,
    RolledBack,
    Rows,
    RunInfo,
    RunState,
    Snapshot,
    Tunable,
    Verified,
    stream_of,
)

CAPABILITIES: Mapping[str, bool | str] = {
    "pause": True,
    "lr": True,
    "set": True,
    "checkpoint": True,
    "rollback": True,
    "eval": True,
    "stop": True,
}


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.offset


def curves(steps: int, seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """What a run of so many steps might have logged; `step` and `time` first."""
    rng = np.random.default_rng(seed)
    step = np.arange(1, steps + 1, dtype=np.int64)
    loss = 2.2 + 3.3 * np.exp(-step / (0.12 * steps)) + rng.normal(0, 0.06, steps)
    scheduled = 6e-4 * np.minimum(step / (0.05 * steps), 0.5 * (1 + np.cos(np.pi * step / (2.2 * steps))))
    tokens = 1.24e6 * (1 + rng.normal(0, 0.02, steps))
    return {
        "step": step,
        "time": time.time() - (steps - step) * 0.05,
        "loss": loss,
        "lr": scheduled * np.where(step > 0.7 * steps, 0.5, 1.0),
        "lr_scheduled": scheduled,
        "grad_norm": np.exp(rng.normal(-0.3, 0.35, steps)) * (1 + 3 * np.exp(-step / (0.05 * steps))),
        "tokens_per_s": tokens,
        "step_time_s": np.full(steps, 0.9),
    }


def run_info(**changes: object) -> RunInfo:
    fields: dict[str, Any] = {
        "run": "gpt-stdlib",
        "id": "gpt-stdlib-20260101-120000-abcd",
        "dir": "/runs/gpt-stdlib",
        "host": "node-a",
        "created": time.time() - 3600,
        "world_size": 4,
        "started": time.time() - 3600,
        "total_steps": 100_000,
        "capabilities": dict(CAPABILITIES),
        "tunables": [
            Tunable(name="clip", value=1.0, kind="float", minimum=0.1, maximum=100.0),
            Tunable(name="eval_every", value=50, kind="int", minimum=1),
        ],
    }
    return RunInfo(**(fields | changes))


def run_state(**changes: object) -> RunState:
    fields: dict[str, Any] = {
        "state": "running",
        "since": time.time() - 840,
        "step": 5000,
        "step_time": time.time(),
        "lr": LrState(scheduled=5.6e-4, effective=2.8e-4, rule="scale", value=0.5),
        "steps_per_s": 1.18,
        "tokens_per_s": 1.24e6,
        "mfu": 0.41,
        "phases": {"data": 0.012, "forward": 0.3, "backward": 0.55, "optimizer": 0.05},
    }
    return RunState(**(fields | changes))


def rank_figures(count: int, slow: int | None = None) -> list[RankFigures]:
    return [
        RankFigures(
            rank=rank,
            node="node-b" if rank >= count // 2 and count > 2 else "node-a",
            pid=4000 + rank,
            state="running",
            step=5000,
            time=time.time(),
            step_time_s=1.21 if rank == slow else 0.85 + 0.002 * rank,
            data_wait_s=0.5 if rank == slow else 0.01,
            memory_bytes=2 << 30,
            gpu_uuid=f"GPU-{rank}",
            phases_s={"data": 0.01, "forward": 0.3, "backward": 0.5},
        )
        for rank in range(count)
    ]


def node_readings(nodes: int = 2, gpus: int = 4, *, hot: bool = False) -> list[NodeReading]:
    return [
        NodeReading(
            node=f"node-{chr(ord('a') + index)}",
            time=time.time(),
            interval_s=1.0,
            cpu=37.0,
            load=6.2,
            memory_used_bytes=90 << 30,
            memory_total_bytes=512 << 30,
            gpu_state="ok" if gpus else "none",
            gpus=[
                GpuReading(
                    index=gpu,
                    name="NVIDIA H100 80GB HBM3",
                    uuid=f"GPU-{index * gpus + gpu}",
                    utilization=71.0 if hot and gpu == 2 else 94.0 + gpu % 2,
                    memory_used_bytes=72 << 30,
                    memory_total_bytes=80 << 30,
                    temperature_c=84.0 if hot and gpu == 2 else 66.0,
                    power_w=610.0,
                    power_limit_w=700.0,
                    sm_clock_mhz=1755,
                    throttle="thermal" if hot and gpu == 2 else None,
                )
                for gpu in range(gpus)
            ],
        )
        for index in range(nodes)
    ]


def checkpoints(count: int = 5) -> list[CheckpointInfo]:
    return [
        CheckpointInfo(
            id=f"step-{1000 * (index + 1):08d}-1",
            step=1000 * (index + 1),
            time=time.time() - 600 * (count - index),
            bytes=1_200_000_000,
            incarnation=1,
            metrics={"loss": 2.9 - 0.1 * index},
            pinned=index == 2,
            verified=(True, None, True, False, True)[index % 5],
        )
        for index in range(count)
    ]


def some_events(step: int = 5000) -> list[Event]:
    now = time.time()
    return [
        RolledBack(
            time=now - 700,
            step=3500,
            incarnation=2,
            from_step=3912,
            from_incarnation=1,
            checkpoint="step-00003500-1",
            skipped_batches=40,
            lr_scale=0.5,
            actor="mk",
        ),
        CommandUpdate(
            time=now - 500,
            step=3520,
            incarnation=2,
            id="c1",
            command="lr scale",
            args={"factor": 0.5},
            actor="mk",
            state="applied",
            before=5.6e-4,
            after=2.8e-4,
            ranks=4,
        ),
        CheckpointSaved(
            time=now - 60,
            step=step,
            incarnation=2,
            id="step-00005000-2",
            bytes=1_200_000_000,
            stall_s=0.038,
            verified=True,
        ),
    ]


def snapshot(**changes: object) -> Snapshot:
    logged = curves(5000)
    fields: dict[str, Any] = {
        "req": 0,
        "info": run_info(),
        "state": run_state(),
        "heads": {},
        "metrics": {
            name: LastValue(step=5000, time=time.time(), value=float(values[-1]))
            for name, values in logged.items()
            if name not in {"step", "time"}
        },
        "ranks": rank_figures(4),
        "nodes": node_readings(),
        "checkpoints": checkpoints(),
        "events": some_events(),
        "commands": [],
    }
    return Snapshot(**(fields | changes))


def rows(step: int, values: Mapping[str, float], *, incarnation: int = 1) -> Rows:
    return Rows(
        attempt=1,
        incarnation=incarnation,
        steps=[step],
        times=[time.time()],
        columns=[
            Column(name=name, dtype="f8", data=np.array([value], "<f8").tobytes()) for name, value in values.items()
        ],
    )


class ScriptedSession:
    """See `trainctl.client.session.Session`. `say` puts a message in; `sent` is what was asked for."""

    def __init__(
        self,
        first: Snapshot | None = None,
        *,
        link: Link = "live",
        logged: Mapping[str, np.ndarray[Any, Any]] | None = None,
        outcomes: Sequence[str] = ("accepted", "scheduled", "applied"),
    ) -> None:
        self.clock = Clock()
        self.model = RunModel(self.clock)
        self.live = link != "recorded"
        self.link: Link = link
        self.logged = dict(curves(5000) if logged is None else logged)
        self.outcomes = list(outcomes)
        self.sent: list[tuple[Action, dict[str, object]]] = []
        self.asked: list[str] = []
        self.closed = False
        self._items: asyncio.Queue[Item | None] = asyncio.Queue()
        self._seq = 0
        if first is not None:
            self._items.put_nowait(first)

    def say(self, what: Body | RunState | Snapshot) -> None:
        if isinstance(what, Snapshot):
            self._items.put_nowait(what)
        elif isinstance(what, RunState):
            self._items.put_nowait(
                Beat(source="hub", epoch=1, time=time.time() + self.clock.offset, heads={}, run=what)
            )
        else:
            self._seq += 1
            self._items.put_nowait(
                Envelope(source="hub", epoch=1, stream=stream_of(what), seq=self._seq, time=time.time(), body=what)
            )

    def fall_silent(self, seconds: float, link: Link = "stale") -> None:
        """As if nothing had been heard for so long."""
        self.clock.offset += seconds
        self.link = link
        self._items.put_nowait(None)

    async def follow(self) -> AsyncGenerator[Item | None, None]:
        while True:
            item = await self._items.get()
            self.model.set_link(self.link)
            if item is not None:
                self.model.apply(item)
            yield item

    async def history(
        self,
        metrics: Sequence[str],
        *,
        from_step: int | None = None,
        to_step: int | None = None,
        points: int | None = None,
        incarnation: int | None = None,
    ) -> dict[str, Points]:
        self.asked.append("history")
        step = self.logged["step"]
        wanted = (step >= (from_step or 0)) & (step <= (to_step or 1 << 60))
        if incarnation is not None:
            wanted &= step % 2 == 0
        found = {}
        for name in metrics:
            if name not in self.logged:
                continue
            values = self.logged[name][wanted] + (0.8 if incarnation is not None and name == "loss" else 0.0)
            columns = {
                "step": step[wanted],
                "time": self.logged["time"][wanted],
                "value": values,
                "incarnation": np.full(len(values), incarnation or 1),
            }
            if points is not None:  # buckets of one
                columns |= {"mean": values, "count": np.ones(len(values), "i8")}
                columns |= {"nonfinite": np.zeros(len(values), "i8")}
            found[name] = Points(name=name, columns=columns)
        return found

    async def do(
        self,
        action: Action,
        *,
        condition: str | None = None,
        expires_s: float | None = None,
        revert_after: int | None = None,
        unless: str | None = None,
        command_id: str | None = None,
        timeout_s: float = 60.0,
    ) -> AsyncGenerator[CommandUpdate, None]:
        self.sent.append((action, {"revert_after": revert_after, "unless": unless}))
        for state in self.outcomes:
            yield CommandUpdate(
                time=time.time(),
                step=5003,
                incarnation=1,
                id=f"id-{len(self.sent)}",
                command=spec_of(action).name,
                args=args_of(action),
                actor="mk",
                state=state,  # type: ignore[arg-type]
                ranks=4 if state == "applied" else None,
            )

    async def events(
        self,
        *,
        limit: int = 200,
        since: float | None = None,
        from_step: int | None = None,
        kinds: Sequence[str] = (),
    ) -> list[Event]:
        return [event for event in self.model.events if not kinds or isinstance(event, RolledBack)]

    async def checkpoints(self) -> Checkpoints:
        return Checkpoints(req=0, checkpoints=list(self.model.checkpoints))

    async def verify(self, checkpoint: str) -> Verified:
        self.asked.append(f"verify {checkpoint}")
        return Verified(req=0, id=checkpoint, ok=True, text="3 files have the hashes of the manifest")

    async def tunables(self) -> list[Tunable]:
        return self.model.info.tunables if self.model.info else []

    async def audit(self) -> list[str]:
        return []

    async def verify_audit(self) -> tuple[int, str | None]:
        return 0, None

    async def close(self) -> None:
        self.closed = True
