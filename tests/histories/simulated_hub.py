"""The hub's desk, its rules and its audit log in simulated time, and the operators who talk to it."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from history import Told
from simulated_job import SimulatedJob
from simulated_time import WALL, Process, World, drive

from trainctl.hub.desk import CommandDesk
from trainctl.hub.recorder import Recorder
from trainctl.store.audit import AuditLog
from trainctl.store.record import RunRecord
from trainctl.wire.commands import FINAL_COMMAND_STATES, Command
from trainctl.wire.keys import Actor
from trainctl.wire.messages import (
    STREAMS,
    Body,
    CommandReply,
    CommandUpdate,
    Envelope,
    LinkCancel,
    LinkCommand,
    RunInfo,
    StateChanged,
    Tunable,
    stream_of,
)
from trainctl.wire.rundir import RunDir
from trainctl.wire.server import Caller

ASK_AGAIN_S = 2.0
GIVE_UP_S = 60.0
HUB_BACK_S = (0.2, 1.5)


@dataclass
class Disk:
    """What outlives a hub."""

    directory: Path
    journal: list[Envelope] = field(default_factory=list)

    @property
    def audit(self) -> Path:
        return RunDir(self.directory).audit_file


class Operator:
    """Sends commands, asks again with the same id until there is an outcome, writes down what it is told."""

    def __init__(self, world: World, name: str, hub: Callable[[], "SimulatedHub | None"]) -> None:
        self.world = world
        self.name = name
        self.told: list[Told] = []
        self.cut_until = 0.0
        self._hub = hub
        self._newest: dict[str, str] = {}
        self._arrives = 0.0

    def send(self, command: Command, until: float | None = None) -> None:
        now = self.world.now
        until = now + GIVE_UP_S if until is None else until
        if self._newest.get(command.id) in FINAL_COMMAND_STATES or now > until:
            return
        hub = self._hub()
        if hub is not None and now >= self.cut_until:
            self._arrives = max(self._arrives, now + self.world.dice.uniform(0.0001, 0.002))
            self.world.at(self._arrives, lambda: hub.request(command, self))
        self.world.at(now + ASK_AGAIN_S, lambda: self.send(command, until))

    def hear(self, update: CommandUpdate) -> None:
        if self.world.now < self.cut_until or self._newest.get(update.id) == update.state:
            return
        self._newest[update.id] = update.state
        self.told.append(
            Told(operator=self.name, id=update.id, state=update.state, step=update.step, after=update.after)
        )


class Doors:
    """In place of the hub's server: numbers bodies and delivers replies, in order."""

    def __init__(self, hub: "SimulatedHub", heads: dict[str, int]) -> None:
        self._hub = hub
        self._heads = dict.fromkeys(STREAMS, 0) | heads
        self._arrives = 0.0
        self.waiting: dict[bytes, Operator] = {}

    def number(self, body: Body, *, attempt: int = 0, link: int = 0) -> tuple[Envelope, bytes]:
        stream = stream_of(body)
        self._heads[stream] += 1
        envelope = Envelope(
            source="t",
            epoch=1,
            stream=stream,
            seq=self._heads[stream],
            time=WALL + self._hub.world.now,
            body=body,
            attempt=attempt,
            link=link,
        )
        self._hub.disk.journal.append(envelope)
        return envelope, b""

    def send(self, envelope: Envelope, encoded: bytes) -> None:
        """Nobody subscribes here."""

    def reply(self, caller: Caller, reply: CommandReply) -> None:
        hub, world = self._hub, self._hub.world
        operator = self.waiting[caller.route]
        self._arrives = max(self._arrives, world.now + world.dice.uniform(0.0001, 0.002))
        update = reply.update
        world.at(self._arrives, lambda: operator.hear(update) if hub.process.alive else None)


class Kept:
    """In place of the journal's keeper, and of the hub's claim to write: always there."""

    def append(self, encoded: bytes, stream: str, seq: int, link: int, attempt: int) -> None:
        """The doors kept it already."""

    def held(self) -> bool:
        return True


class NoEndings:
    """In place of what ends ranks through the agents: there are none here."""

    def refusal(self, _: object) -> str:
        return "there are no agents"

    def of(self, _attempt: int) -> None:
        """Nobody asked for a restart."""


class SimulatedHub:
    """One hub process. It reads what the one before left."""

    def __init__(self, world: World, disk: Disk, job: SimulatedJob) -> None:
        self.world = world
        self.disk = disk
        self.job = job
        self.process = Process("hub")
        self.mail: deque[tuple[int, CommandUpdate] | None] = deque()
        self.linked = False
        self.ended = False
        self.busy = 0
        self.record = RunRecord(_info(disk.directory, job.world_size))
        for envelope in disk.journal:
            self.record.apply(envelope)
        self._restored = bool(disk.journal)
        self.doors = Doors(self, self.record.heads)
        self._recorder = Recorder(record=self.record, keeper=Kept(), server=self.doors, ownership=Kept())  # type: ignore[arg-type]
        self.desk = CommandDesk(
            recorder=self._recorder,
            server=self.doors,  # type: ignore[arg-type]
            audit=AuditLog(disk.audit),
            run_dir=RunDir(disk.directory),
            line=self,  # type: ignore[arg-type]
            endings=NoEndings(),  # type: ignore[arg-type]
        )
        world.spawn(self.process, "link", self._listen)
        world.spawn(self.process, "clock", self._tick)

    def request(self, command: Command, operator: Operator) -> None:
        if self.process.alive:
            self.doors.waiting[operator.name.encode()] = operator
            caller = Caller(route=operator.name.encode(), req=1, actor=Actor(name=operator.name, role="admin"))
            self.world.spawn(self.process, "request", lambda: self._do(command, caller))

    def _do(self, command: Command, caller: Caller) -> None:
        self.busy += 1
        drive(self.desk.do(command, caller))
        self.busy -= 1

    def send(self, message: LinkCommand | LinkCancel) -> bool:
        """To rank 0, as `RankLine` does."""
        if self.linked:
            self.world.at(self.world.now + 0.0001, lambda: self.job.inbox.append(message))
        return self.linked

    def _listen(self) -> None:
        if self._restored:
            self.desk.restore()
        else:
            self._become("running")
        rank_0 = self.job.ranks[0].process
        while not self.ended:
            self.world.wait(lambda: bool(self.mail) or not rank_0.alive, None)
            if not self.mail:
                self.world.sleep(0.3)
                if not self.mail:
                    self._end("lost", "rank 0 died without a word", ended=False)
                    return
            item = self.mail.popleft()
            if item is None:
                self._end("stopped", "the run is stopped", ended=True)
            elif item[0] > self.record.link_have(1):
                self.desk.hear(item[1], attempt=1, link=item[0])

    def _end(self, state: Any, reason: str, *, ended: bool) -> None:
        self.ended = True
        self.linked = False
        self._become(state)
        self.desk.rank_gone(reason, ended=ended)

    def _become(self, state: Any) -> None:
        self._recorder.take(StateChanged(time=WALL + self.world.now, step=0, incarnation=1, state=state, attempt=1))

    def welcome(self) -> int:
        """Rank 0 links; return the newest number of its records that is here."""
        self.linked = True
        self.desk.rank_came(new_attempt=False)
        return self.record.link_have(1)

    def _tick(self) -> None:
        while True:
            self.world.sleep(1.0)
            self.desk.tick(WALL + self.world.now)
            if self._settled():
                self.world.sleep(1.0)
                if self._settled():  # nobody asked again meanwhile
                    self.world.finish()

    def _settled(self) -> bool:
        at_rest = not self.record.pending and not self.desk._orphans and not self.busy
        return self.ended and self.job.over() and at_rest and self.world.now > self.job.calm_at


class RankLink:
    """Rank 0's end: numbers what it tells, says it again to a hub that came back, starts a hub that died."""

    def __init__(self, world: World, job: SimulatedJob, disk: Disk) -> None:
        self.world = world
        self.job = job
        self.disk = disk
        self.hub: SimulatedHub | None = None
        self._known: SimulatedHub | None = None
        self._kept: list[tuple[int, CommandUpdate]] = []
        self._next = 1
        self._said_bye = False
        self._starting = False
        world.spawn(job.ranks[0].process, "sender", self._run)

    def _run(self) -> None:
        while True:
            self.world.wait(lambda: bool(self.job.inbox), self.world.dice.uniform(0.2, 1.0) * self.job.pace_s)
            bye = self.job.said_bye
            told = [(self._next + number, update) for number, update in enumerate(self.job.tick())]
            self._next += len(told)
            self._kept += told
            hub = self._connected()
            if hub is None:
                continue
            if hub is not self._known:
                have = hub.welcome()
                self._known, self._said_bye = hub, False
                told = [item for item in self._kept if item[0] > have]
            hub.mail.extend(told)
            if bye and not self._said_bye:
                self._said_bye = True
                hub.mail.append(None)

    def _connected(self) -> SimulatedHub | None:
        if self.hub is not None and self.hub.process.alive:
            return self.hub if self.hub.process.stopped_until <= self.world.now or self.hub is self._known else None
        if not self._starting:
            self._starting = True
            self.world.at(self.world.now + self.world.dice.uniform(*HUB_BACK_S), self._start)
        return None

    def _start(self) -> None:
        self._starting = False
        if self.job.ranks[0].process.alive:
            self.hub = SimulatedHub(self.world, self.disk, self.job)


def _info(directory: Path, ranks: int) -> RunInfo:
    able = dict.fromkeys(("pause", "lr", "set", "checkpoint", "rollback", "stop", "eval"), True)
    return RunInfo(
        run="t",
        id="t",
        dir=str(directory),
        host="n",
        created=WALL,
        started=WALL,
        world_size=ranks,
        capabilities=dict(able),
        tunables=[Tunable(name=name, value=0, kind="int") for name in ("x", "y")],
    )
