"""A run as this client knows it: one mutable picture, fed with what a session receives.

Ages are measured on the receiver's monotonic clock. What a source says carries the source's own wall clock, so the
model keeps the pair (source's time, our monotonic time) of the newest message and counts on from there: two machines
whose clocks differ by an hour still show an age of one second.
"""

import math
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from trainctl.wire.commands import FINAL_COMMAND_STATES
from trainctl.wire.manifest import pick
from trainctl.wire.messages import (
    FINAL_STATES,
    Beat,
    Body,
    CheckpointInfo,
    CheckpointRemoved,
    CheckpointSaved,
    CommandUpdate,
    Envelope,
    Event,
    LastValue,
    NodeChanged,
    NodeReading,
    RankChanged,
    RankFigures,
    Ranks,
    RolledBack,
    Rows,
    RunInfo,
    RunState,
    Snapshot,
    StateChanged,
)
from trainctl.wire.save_order import order_of

EVENTS_KEPT = 2000

Link: TypeAlias = Literal["live", "stale", "gone", "recorded"]
"""`live`: heard within three seconds. `stale`: silent. `gone`: silent, and nobody listens. `recorded`: from files."""

Item: TypeAlias = Snapshot | Envelope | Beat


class RunModel:
    """What is known of one run. `apply` is the only way in; `version` grows with every change.

    Attributes:
        info: what does not change within an attempt; None until the first snapshot.
        state: the newest heartbeat's word, moved on by rows and events in between.
        metrics: the newest value of every metric, by name.
        ranks, nodes: the newest figures by rank and by node name.
        events: newest last, at most `EVENTS_KEPT`.
        checkpoints: oldest first.
        commands: those that have no outcome yet, by id.
        link: how the source is doing, see `Link`.
        heard_monotonic: when anything was last heard, on `clock`; None before.
        lost_messages: published, and neither to be had again nor told of by a snapshot, or not to be read here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.info: RunInfo | None = None
        self.state: RunState | None = None
        self.metrics: dict[str, LastValue] = {}
        self.ranks: dict[int, RankFigures] = {}
        self.nodes: dict[str, NodeReading] = {}
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.checkpoints: list[CheckpointInfo] = []
        self.commands: dict[str, CommandUpdate] = {}
        self.link: Link = "stale"
        self.heard_monotonic: float | None = None
        self.lost_messages = 0
        self.version = 0
        self._settled: dict[str, None] = {}  # ids that have their outcome: nothing that comes later opens them again
        self._source_time: float | None = None
        self._source_heard = 0.0
        self._rank_heard: dict[int, float] = {}
        self._node_heard: dict[str, float] = {}

    # --- feeding

    def apply(self, item: Item) -> None:
        """Take in one message."""
        now = self.clock()
        if self.link != "recorded":
            self.heard_monotonic = now
        match item:
            case Snapshot():
                self._take_snapshot(item, now)
            case Beat():
                self._set_source_time(item.time, now)
                if item.run is not None:
                    self.state = item.run
            case Envelope():
                self._set_source_time(item.time, now)
                self._take_body(item.body, now - self.age_of(item.time, now))
        self.version += 1

    def set_link(self, link: Link) -> bool:
        """Note how the source is doing; true when that is news."""
        if link == self.link:
            return False
        self.link = link
        self.version += 1
        return True

    def _set_source_time(self, source_time: float, now: float) -> None:
        # Never backwards: a backfilled envelope is old, and its time says nothing about the source's clock now.
        if self._source_time is None or source_time >= self._source_time + (now - self._source_heard) - 1.0:
            self._source_time, self._source_heard = source_time, now

    def _take_snapshot(self, snapshot: Snapshot, now: float) -> None:
        self.info, self.state = snapshot.info, snapshot.state
        self.metrics = dict(snapshot.metrics)
        self.ranks = {figures.rank: figures for figures in snapshot.ranks}
        self.nodes = {reading.node: reading for reading in snapshot.nodes}
        # A later snapshot brings the newest events only: what was seen before them stays.
        oldest = min((event.time for event in snapshot.events), default=math.inf)
        older = [event for event in self.events if event.time < oldest]
        self.events = deque([*older, *snapshot.events], maxlen=EVENTS_KEPT)
        self.checkpoints = list(snapshot.checkpoints)
        self.commands = {update.id: update for update in snapshot.commands}
        self._rank_heard = {rank: now - self.age_of(figures.time, now) for rank, figures in self.ranks.items()}
        self._node_heard = {node: now - self.age_of(reading.time, now) for node, reading in self.nodes.items()}

    def _take_body(self, body: Body, heard: float) -> None:
        match body:
            case Rows():
                self._take_rows(body)
            case Ranks():
                for figures in body.ranks:
                    known = self.ranks.get(figures.rank)
                    if known is None or known.time != figures.time:  # a repeat is no sign of life
                        self._rank_heard[figures.rank] = heard
                    self.ranks[figures.rank] = figures
            case NodeReading():
                self.nodes[body.node] = body
                self._node_heard[body.node] = heard
            case _:
                self.events.append(body)
                self._take_event(body)

    def _take_rows(self, rows: Rows) -> None:
        if not rows.steps:
            return
        step, when = rows.steps[-1], rows.times[-1]
        for column in rows.columns:
            size, code = (4, "<f") if column.dtype == "f4" else (8, "<d")
            if len(column.data) != size * len(rows.steps):
                continue  # not what the message says it is: no value is better than a wrong one
            (value,) = struct.unpack(code, column.data[-size:])
            self.metrics[column.name] = LastValue(step=step, time=when, value=value, incarnation=rows.incarnation)
        state = self.state
        if state and (rows.incarnation, step) > (state.incarnation, state.step):
            self._change_state(step=step, step_time=when, incarnation=rows.incarnation)

    def _take_event(self, event: Event) -> None:
        match event:
            case StateChanged():
                self._change_state(
                    state=event.state, since=event.time, reason=event.reason, attempt=event.attempt, step=event.step
                )
            case RolledBack():
                self._change_state(step=event.step, step_time=event.time, incarnation=event.incarnation)
            case CommandUpdate():
                self._take_command(event)
            case CheckpointSaved():
                self._take_checkpoint(event)
            case CheckpointRemoved():
                self._take_removal(event)
            case RankChanged() if event.rank in self.ranks:
                self.ranks[event.rank] = msgspec.structs.replace(self.ranks[event.rank], state=event.state)
            case NodeChanged() if event.node in self.nodes and event.state in {"alive", "lost"}:
                self.nodes[event.node] = msgspec.structs.replace(self.nodes[event.node], state=event.state)
            case _:
                pass  # the line in the log is all there is to it

    def _change_state(self, **changes: object) -> None:
        if self.state is not None:
            self.state = msgspec.structs.replace(self.state, **changes)

    def _take_command(self, update: CommandUpdate) -> None:
        if update.state not in FINAL_COMMAND_STATES:
            if update.id not in self._settled:
                self.commands[update.id] = update
            return
        self._settled[update.id] = None
        if len(self._settled) > EVENTS_KEPT:
            del self._settled[next(iter(self._settled))]
        self.commands.pop(update.id, None)
        if update.command == "set" and update.state == "applied" and self.info is not None:
            name = update.args.get("name")
            self.info = msgspec.structs.replace(
                self.info,
                tunables=[
                    msgspec.structs.replace(tunable, value=update.after) if tunable.name == name else tunable
                    for tunable in self.info.tunables
                ],
            )

    def _take_checkpoint(self, saved: CheckpointSaved) -> None:
        known = {info.id: info for info in self.checkpoints}
        if saved.error is not None and saved.id not in known:
            return  # it never became one
        before = known.get(saved.id)
        known[saved.id] = CheckpointInfo(
            id=saved.id,
            step=before.step if before else saved.step,
            time=before.time if before else saved.time,
            bytes=saved.bytes or (before.bytes if before else 0),
            incarnation=before.incarnation if before else saved.incarnation,
            metrics=saved.metrics or (before.metrics if before else {}),
            pinned=saved.pinned,
            verified=saved.verified if saved.verified is not None else (before.verified if before else None),
            where=before.where if before else "disk",
            note=saved.note or (before.note if before else None),
            in_memory=before.in_memory if before else False,
        )
        self.checkpoints = sorted(known.values(), key=order_of)

    # --- asking

    @property
    def name(self) -> str:
        """The run's name, or an empty text before the first snapshot."""
        return self.info.run if self.info else ""

    @property
    def ended(self) -> bool:
        """Whether the run is in a state that it does not leave by itself."""
        return self.state is not None and self.state.state in FINAL_STATES

    def _take_removal(self, removed: CheckpointRemoved) -> None:
        """Deleted is what is on disk: a state in the ranks' memory stays there."""
        self.checkpoints = [
            info
            if info.id != removed.id
            else msgspec.structs.replace(info, where="memory", pinned=False, verified=None)
            for info in self.checkpoints
            if info.id != removed.id or info.in_memory
        ]

    @property
    def best_checkpoint(self) -> CheckpointInfo | None:
        """The best by the run's own metric and mode."""
        return pick(self.checkpoints, "best", self.info.best_by if self.info else None)

    @property
    def total_steps(self) -> int | None:
        if self.state and self.state.total_steps is not None:
            return self.state.total_steps
        return self.info.total_steps if self.info else None

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at the present pace; None when that is not known or the run does not move."""
        state, total = self.state, self.total_steps
        if (
            state is None
            or total is None
            or not state.steps_per_s
            or self.ended
            or state.state in {"paused", "stalled"}
        ):
            return None
        return max(0, total - state.step) / state.steps_per_s

    def source_time(self, now: float | None = None) -> float:
        """The source's wall clock at `now` (on this model's clock), as well as it is known."""
        if self.link == "recorded" or self._source_time is None:
            return time.time()  # files, or nothing heard yet: the clocks are taken to agree
        return self._source_time + ((self.clock() if now is None else now) - self._source_heard)

    def age_of(self, source_time: float, now: float | None = None) -> float:
        """Seconds since something that the source dated `source_time`; never negative."""
        return max(0.0, self.source_time(now) - source_time)

    def age_s(self, now: float | None = None) -> float | None:
        """Seconds since the run last gave a sign of life; None before the first."""
        if self.link == "recorded":
            return None if self.state is None else self.age_of(max(self.state.since, self.state.step_time))
        if self.heard_monotonic is None:
            return None
        return max(0.0, (self.clock() if now is None else now) - self.heard_monotonic)

    def rank_age_s(self, rank: int, now: float | None = None) -> float | None:
        """Seconds since a rank's figures were new; its own node's clock plays no part once we have heard it live."""
        return self._age_since(self._rank_heard.get(rank), self.ranks[rank].time if rank in self.ranks else None, now)

    def node_age_s(self, node: str, now: float | None = None) -> float | None:
        """Seconds since a node's agent was last heard of."""
        return self._age_since(self._node_heard.get(node), self.nodes[node].time if node in self.nodes else None, now)

    def metric_age_s(self, name: str, now: float | None = None) -> float | None:
        """Seconds since a metric was last logged."""
        last = self.metrics.get(name)
        return None if last is None else self.age_of(last.time, now)

    def _age_since(self, heard: float | None, dated: float | None, now: float | None) -> float | None:
        if self.link == "recorded":
            return None if dated is None else self.age_of(dated)
        return None if heard is None else max(0.0, (self.clock() if now is None else now) - heard)

    def values(self) -> dict[str, float | int | str | bool | None]:
        """What an expression may ask about: metrics by name, and `step state incarnation lr`."""
        found: dict[str, float | int | str | bool | None] = {name: last.value for name, last in self.metrics.items()}
        if self.state is not None:
            lr = self.state.lr.effective
            found |= {"step": self.state.step, "state": self.state.state, "incarnation": self.state.incarnation}
            found |= {"lr": lr} if lr is not None else {}
        return found
