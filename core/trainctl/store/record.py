"""A run as told by its envelopes: the same code for the hub while it lives and for whoever opens the recording.

`RunRecord` does no I/O; `load_record` (replay.py) reads a run's directory into one.
"""

from collections import deque
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from trainctl.store.blocks import Block
from trainctl.store.epochs import EpochBegins
from trainctl.store.event_pages import Page, Place, Places
from trainctl.store.frames import Damage
from trainctl.store.history import history
from trainctl.store.links import LinkHeads
from trainctl.store.metrics import MetricStore
from trainctl.store.packed import Sealed
from trainctl.store.saved import SavedRun
from trainctl.wire.commands import FINAL_COMMAND_STATES
from trainctl.wire.manifest import list_checkpoints
from trainctl.wire.messages import (
    FINAL_STATES,
    STREAMS,
    CheckpointInfo,
    CheckpointSaved,
    CommandUpdate,
    Envelope,
    Event,
    Events,
    EventsRequest,
    History,
    HistoryRequest,
    LastValue,
    NodeReading,
    RankFigures,
    Ranks,
    RolledBack,
    Rows,
    RunInfo,
    RunState,
    Snapshot,
    SnapshotRequest,
    StateChanged,
)
from trainctl.wire.rundir import RunDir

EVENTS_KEPT = 20_000
SETTLED_COMMANDS_KEPT = 5_000


class RunRecord:
    """Everything that is known of one run. `apply` takes its envelopes in order; the rest answers questions."""

    def __init__(self, info: RunInfo) -> None:
        self.info = info
        self.state = RunState(
            state="starting",
            since=info.started,
            step=0,
            step_time=info.started,
            total_steps=info.total_steps,
            attempt=info.attempt,
        )
        self.heads: dict[str, int] = dict.fromkeys(STREAMS, 0)
        self.epochs: dict[str, int] = {}
        self.metrics = MetricStore(RunDir(Path(info.dir)).journal)
        self.ranks: dict[int, RankFigures] = {}
        self.nodes: dict[str, NodeReading] = {}
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.events_forgotten = 0  # older ones, that are in the journal only
        self.commands: dict[str, CommandUpdate] = {}
        self.metric_epochs = EpochBegins()
        self.damage = list[Damage]()
        self.last_time = info.started
        self._places = Places(EVENTS_KEPT)
        self._links = LinkHeads()
        self._checkpoint_incarnations: dict[str, int] = {}
        self._settled: deque[str] = deque()
        self.forgets = False  # commands that were settled long ago are in the audit log only
        self._directory = Path(info.dir)

    # --- being told

    def apply(self, envelope: Envelope) -> None:
        """Take one envelope. One that is not newer than its stream's head is ignored: it was taken before.

        A newer epoch begins wherever its hub knew the stream to end. What rank 0 sent to a hub that was being replaced
        and then again to the next one is the same by its `link`, and counts once.
        """
        epoch = self.epochs.get(envelope.stream, 0)
        if (envelope.epoch, envelope.seq) <= (epoch, self.heads.get(envelope.stream, 0)):
            return
        self.heads[envelope.stream], self.epochs[envelope.stream] = envelope.seq, envelope.epoch
        if self._links.repeats(envelope.attempt, envelope.stream, envelope.link):
            return
        self.last_time = max(self.last_time, envelope.time)
        self._links.note(envelope.attempt, envelope.stream, envelope.link)
        match envelope.body:
            case Rows() as rows:
                self._apply_rows(rows, envelope)
            case Ranks(ranks=ranks):
                self.ranks.update({figures.rank: figures for figures in ranks})
            case NodeReading() as reading:
                self.nodes[reading.node] = reading
            case event:
                self._apply_event(event, (envelope.epoch, envelope.seq))

    def apply_block(self, block: Block, place: Sealed) -> None:
        """Take packed rows; what was taken before is skipped."""
        packed, known, epoch = block.packed, self.heads.get("metrics", 0), self.epochs.get("metrics", 0)
        newest = known if packed.epoch == epoch else 0 if packed.epoch > epoch else place.last
        self.metrics.add_block(block, newest, self._links.head(packed.attempt, "metrics"))
        self.metrics.seal(place)
        if place.last <= newest:
            return
        self.metric_epochs.note(packed.epoch, place.seqs[0], packed.incarnation, int(block.steps.max()))
        self.heads["metrics"], self.epochs["metrics"] = place.last, packed.epoch
        self.last_time = max(self.last_time, packed.time)
        self._links.note(packed.attempt, "metrics", packed.link)
        lr: dict[str, float] = {
            name: float(values[-1])
            for name in ("lr", "lr_scheduled")
            if name in block.names and len(values := block.metric(name)[2])
        }
        newest_row = _newest_row(block.steps)
        at = float(block.times[newest_row])
        self._advance(int(block.steps[newest_row]), at, packed.incarnation, packed.attempt, lr)

    def seal(self, places: Iterable[Sealed]) -> None:
        """These rows were packed: their values are read from there from now on."""
        for place in places:
            self.metrics.seal(place)

    def save(self, segments: list[tuple[int, int]], gone: dict[str, int]) -> SavedRun:
        """Everything that replaying built. The packed `segments` need not be replayed again; of each stream they, and
        nothing else, hold the envelopes up to the number in `gone`."""
        newest = max((number for number, _ in segments), default=0)
        return SavedRun(
            segments=segments,
            gone=gone,
            state=self.state,
            heads=dict(self.heads),
            epochs=dict(self.epochs),
            last_time=self.last_time,
            links=self._links.saved(),
            ranks=dict(self.ranks),
            nodes=dict(self.nodes),
            events=list(self.events),
            event_places=self._places.saved(),
            events_forgotten=self.events_forgotten,
            metric_epochs=self.metric_epochs.saved(),
            commands=list(self.commands.values()),
            settled=list(self._settled),
            checkpoint_incarnations=dict(self._checkpoint_incarnations),
            damage=[damage for damage in self.damage if damage.segment <= newest and not damage.why],
            metrics=self.metrics.save(),
        )

    def restore(self, saved: SavedRun) -> None:
        """Be, in a record that is empty, what was saved. Raises ValueError, KeyError or IndexError for what nobody
        saved like this, and then is as empty as before."""
        metrics, links = MetricStore(RunDir(self._directory).journal), LinkHeads(saved.links)
        metrics.restore(saved.metrics)
        places = Places(EVENTS_KEPT)
        head = saved.epochs.get("events", 0), saved.heads.get("events", 0)
        places.restore(saved.event_places, len(saved.events), head)
        self._places, self.events_forgotten = places, saved.events_forgotten
        self.metrics, self._links = metrics, links
        reached = ((track.incarnation, track.last_step) for track in saved.metrics.tracks)
        self.metric_epochs.restore(saved.metric_epochs, saved.epochs.get("metrics", 0), reached)
        self.state, self.last_time = saved.state, saved.last_time
        self.heads |= saved.heads
        self.epochs |= saved.epochs
        self.ranks, self.nodes = dict(saved.ranks), dict(saved.nodes)
        self.events.extend(saved.events)
        self.commands = {update.id: update for update in saved.commands}
        self._settled = deque(saved.settled)
        self.forgets = len(self._settled) >= SETTLED_COMMANDS_KEPT
        self._checkpoint_incarnations = dict(saved.checkpoint_incarnations)
        self.damage.extend(saved.damage)

    def progress(self, state: RunState) -> None:
        """What is true now, from whoever knows it first hand."""
        self.state = state

    def _apply_rows(self, rows: Rows, envelope: Envelope) -> None:
        self.metrics.add(rows, envelope.seq, envelope.epoch)
        if rows.steps:
            self.metric_epochs.note(envelope.epoch, envelope.seq, rows.incarnation, max(rows.steps))
            newest = _newest_row(np.array(rows.steps, "i8"))
            self._advance(rows.steps[newest], rows.times[newest], rows.incarnation, rows.attempt, _last_lr(rows))

    def _advance(self, step: int, at: float, incarnation: int, attempt: int, lr: dict[str, float]) -> None:
        # What other ranks read of a step comes up to seconds after it, and says nothing of where the run is.
        if (incarnation, step) < (self.state.incarnation, self.state.step):
            return
        self.state = msgspec.structs.replace(
            self.state,
            step=step,
            step_time=at,
            incarnation=incarnation,
            attempt=max(self.state.attempt, attempt),
            lr=msgspec.structs.replace(self.state.lr, scheduled=lr.get("lr_scheduled", lr["lr"]), effective=lr["lr"])
            if "lr" in lr
            else self.state.lr,
        )

    def found(self, event: Event) -> None:
        """Take an event that nobody published: what whoever reads a recording has to say of it."""
        self._keep(event, self._places.behind)

    def _keep(self, event: Event, place: Place) -> None:
        self.events_forgotten += len(self.events) == self.events.maxlen
        self.events.append(event)
        self._places.add(place)

    def _apply_event(self, event: Event, place: Place) -> None:
        self._keep(event, place)
        match event:
            case StateChanged():
                self._apply_state(event)
            case CommandUpdate():
                self._apply_command(event)
            case CheckpointSaved(error=None):
                self._checkpoint_incarnations.setdefault(event.id, event.incarnation)
            case RolledBack():
                parent = event.parent
                if parent is None:
                    parent = self._checkpoint_incarnations.get(event.checkpoint, event.from_incarnation)
                self.metrics.begin(event.incarnation, after_step=event.step, parent=parent)
                self.state = msgspec.structs.replace(
                    self.state, step=event.step, step_time=event.time, incarnation=event.incarnation
                )
            case _:
                pass

    def _apply_state(self, event: StateChanged) -> None:
        if event.state == "starting":
            self.metrics.begin(event.incarnation, after_step=event.step, parent=event.parent)
            if event.attempt > self.state.attempt:
                # Ranks and nodes of the attempt before may be other ones.
                self.ranks.clear()
                self.nodes.clear()
        self.state = msgspec.structs.replace(
            self.state,
            state=event.state,
            since=event.time,
            step=event.step,
            incarnation=event.incarnation,
            attempt=event.attempt,
            reason=event.reason,
            by=None,
            resumes_at=None,
            paused_since=self.state.paused_since if event.state == "paused" else None,
        )

    def _apply_command(self, update: CommandUpdate) -> None:
        before = self.commands.get(update.id)
        if before is not None and before.state in FINAL_COMMAND_STATES and before.state != "unknown":
            return  # the first outcome stands
        self.commands[update.id] = update
        if update.state in FINAL_COMMAND_STATES and (before is None or before.state != "unknown"):
            self._settled.append(update.id)
            if len(self._settled) > SETTLED_COMMANDS_KEPT:
                self.commands.pop(self._settled.popleft(), None)
                self.forgets = True

    # --- answering

    def link_have(self, attempt: int) -> int:
        """The newest number of rank 0's own counting that is recorded of an attempt, 0 if none is."""
        return self._links.have(attempt)

    def knows(self, attempt: int) -> bool:
        """Whether the newest attempt is this one, and its beginning is recorded."""
        began = any(isinstance(event, StateChanged) for event in self.events)
        return attempt == self.state.attempt and (began or self.link_have(attempt) > 0)

    @property
    def pending(self) -> list[CommandUpdate]:
        """Commands that were accepted and have no outcome yet, oldest first."""
        return [update for update in self.commands.values() if update.state not in FINAL_COMMAND_STATES]

    @property
    def last_values(self) -> dict[str, LastValue]:
        """The value of every metric that came last."""
        return {name: last for name in self.metrics.names if (last := self.metrics.latest(name)) is not None}

    @property
    def in_memory(self) -> list[CheckpointInfo]:
        """States that the ranks have in memory: none once they are gone."""
        return [] if self.state.state in FINAL_STATES else self.state.in_memory

    def checkpoints(self) -> list[CheckpointInfo]:
        """The checkpoints in the run's directory now (this reads the directory)."""
        return list_checkpoints(RunDir(self._directory).checkpoints)

    def snapshot(self, request: SnapshotRequest, checkpoints: list[CheckpointInfo] | None = None) -> Snapshot:
        """Everything needed for a first picture. Without `checkpoints` they are looked up on disk."""
        return Snapshot(
            req=request.req,
            info=self.info,
            state=self.state,
            heads=dict(self.heads),
            metrics=self.last_values,
            ranks=[self.ranks[rank] for rank in sorted(self.ranks)],
            nodes=[self.nodes[node] for node in sorted(self.nodes)],
            checkpoints=self.checkpoints() if checkpoints is None else checkpoints,
            events=_newest(self.events, min(request.events, 2000)),
            commands=self.pending,
        )

    def history(self, request: HistoryRequest) -> History:
        """Values or rollups of metrics, cut where the answer would pass the size limit."""
        return history(self.metrics, request)

    def events_page(self, request: EventsRequest) -> Events:
        """The newest `limit` events that match and are in memory, oldest first."""
        page = Page(request)
        page.add(zip(reversed(self._places), reversed(self.events), strict=True))
        return page.end(self.oldest_event if self.events_forgotten else None)

    @property
    def oldest_event(self) -> Place:
        """Where the oldest event in memory stands; there has to be one."""
        return self._places.first

    def wants_older(self, request: EventsRequest) -> bool:
        """Whether a request is about events that are in the journal only (`OlderEvents`)."""
        before = request.before
        return before is not None and self.events_forgotten > 0 and (before.epoch, before.seq) <= self.oldest_event


def _newest_row(steps: NDArray[np.int64]) -> int:
    """Of the highest step; of several such the last."""
    return len(steps) - 1 - int(np.argmax(steps[::-1]))


def _last_lr(rows: Rows) -> dict[str, float]:
    """The learning rate of the last of these rows; without a scheduled one the effective is all there is."""
    return {
        column.name: float(np.frombuffer(column.data, f"<{column.dtype}")[-1])
        for column in rows.columns
        if column.name in {"lr", "lr_scheduled"} and len(column.data) == int(column.dtype[1]) * len(rows.steps)
    }


def _newest(events: "deque[Event]", limit: int) -> list[Event]:
    return list(islice(reversed(events), max(0, limit)))[::-1]
