"""A job of several ranks in simulated time: the trainer's own agreement, over a store that can be slow, cut or dead."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from history import Applied, Fate, Kept, RankRecord
from simulated_time import WALL, Process, World
from torch.distributed import DistNetworkError

from trainctl.trainer import evaluation
from trainctl.trainer.actions import Actions, Staged, refusal
from trainctl.trainer.agreement import Outcome, Proposal, Seal, in_two_phases
from trainctl.trainer.boundary import Armed, Boundary
from trainctl.trainer.buffer import RowBuffer
from trainctl.trainer.checkpoint import CheckpointError
from trainctl.trainer.control import Control, InDoubt
from trainctl.trainer.core import Callbacks, Core
from trainctl.trainer.identity import RankIdentity, RunIdentity
from trainctl.trainer.leader import Leader, Prepared
from trainctl.trainer.meeting import Connection
from trainctl.trainer.overrides import Overrides
from trainctl.trainer.phases import Phases
from trainctl.trainer.sender import Sender
from trainctl.trainer.tunables import Tunables, TunableValue
from trainctl.wire.commands import Command, Evaluate, Rollback, Stop
from trainctl.wire.messages import CommandUpdate, LinkCancel, LinkCommand, Note, Scalar

LEAVE_S = 3.0
LEADING = -1
Trap = Callable[[int, str, str], None]


class SimulatedStore:
    """What all ranks reach: a dictionary, slow now and then, cut off for some, or gone."""

    def __init__(self, world: World, slow: float) -> None:
        self.world = world
        self.slow = slow
        self.values: dict[str, bytes] = {}
        self.cut_until: dict[int, float] = {}
        # By rank, or `LEADING` for the one of rank 0's leader: connections are reset, and cannot be made anew.
        self.refused_until: dict[int, float] = {}
        self.dead = False
        self.trap: Trap | None = None
        self.taken_away: set[str] = set()
        self.missed: list[str] = []  # what was asked of a key that was taken away before

    def reaches(self, rank: int) -> bool:
        return self.cut_until.get(rank, 0.0) <= self.world.now

    def refuses(self, line: int) -> bool:
        return self.refused_until.get(line, 0.0) > self.world.now


class StoreView:
    """One rank's connection: the calls of `torch.distributed.Store` that trainctl makes. A cut blocks, as TCP does."""

    def __init__(self, store: SimulatedStore, rank: int, line: int) -> None:
        self._store = store
        self._rank = rank
        self._line = line

    def set(self, key: str, value: bytes) -> None:
        self._call("set", key, lambda: self._store.values.__setitem__(key, bytes(value)))

    def get(self, key: str) -> bytes:
        found: bytes = self._call("get", key, lambda: self._read(key))
        return found

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        found: list[bytes] = self._call("get", keys[0], lambda: [self._read(key) for key in keys])
        return found

    def compare_set(self, key: str, expected: str, value: bytes) -> bytes:
        found: bytes = self._call("decide", key, lambda: self._decide(key, bytes(value)))
        return found

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._call("check", keys[0], lambda: all(key in self._store.values for key in keys)))

    def delete_key(self, key: str) -> bool:
        return bool(self._call("delete", key, lambda: self._take_away(key)))

    def _read(self, key: str) -> bytes:
        """A store lets whoever reads a key that is not there wait for it; in here that is what must not happen."""
        if key not in self._store.values:
            self._store.missed.append(f"rank {self._rank} reads {key}, which is not there")
        return self._store.values.get(key, b"")

    def _decide(self, key: str, value: bytes) -> bytes:
        if key in self._store.taken_away:
            self._store.missed.append(f"rank {self._rank} decides {key} once more, after it was taken away")
        return self._store.values.setdefault(key, value)

    def _take_away(self, key: str) -> bool:
        self._store.taken_away.add(key)
        return self._store.values.pop(key, None) is not None

    def wait(self, keys: Sequence[str], timeout: Any) -> None:
        store = self._store

        if gone := store.taken_away.intersection(keys):
            store.missed.append(f"rank {self._rank} waits for {gone}, which are taken away")

        def there() -> bool:
            return (
                store.dead or self._reset() or (store.reaches(self._rank) and all(key in store.values for key in keys))
            )

        if not store.world.wait(there, timeout.total_seconds()) or store.dead:
            raise RuntimeError("wait timeout" if not store.dead else "connection was closed")
        if self._reset():
            raise DistNetworkError("connection reset by peer")
        self._spring("wait", keys[0])

    def _call(self, kind: str, key: str, effect: Callable[[], Any]) -> Any:
        world = self._store.world
        self._spring(f"before {kind}", key)
        self._travel()
        result = effect()
        self._spring(f"after {kind}", key)
        self._travel()
        world.hiccup()
        return result

    def _travel(self) -> None:
        store, dice = self._store, self._store.world.dice
        store.world.sleep(dice.uniform(0.00005, 0.0003) if dice.random() > store.slow else dice.uniform(0.001, 0.3))
        if not store.reaches(self._rank):
            store.world.wait(lambda: store.dead or store.reaches(self._rank), None)
        if store.dead:
            raise RuntimeError("connection was closed")
        if self._reset():
            raise DistNetworkError("connection reset by peer")

    def _reset(self) -> bool:
        return self._store.refuses(self._line)

    def _spring(self, moment: str, key: str) -> None:
        if self._store.trap is not None:
            self._store.trap(self._rank, moment, key)


class SimulatedConnection(Connection):
    def __init__(self, store: SimulatedStore, rank: int, *, leads: bool = False) -> None:
        line = LEADING if leads else rank
        self._store = StoreView(store, rank, line)  # type: ignore[assignment]
        self._prefix, self._seal = "", Seal(b"secret", 1)
        self._reopen = lambda: self._anew(store, rank, line)

    def _anew(self, store: SimulatedStore, rank: int, line: int) -> Any:
        store.world.sleep(0.001)
        if store.dead or store.refuses(line):
            raise OSError("connection refused")
        return StoreView(store, rank, line)


class SimulatedControl(Control):
    """Its thread is a task."""

    world: World
    begun = False
    over = False
    doubted_s: float | None = None  # how long it held before it gave up

    def going(self, armed: Armed) -> bool:
        return self._timed(lambda: super(SimulatedControl, self).going(armed))

    def together(self, armed: Armed) -> bool:
        try:
            return super().together(armed)
        except InDoubt:  # while the store answers it waits for the others, and is in no doubt
            assert self.gathering is not None
            self.doubted_s = self.world.now - self.gathering.heard
            raise

    def _timed(self, waiting: Callable[[], bool]) -> bool:
        began = self.world.now
        try:
            return waiting()
        except InDoubt:
            self.doubted_s = self.world.now - began
            raise

    def is_alive(self) -> bool:
        return self.begun and not self.over

    def join(self, timeout: float | None = None) -> None:
        self.world.wait(lambda: self.over, timeout)

    def live(self) -> None:
        self.run()
        self.over = True


class RecordingActions(Actions):
    """Writes down what is applied, as it is applied."""

    applied: list[Applied]
    kept: list[Kept]
    now: Callable[[], float]
    _stop: Proposal | None = None
    _asked: Proposal | None = None  # the evaluation that an operator asked for, while it runs
    _whole: bool = False

    def _apply(self, proposal: Proposal, staged: Staged) -> Outcome:
        step = self._core.boundary.completed
        outcome = super()._apply(proposal, staged)
        self._stop = proposal if isinstance(proposal.command.action, Stop) else self._stop
        if outcome.ok and not (outcome.pending and isinstance(proposal.command.action, Evaluate | Stop)):
            self._record(proposal, outcome.step, outcome.after)
            assert outcome.step == step or isinstance(proposal.command.action, Rollback)
        return outcome

    def _two_phases(self, armed: Armed) -> Outcome:
        reverts, boundary = self._core.reverts, self._core.boundary
        before = reverts.steps_left(0)
        outcome = super()._two_phases(armed)
        self.kept += [
            Kept(id=name, step=boundary.completed, incarnation=self._core.incarnation, behind=len(self.applied))
            for name in before
            if not outcome.ok and reverts.get(name) is None
        ]
        return outcome

    def _evaluate(self, proposal: Proposal) -> bool:
        self._asked, self._whole = proposal, False
        complete = super()._evaluate(proposal)
        if self._whole:  # behind what was met at its end, of the batches that this rank does not have
            self._record(proposal, self._core.boundary.completed, None)
        self._asked = None
        return complete

    @property
    def asked(self) -> bool:
        return self._asked is not None

    def evaluated(self) -> None:
        """This rank's own part is done, and whole."""
        self._whole = self._asked is not None and self._core.ending is None

    def settle_stop(self) -> Outcome | None:
        outcome = super().settle_stop()
        if outcome is not None and outcome.ok:
            assert self._stop is not None
            self._record(self._stop, outcome.step, outcome.after)
        return outcome

    def _record(self, proposal: Proposal, step: int, after: Scalar) -> None:
        incarnation = self._core.incarnation
        self.applied.append(
            Applied(id=proposal.command.id, step=step, incarnation=incarnation, after=after, time=self.now())
        )


class FakeCheckpointer:
    """Keeps only what a step number needs; loading fails on some ranks."""

    def __init__(self, core: Core, dice: random.Random, saves: "Saves") -> None:
        self._core = core
        self._dice = dice
        self._saves = saves

    def load(self, checkpoint: str) -> Any:
        if self._dice.random() < 0.15:
            raise CheckpointError("the file is damaged")
        step = int(checkpoint.removeprefix("step-"))
        return SimpleNamespace(
            step=step, metrics={}, incarnation=1, same_ranks=True, notes=(), restore_rng=lambda: None
        )

    def begin_save(self, *, id: str, **_: Any) -> Any:  # noqa: A002 - as in the real one
        return self._saves.begin(id)

    def commit(self, loaded: Any, *, restore_overrides: bool = False) -> None:
        self._core.counters["step"] = loaded.step


class Saves:
    """All checkpoints of a job: written together, so that each has one end for all ranks. Some fail, some take long."""

    def __init__(self, job: "SimulatedJob") -> None:
        self._job = job
        self._begun: dict[str, int] = {}
        self._ends: dict[str, float] = {}
        self._errors: dict[str, str | None] = {}

    def begin(self, checkpoint: str) -> Any:
        dice, world = self._job.world.dice, self._job.world
        self._errors.setdefault(checkpoint, "the disk is full" if dice.random() < 0.4 else None)
        self._begun[checkpoint] = self._begun.get(checkpoint, 0) + 1
        if self._begun[checkpoint] == self._job.world_size:
            self._ends[checkpoint] = world.now + dice.choice((0.001, 0.1, 3.0))

        def done() -> bool:
            return self._ends.get(checkpoint, float("inf")) <= world.now

        def result() -> Any:
            while not done():
                world.sleep(0.05 if checkpoint in self._ends else 1.0)
            return SimpleNamespace(error=self._errors[checkpoint], agreed=True)

        return SimpleNamespace(done=done, result=result)


class SimulatedRank:
    """One rank: its core, its control thread, and a training thread that does nothing but reach boundaries."""

    def __init__(self, job: "SimulatedJob", number: int, last_step: int) -> None:
        self.job = job
        self.number = number
        self.process = Process(f"rank {number}")
        self.fate: Fate = "lives"
        self.rounds = 0
        self.evaluations = 0
        self.in_evaluations = 0  # commands that took effect between two batches
        self.last_round = last_step
        self.held_s = 0.0  # for how long it was not let run
        world = job.world
        identity = RunIdentity(
            name="t",
            id="t",
            directory=job.directory,
            attempt=1,
            incarnation=1,
            created=0.0,
            authenticated=True,
            problem="simulated",
        )
        self.core = Core(
            place=RankIdentity(rank=number, world_size=job.world_size, local_rank=number, node="n"),
            identity=identity,
            total_steps=None,
            boundary=Boundary(),
            buffer=RowBuffer(),
            phases=Phases(),
            tunables=Tunables(),
            callbacks=Callbacks(on_eval=self._on_eval),
        )
        self.core.checkpointer = FakeCheckpointer(self.core, world.dice, job.saves)  # type: ignore[assignment]
        self.core.overrides = Overrides([torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)])
        for name in ("x", "y"):
            self.core.tunables.add(TunableValue(name, 0))
        self.control = SimulatedControl(
            rank=number,
            ranks=job.world_size,
            boundary=self.core.boundary,
            waiting=SimulatedConnection(job.store, number),
            talking=SimulatedConnection(job.store, number),
            refusal=lambda proposal: refusal(self.core, proposal),
        )
        self.control.world = world
        self.actions = RecordingActions(self.core, self.control)
        self.actions.applied, self.actions.kept = [], []
        self.actions.now = lambda: WALL + world.now
        self.tasks = [
            world.spawn(self.process, "train", self._train),
            world.spawn(self.process, "control", self.control.live),
        ]
        self.control.begun = True

    @property
    def record(self) -> RankRecord:
        return RankRecord(
            rank=self.number,
            applied=self.actions.applied,
            fate=self.fate,
            kept=self.actions.kept,
            values=self.values,
            on_trial=frozenset(self.core.reverts.steps_left(0)),
        )

    @property
    def values(self) -> dict[str, object]:
        assert self.core.overrides is not None
        return {**self.core.tunables.values(), "lr": self.core.overrides.effective_lr()}

    def _train(self) -> None:
        boundary, world, job = self.core.boundary, self.job.world, self.job
        try:
            while self.core.ending is None and self.rounds < self.last_round:
                world.sleep(job.step_s * world.dice.uniform(0.7, 1.3))
                self._collective()
                self.rounds += 1
                boundary.completed += 1
                boundary.reached, boundary.step_s = world.now, job.step_s
                if world.dice.random() < 0.1:
                    world.hiccup()
                if job.eval_every and boundary.completed % job.eval_every == 0:
                    evaluation.evaluate(self.core, self._meet_inside)
                    self.actions.settle_stop()
                if boundary.armed is not None or self.core.hold is not None:
                    self.actions.meet()
        except Exception as error:
            self._leave()
            job.die(self.number)
            if not isinstance(error, InDoubt):
                raise
        else:
            self._leave()
            if self.fate == "lives":
                self.fate = "left"

    def _on_eval(self) -> dict[str, float]:
        """Batches, not as many on each rank, and then a collective, as where losses are averaged.

        Where rank 0 evaluates for all, the others have no batches and return at once.
        """
        world, job, done = self.job.world, self.job, 0
        if self.number in job.eval_raises and self.actions.asked and job.eval_raises_early:
            self.evaluations += 1
            raise RuntimeError("the script's own")
        if job.eval_leads and self.number:
            self.actions.evaluated()
            return {}
        batches = evaluation.batches(self.core, range(job.eval_batches[self.number]), self._meet_inside)
        for _ in batches:
            world.sleep(job.step_s * world.dice.uniform(0.2, 0.6))
            done += 1
        self.evaluations += 1

        def together() -> bool:
            return all(other.evaluations >= self.evaluations or other.core.boundary.closed for other in job.ranks)

        if not job.eval_leads and not together():
            world.wait(together, None)
        value = 1.0 / done  # as a script's mean would, it fails where the batches ended before the first
        if self.number in job.eval_raises and self.actions.asked:
            raise RuntimeError("the script's own")
        self.actions.evaluated()
        return {"val_loss": value}

    def _meet_inside(self) -> None:
        before = len(self.actions.applied)
        self.actions.meet(inside=True)
        self.in_evaluations += len(self.actions.applied) - before

    def _collective(self) -> None:
        """Nobody begins step k + 1 before all have done step k; who left shadows the others, as under `Join`."""
        others = self.job.ranks

        def together() -> bool:
            return all(other.rounds >= self.rounds or other.core.boundary.closed for other in others)

        if not together():
            self.job.world.wait(together, None)

    def _leave(self) -> None:
        """What `Run.close` does."""
        self.core.boundary.close()
        self.actions.leave(LEAVE_S)
        if self.number == 0:
            self.job.leader.close()
            self.job.world.wait(lambda: self.job.leader_over, LEAVE_S)
        self.control.leave(LEAVE_S)
        if self.number == 0 and self.process.alive:
            self.job.said_bye = True


class SimulatedJob:
    """All ranks, rank 0's leader and its sender."""

    def __init__(
        self,
        world: World,
        directory: Path,
        *,
        ranks: int,
        step_s: float,
        fast_until_s: float,
        last_steps: Sequence[int],
        slow: float,
        eval_every: int = 0,
        eval_batches: Sequence[int] = (),
        eval_raises: frozenset[int] = frozenset(),
        eval_raises_early: bool = False,
        eval_leads: bool = False,
    ) -> None:
        self.world = world
        self.eval_every = eval_every
        self.eval_batches = eval_batches or [2] * ranks
        self.eval_raises = eval_raises  # on these ranks, where an operator asked for it
        self.eval_raises_early = eval_raises_early  # before the first batch
        self.eval_leads = eval_leads  # rank 0 alone has batches
        self.directory = directory
        self.world_size = ranks
        self._step_s = step_s
        self._fast_until_s = fast_until_s
        self.calm_at = fast_until_s  # from when on nobody sends any more
        self.store = SimulatedStore(world, slow)
        self.saves = Saves(self)
        self.ranks: list[SimulatedRank] = []
        self.notes: list[str] = []  # that rank 0 told
        self.said_bye = False
        self.leader_over = False
        self.inbox: deque[LinkCommand | LinkCancel] = deque()
        self._incarnations = 1
        self.ranks.extend(SimulatedRank(self, number, last_steps[number]) for number in range(ranks))
        first = self.ranks[0]
        self.leader = Leader(
            world_size=ranks,
            boundary=first.core.boundary,
            connection=SimulatedConnection(self.store, 0, leads=True),
            prepare=self._prepare,
            ending=lambda: first.core.ending is not None and not first.core.boundary.closed,
            tell=first.core.event,
            incarnation=lambda: first.core.incarnation,
        )
        world.spawn(first.process, "leader", self._lead)
        # What the sender thread does for commands, run by its own code: changes on trial, pauses with an end.
        self._sender = SimpleNamespace(_core=first.core, _leader=self.leader)

    @property
    def step_s(self) -> float:
        """Once everything has happened, steps are long: nothing but time goes by."""
        idle = self.world.now > self._fast_until_s and self.ranks[0].core.boundary.armed is None
        return max(2.0, self._step_s) if idle else self._step_s

    @property
    def pace_s(self) -> float:
        """How often the sender looks, at most."""
        return max(0.1, self._step_s) if self.world.now < self._fast_until_s else 1.0

    def _lead(self) -> None:
        self.leader.run()
        self.leader_over = True

    def _prepare(self, command: Command) -> Prepared | str:
        core = self.ranks[0].core
        if core.boundary.closed or core.ending is not None:
            return "the run is ending: there is no further boundary"
        if not isinstance(command.action, Rollback):
            return Prepared(two_phase=in_two_phases(command))
        self._incarnations += 1
        target = max(0, core.boundary.completed - 5)
        return Prepared(two_phase=True, checkpoint=f"step-{target}", incarnation=self._incarnations)

    def tick(self) -> list[CommandUpdate]:
        """One round of rank 0's sender: hand over what came, return what is to be told."""
        core = self.ranks[0].core
        while self.inbox:
            self.leader.submit(self.inbox.popleft())
        Sender._undo_what_is_due(self._sender)  # type: ignore[arg-type]
        Sender._auto_resume(self._sender)  # type: ignore[arg-type]
        told = []
        while core.events:
            event = core.events.popleft()
            if isinstance(event, CommandUpdate):
                told.append(event)
            elif isinstance(event, Note):
                self.notes.append(event.text)
        return told

    def die(self, rank: int) -> None:
        """One process is gone; the launcher ends all others a moment later."""
        self._kill(rank)
        for other in range(self.world_size):
            self.world.at(self.world.now + self.world.dice.uniform(0.05, 2.0), lambda other=other: self._kill(other))  # type: ignore[misc]

    def _kill(self, rank: int) -> None:
        found = self.ranks[rank]
        found.process.alive = False
        if found.fate == "lives":
            found.fate = "died"

    def over(self) -> bool:
        return all(rank.fate != "lives" for rank in self.ranks)
