"""One simulated history from its seed: operators, commands and faults drawn, lived through, and judged."""

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from history import History, problems
from simulated_hub import Disk, Operator, RankLink, SimulatedHub
from simulated_job import LEADING, SimulatedJob
from simulated_time import World, simulated
from trials import undone_by

from trainctl.hub import audit_trail, audit_writer
from trainctl.hub import desk as desk_module
from trainctl.store import audit as audit_module
from trainctl.trainer import (
    actions,
    boundary,
    control,
    core,
    evaluated,
    evaluation,
    gathering,
    leader,
    meeting,
    outcomes,
    sender,
)
from trainctl.trainer.agreement import DOUBT_S
from trainctl.wire.commands import (
    Abort,
    Action,
    AddNote,
    Cancel,
    Command,
    Evaluate,
    LrRelease,
    LrScale,
    LrSet,
    Pause,
    Resume,
    Rollback,
    SetTunable,
    Stop,
)
from trainctl.wire.messages import CheckpointInfo, Note
from trainctl.wire.own_ids import undoing_id

if TYPE_CHECKING:
    from collections.abc import Callable

_SIMULATED = (
    actions,
    boundary,
    control,
    core,
    evaluated,
    evaluation,
    gathering,
    leader,
    meeting,
    outcomes,
    sender,
    desk_module,
    audit_trail,
    audit_writer,
)
_CHECKPOINT = CheckpointInfo(id="step-1", step=1, incarnation=1, time=0.0, bytes=1)
ACTS_STEPS = 60  # in which commands and faults fall
CALM_S = 5.0  # after the last fault, before whatever still trains is ended
HORIZON_S = 600.0
DOUBT_SLACK_S = 3.0
TRIALS_S = 120.0  # of calm, in which every change on trial comes to its end
_LEADER_RESET = "rank 0's leader has its connection to the store reset for {:.2f} s"
_MOMENTS = [
    f"{moment} {kind}:{key}"
    for moment in ("before", "after")
    for kind, key in (
        ("decide", "p/"), ("set", "a/"), ("get", "a/"), ("decide", "d/"), ("set", "l/"), ("get", "l/"),
        ("decide", "c/"), ("set", "r/"), ("get", "r/"), ("get", "p/"), ("get", "d/"), ("set", "h/"), ("decide", "m/"),
        ("check", "l/"), ("check", "l/"), ("check", "r/"),
    )
]  # fmt: skip


@dataclass
class Lived:
    """What came out of one seed."""

    seed: int
    problems: list[str]
    story: list[str]
    states: dict[str, int] = field(default_factory=dict)
    inside: int = 0  # commands that took effect between two batches of an evaluation, on rank 0
    undone: int = 0  # changes on trial, on rank 0
    kept: int = 0
    applied: int = 0


def live(seed: int, directory: Path) -> Lived:
    """Live through the history of a seed and judge it. Uses `directory` for the audit log."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "audit.jsonl").unlink(missing_ok=True)
    with (
        simulated(World(seed, HORIZON_S), *_SIMULATED) as world,
        mock.patch.object(desk_module, "list_checkpoints", return_value=[_CHECKPOINT]),
        mock.patch.object(leader, "_POLL_S", (0.002, 2.0)),  # looking in vain is what costs time here
        mock.patch.object(meeting, "PrefixStore", lambda _prefix, store: store),
        mock.patch.object(audit_module.os, "fsync"),  # a disk that syncs would take most of the time
    ):
        scene = Scene(world, directory)
        world.run()
        return scene.judged(seed)


class Scene:
    """Who is there, and what will happen to them."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        self.dice = dice = world.dice
        self.story: list[str] = []
        self._calm_at = 0.0
        self._endless: list[str] = []  # changes on trial that come to no end
        ranks = dice.choice((1, 2, 2, 2, 3, 4))
        step_s = dice.choice((0.002, 0.02, 0.2, 1.0))
        steps = dice.randint(20, 120) if dice.random() < 0.3 else 10**6
        self.acts_s = ACTS_STEPS * step_s
        self._calm_at = 1.0 + self.acts_s + CALM_S
        uneven = dice.random() < 0.5
        self.job = SimulatedJob(
            world,
            directory,
            ranks=ranks,
            step_s=step_s,
            last_steps=[max(1, steps - (dice.randint(0, 6) if uneven else 0)) for _ in range(ranks)],
            slow=dice.choice((0.0, 0.01, 0.1)),
            fast_until_s=1.5 + self.acts_s,
            **self._evaluations(ranks),
        )
        self.say(f"{ranks} ranks, steps of {step_s} s, {steps} of them")
        self.disk = Disk(directory)
        self.link = RankLink(world, self.job, self.disk)
        self.operators = [Operator(world, name, self._hub) for name in ("mk", "jo", "end")]
        self.ids: list[str] = []
        self._sent: dict[str, Command] = {}
        self._initial = self.job.ranks[0].values
        self._traps: list[tuple[int, str, int, Callable[[], None]]] = []
        self.job.store.trap = self._spring
        for number in range(dice.randint(2, 12)):
            self._plan_command(number)
        for _ in range(dice.choice((0, 1, 1, 2, 3))):
            self._plan_fault()
        world.at(self._calm_at, self._end)

    def say(self, what: str) -> None:
        self.story.append(f"{self.world.now:9.4f} {what}")

    def _hub(self) -> SimulatedHub | None:
        hub = self.link.hub
        return hub if hub is not None and hub.process.alive else None

    def _evaluations(self, ranks: int) -> dict[str, Any]:
        if (dice := self.dice).random() < 0.4:
            return {}
        batches, uneven = dice.randint(1, 12), dice.random() < 0.4
        each = [batches + (dice.randint(0, 4) if uneven else 0) for _ in range(ranks)]
        raising = frozenset(range(ranks) if dice.random() < 0.3 else [dice.randrange(ranks)])
        raises = raising if dice.random() < 0.3 else frozenset[int]()
        return {
            "eval_every": dice.choice((0, 2, 5, 9)),
            "eval_batches": each,
            "eval_raises": raises,
            "eval_raises_early": dice.random() < 0.5,
            "eval_leads": dice.random() < 0.3,
        }

    # --- commands

    def _plan_command(self, number: int) -> None:
        dice = self.dice
        command = Command(
            id=f"c{number}",
            action=self._action(number),
            condition=dice.choice(("step >= 0", "step < 0")) if dice.random() < 0.2 else None,
            expires_s=dice.uniform(0.01, 3.0) if dice.random() < 0.2 else None,
        )
        if isinstance(command.action, SetTunable | LrScale | LrSet) and dice.random() < 0.4:
            unless = dice.choice((None, "step >= 0", "step < 0", "step < 0"))
            command = Command(id=command.id, action=command.action, revert_after=dice.randint(1, 8), unless=unless)
        self.ids.append(command.id)
        when = 1.0 + (dice.uniform(0.0, self.acts_s) if dice.random() < 0.7 else number * 0.001)
        operators = dice.sample(self.operators[:2], 2 if dice.random() < 0.2 else 1)
        for operator in operators:  # two with one id: an operator's script that ran twice
            self.world.at(when + dice.uniform(0, 0.01), lambda operator=operator: self._send(operator, command))  # type: ignore[misc]

    def _action(self, number: int) -> Action:
        dice = self.dice
        kind = dice.random()
        if kind < 0.5:
            if dice.random() < 0.3:
                return dice.choice((LrScale(factor=0.5), LrSet(value=0.01 * (number + 1)), LrRelease()))
            return SetTunable(name=dice.choice("xy"), value=number + 1)
        if kind < 0.62:
            return Pause(for_s=dice.uniform(0.1, 5.0) if dice.random() < 0.5 else None)
        if kind < 0.74:
            return Resume()
        if kind < 0.84:
            return Rollback(target="last")
        if kind < 0.93 and self.ids:
            target = dice.choice(self.ids)
            # Its undoing, if it is on trial: withdrawn, the change stays.
            return Cancel(command=undoing_id(target) if dice.random() < 0.3 else target)
        return dice.choice(
            (Stop(), Stop(), Abort(), Evaluate(), Evaluate(), AddNote(text="so it is"), AddNote(text="so it was"))
        )

    def _send(self, operator: Operator, command: Command) -> None:
        self.say(f"{operator.name} sends {command}")
        self._sent[command.id] = command
        operator.send(command)

    def _end(self) -> None:
        """What was paused or goes on for ever is ended, so that every command has its outcome."""
        if self.job.over():
            return
        if self._calm_at > self.world.now:
            self.world.at(self._calm_at, self._end)
            return
        if self.job.store.dead:
            self.say("the job is cancelled")  # without a store training goes on, and no command reaches it
            self.job.die(0)
            return
        if self._awaits_trials():
            self.world.at(self.world.now + 2.0, self._end)
            return
        self._send(self.operators[2], Command(id=f"end{self.world.now:.0f}", action=Abort()))
        self.world.at(self.world.now + 20.0, self._end)

    def _awaits_trials(self) -> bool:
        """Changes are on trial, and nothing is in the way of their end: it has to come, and it is waited for."""
        ranks, now = self.job.ranks, self.world.now
        on_trial = ranks[0].core.reverts.steps_left(ranks[0].core.boundary.completed)
        if not on_trial or any(rank.fate != "lives" or rank.core.ending is not None for rank in ranks):
            return False
        if now > self._calm_at + TRIALS_S:
            hub = self._hub()
            told = [] if hub is None else hub.record.commands.values()
            # One that not every rank came to is proposed again a hundred steps later, for it held up all others.
            late = {undone_by(update.id) for update in told if "not every rank came" in str(update.reason)}
            endless = {name: left for name, left in on_trial.items() if name not in late}
            self._endless = [f"trials: {name} is on trial, {left} steps left" for name, left in endless.items()]
            return False
        if any(rank.core.hold is not None for rank in ranks):
            self._send(self.operators[2], Command(id=f"go{now:.0f}", action=Resume()))
        return True

    # --- faults

    def _plan_fault(self) -> None:
        dice = self.dice
        rank = dice.randrange(self.job.world_size)
        for_s = dice.choice((0.05, 0.5, 5.0, 20.0, 45.0)) * dice.uniform(0.7, 1.3)
        faults: list[tuple[str, Callable[[], None]]] = [
            (f"rank {rank} is killed", lambda: self.job.die(rank)),
            (f"rank {rank} is stopped for {for_s:.2f} s", lambda: self._stop(rank, for_s)),
            (f"rank {rank} is cut from the store for {for_s:.2f} s", lambda: self._cut(rank, for_s)),
            (f"rank {rank}'s control thread starves for {for_s:.2f} s", lambda: self._starve(rank, 1, for_s)),
            (f"rank {rank}'s training thread starves for {for_s:.2f} s", lambda: self._starve(rank, 0, for_s)),
            *[(f"rank {rank}'s connections to the store are reset for {for_s:.2f} s", lambda: self._reset(rank, for_s))]
            * 2,
            *[(_LEADER_RESET.format(for_s), lambda: self._reset(LEADING, for_s))] * 2,
            ("the hub is killed", self._kill_hub),
            (f"the hub is stopped for {for_s:.2f} s", lambda: self._stop_hub(for_s)),
            (f"the operators are cut off for {for_s:.2f} s", lambda: self._cut_operators(for_s)),
            ("the store is gone", self._kill_store),
        ]
        words, fault = dice.choice(faults)

        def happen() -> None:
            self.say(words)
            self._calm_at = max(self._calm_at, self.world.now + for_s + CALM_S)
            fault()

        if words.startswith("rank 0's leader") and dice.random() < 0.8:  # while it waits for what is staged
            self._traps.append((0, "before check:l/", dice.randint(1, 3), happen))
        elif dice.random() < 0.5:
            self.world.at(1.0 + dice.uniform(0.0, self.acts_s), happen)
        else:
            self._traps.append((rank, dice.choice(_MOMENTS), dice.randint(1, 4), happen))

    def _spring(self, rank: int, moment: str, key: str) -> None:
        for trap in self._traps:
            where, kind, count, happen = trap
            wanted_moment, _, wanted_key = kind.partition(":")
            if (where, wanted_moment) == (rank, moment) and key.startswith(wanted_key):
                self._traps.remove(trap)
                if count > 1:
                    self._traps.append((where, kind, count - 1, happen))
                else:
                    self.say(f"at {moment} {key} of rank {rank}:")
                    happen()
                return

    def _stop(self, rank: int, for_s: float) -> None:
        self.job.ranks[rank].process.stopped_until = self.world.now + for_s
        self.job.ranks[rank].held_s += for_s

    def _cut(self, rank: int, for_s: float) -> None:
        self.job.store.cut_until[rank] = self.world.now + for_s

    def _reset(self, rank: int, for_s: float) -> None:
        self.job.store.refused_until[rank] = self.world.now + for_s

    def _starve(self, rank: int, task: int, for_s: float) -> None:
        self.job.ranks[rank].tasks[task].starved_until = self.world.now + for_s
        self.job.ranks[rank].held_s += for_s

    def _kill_hub(self) -> None:
        if self.link.hub is not None:
            self.link.hub.process.alive = False

    def _stop_hub(self, for_s: float) -> None:
        if self.link.hub is not None:
            self.link.hub.process.stopped_until = self.world.now + for_s

    def _cut_operators(self, for_s: float) -> None:
        for operator in self.operators:
            operator.cut_until = self.world.now + for_s

    def _kill_store(self) -> None:
        self.job.store.dead = True

    # --- the judgement

    def judged(self, seed: int) -> Lived:
        hub = self._hub()
        lines = self.disk.audit.read_text().splitlines() if self.disk.audit.exists() else []
        outcomes = {} if hub is None else {name: update.state for name, update in hub.record.commands.items()}
        history = History(
            ranks=[rank.record for rank in self.job.ranks],
            told=[told for operator in self.operators for told in operator.told],
            audit=lines,
            outcomes=dict(outcomes),
            reasons={} if hub is None else {name: str(found.reason) for name, found in hub.record.commands.items()},
            complete=hub is not None and hub.ended,
            commands=self._sent,
            initial=self._initial,
            notes=[
                *self.job.notes,
                *(event.text for event in self.job.ranks[0].core.events if isinstance(event, Note)),
            ],
        )
        found = [*problems(history), *self._hangs(), *self._endless, *self.job.store.missed, *self.world.errors]
        states: dict[str, int] = {}
        for state in outcomes.values():
            states[state] = states.get(state, 0) + 1
        self.story += [json.dumps(json.loads(line), sort_keys=True)[:300] for line in lines]
        self.story += [f"{rank.process.name}: {rank.fate} {rank.actions.applied}" for rank in self.job.ranks]
        self.story += [f"{told}" for told in history.told]
        return Lived(
            seed=seed,
            problems=found,
            story=self.story,
            states=states,
            applied=sum(len(rank.actions.applied) for rank in self.job.ranks),
            inside=self.job.ranks[0].in_evaluations,
            undone=sum(undone_by(one.id) is not None for one in self.job.ranks[0].actions.applied),
            kept=len(self.job.ranks[0].actions.kept),
        )

    def _hangs(self) -> list[str]:
        found = []
        for rank in self.job.ranks:
            if rank.fate == "lives":
                found.append(f"hang: rank {rank.number} is still there at step {rank.core.boundary.completed}")
            held_s = rank.control.doubted_s
            if held_s is not None and held_s > DOUBT_S + DOUBT_SLACK_S + rank.held_s:
                found.append(f"doubt: rank {rank.number} held for {held_s:.0f} s before it gave up")
        return found


def default_directory() -> Path:
    """Memory where there is some: the audit log is written thousands of times."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))


def seeds(count: int, first: int | None = None) -> range:
    """`count` seeds from `first`, or from anywhere."""
    start = random.SystemRandom().randrange(2**31) if first is None else first
    return range(start, start + count)
