"""What one rank knows of its run: shared by the public `Run`, the actions and the sender thread."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from trainctl.trainer.boundary import Boundary
from trainctl.trainer.buffer import RowBuffer
from trainctl.trainer.checkpoint import Checkpointer, PendingSave, Retention
from trainctl.trainer.drops import Told
from trainctl.trainer.feed import Feed
from trainctl.trainer.flops import FlopMeter
from trainctl.trainer.held_targets import HeldTargets
from trainctl.trainer.identity import RankIdentity, RunIdentity
from trainctl.trainer.overrides import Overrides
from trainctl.trainer.phases import Phases
from trainctl.trainer.ranges import DataRanges
from trainctl.trainer.reverts import Reverts
from trainctl.trainer.tunables import Tunables
from trainctl.wire.commands import Command
from trainctl.wire.messages import Anomaly, BestBy, Event, Note, RankPlace, RunStateName, Severity, Trouble

if TYPE_CHECKING:
    from trainctl.trainer.resumed import Resumed

log = logging.getLogger(__name__)

_BUSY: dict[str, RunStateName] = {"eval": "evaluating", "checkpoint": "checkpointing"}


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What the script gave at attach."""

    on_eval: Callable[[], Mapping[str, float] | None] | None = None
    on_rollback: Callable[[int], None] | None = None


@dataclass(frozen=True, kw_only=True)
class RunningSave:
    """A checkpoint that is being written; `command` asked for it, if any did."""

    id: str
    pending: PendingSave
    step: int
    incarnation: int
    metrics: dict[str, float]
    note: str | None = None
    command: Command | None = None
    actor: str = ""


@dataclass(frozen=True, kw_only=True)
class PromisedStop:
    """A stop met inside an evaluation: its checkpoint is made when that is over, and only then is it applied.

    `preempted`: why the machine is taken away; such a stop waits for nothing.
    """

    command: Command
    actor: str
    before: RunStateName
    preempted: str | None = None


@dataclass(kw_only=True)
class Hold:
    """A pause: since when, by whom, until when; the id of the command that was made to end it then."""

    since: float
    by: str
    resumes_at: float | None
    resuming: str = ""


@dataclass(kw_only=True)
class Core:
    """One rank's run. The training thread writes it; other threads read single attributes and use the deques."""

    place: RankIdentity
    identity: RunIdentity
    total_steps: int | None
    boundary: Boundary
    buffer: RowBuffer
    phases: Phases
    tunables: Tunables
    callbacks: Callbacks
    models: Sequence[nn.Module] = ()
    overrides: Overrides | None = None
    feed: Feed | None = None
    flops: FlopMeter | None = None
    ranges: DataRanges = field(default_factory=DataRanges)
    checkpointer: Checkpointer | None = None
    incarnation: int = 1
    parent: int = 0  # the incarnation that this one goes on from, 0: from none
    counters: dict[str, Any] = field(default_factory=dict)
    capabilities: dict[str, bool | str] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)
    events: deque[Event] = field(default_factory=deque)
    reverts: Reverts = field(default_factory=Reverts)
    saves: list[RunningSave] = field(default_factory=list)
    saves_begun: int = 0
    newest_save: RunningSave | None = None
    retention: Retention | None = None  # None: nothing is ever deleted
    troubles: list[Trouble] = field(default_factory=list)  # as the hub says; replaced, never changed
    rollback_targets: HeldTargets = field(default_factory=HeldTargets)  # one is found and held under `deleting`
    deleting: threading.Lock = field(default_factory=threading.Lock)  # held for a rename at most, and never by training
    rank_places: list[RankPlace] = field(default_factory=list)
    hold: Hold | None = None
    doing: RunStateName | None = None
    ending: RunStateName | None = None
    ended_by: str | None = None
    last_save: PromisedStop | None = None  # a checkpoint that is still to be made before the run ends
    unreachable: str | None = None  # why no command can be agreed on at the moment
    held_s: float = 0.0  # how long boundaries inside the evaluation took
    preempted: str | None = None  # why the machine is taken away
    row_step: int = 1
    first_step: int = 0
    resumed_from: str | None = None
    resumed: "Resumed | None" = None  # until the loop begins
    resumed_tunables: dict[str, Any] = field(default_factory=dict)
    waiting_tunables: dict[str, Any] = field(default_factory=dict)  # set by operators of an earlier attempt
    steps_s: float = 0.0  # what all steps so far took together
    own_loss: float | None = None
    started: float = field(default_factory=time.time)
    _complained: set[str] = field(default_factory=set)
    tunables_changed: threading.Event = field(default_factory=threading.Event)
    steering_changed: threading.Event = field(default_factory=threading.Event)  # what operators set; written to disk

    @property
    def publishes(self) -> bool:
        return self.place.leads

    @property
    def best_by(self) -> BestBy:
        """What `best` means in this run."""
        return self.retention.best_by if self.retention is not None else BestBy()

    def event(self, event: Event) -> None:
        """Tell of something; only rank 0 speaks for the run."""
        if self.place.leads:
            self.events.append(event)

    def note(self, actor: str, text: str) -> None:
        """Tell of what belongs to a command and is no outcome of one."""
        step, incarnation = self.boundary.completed, self.incarnation
        self.event(Note(time=time.time(), step=step, incarnation=incarnation, actor=actor, text=text))

    def steered(self) -> None:
        """An operator's settings changed: they are written down and told."""
        self.steering_changed.set()
        self.tunables_changed.set()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log values for a given step, from the training thread."""
        if self.place.leads:
            self.buffer.log(step, dict(values))

    def complain(self, what: str, text: str, severity: Severity = "warning") -> None:
        """Something that is not as it should be: said once, in the log and to the operator."""
        if text in self._complained or len(self._complained) > 1000:
            return
        self._complained.add(text)
        self.tell(what, text, severity)

    def tell(self, what: str, text: str, severity: Severity = "warning", subject: str | None = None) -> None:
        """What may begin and end more than once: told each time."""
        log.warning("trainctl: %s", text)
        step, incarnation = self.boundary.completed, self.incarnation
        self.event(
            Anomaly(
                time=time.time(),
                step=step,
                incarnation=incarnation,
                what=what,
                text=text,
                severity=severity,
                subject=subject,
            )
        )

    def lost_telemetry(self, told: Told) -> None:
        """Telemetry began to be lost, or no longer is."""
        self.tell("dropped", told.text, told.severity, told.reason)

    def state(self) -> RunStateName:
        """What this rank is doing, in the run's words."""
        if self.hold is not None:
            return "paused"
        if self.doing is not None:
            return self.doing
        if (busy := self.phases.busy()) is not None:
            return _BUSY[busy]
        return "starting" if self.boundary.completed == self.first_step else "running"
