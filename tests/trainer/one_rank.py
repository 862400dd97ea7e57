"""One rank of a run without hub, store or threads: real optimizer, real checkpoints, commands at its boundary."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainctl.trainer.actions import Actions, begin_save, refusal
from trainctl.trainer.agreement import GO, Outcome, Proposal, in_two_phases, verdict_on
from trainctl.trainer.boundary import Armed, Boundary
from trainctl.trainer.buffer import RowBuffer
from trainctl.trainer.checkpoint import Accessor, Checkpointer, State
from trainctl.trainer.core import Callbacks, Core
from trainctl.trainer.identity import RankIdentity, RunIdentity
from trainctl.trainer.overrides import Overrides
from trainctl.trainer.phases import Phases
from trainctl.trainer.protocol import RankEvent
from trainctl.trainer.tunables import Tunables, TunableValue
from trainctl.wire.commands import Act, Command, Rollback
from trainctl.wire.messages import CommandUpdate, Note
from trainctl.wire.rundir import RunDir


class AloneInAgreement:
    """Stands for the other ranks: everybody is always ready, and says what this one says."""

    problem: str | None = None

    def is_alive(self) -> bool:
        return True

    def going(self, armed: Armed) -> bool:
        armed.decide(GO)
        return bool(armed.going())

    gather_limit_s = 30.0

    def together(self, armed: Armed) -> bool:
        armed.on(RankEvent.ALL)
        return True

    def called_off(self, armed: Armed) -> bool:
        return False

    def staged(self, armed: Armed, told: Outcome) -> bool:
        armed.stage()
        armed.judge(verdict_on([told]))
        return told.ok


class Schedule:
    """A line down, so that every step has a learning rate of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step / 10.0))


class OneRank:
    """Trains a line. `used` is what the steps really took: LR, weight decay and beta1 of the first group, by step."""

    def __init__(self, directory: Path, *, attempt: int = 1) -> None:
        RunDir(directory).create()
        torch.manual_seed(1)
        model = nn.Linear(4, 1)
        groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.01)
        self.schedule = Schedule(self.optimizer)
        self.used: dict[int, tuple[float, float, float]] = {}
        identity = RunIdentity(
            name="one",
            id="one",
            directory=directory,
            attempt=attempt,
            incarnation=attempt,
            created=0.0,
            authenticated=True,
            problem=None,
        )
        self.core = core = Core(
            place=RankIdentity(rank=0, world_size=1, local_rank=0, node="n"),
            identity=identity,
            total_steps=None,
            boundary=Boundary(),
            buffer=RowBuffer(),
            phases=Phases(),
            tunables=Tunables(),
            callbacks=Callbacks(on_rollback=lambda _step: None),
            overrides=Overrides([self.optimizer]),
            incarnation=attempt,
        )
        core.counters["step"] = 0
        core.checkpointer = Checkpointer(
            directory=RunDir(directory).checkpoints,
            run_id="one",
            rank=0,
            world_size=1,
            group=None,
            state=State(
                models=[model],
                optimizers=[self.optimizer],
                schedulers=[self.schedule.scheduler],
                overrides=core.overrides,
                tunables=Accessor(get=core.tunables.values, set=core.tunables.restore),
                trials=core.reverts,
                counters=core.counters,
            ),
        )
        self.clip = core.tunables.add(TunableValue("clip", 1.0, minimum=0.1, maximum=10.0))
        self.actions = Actions(core, AloneInAgreement())  # type: ignore[arg-type]
        self._commands = 0

    @property
    def step(self) -> int:
        return self.core.boundary.completed

    @property
    def overrides(self) -> Overrides:
        assert self.core.overrides is not None
        return self.core.overrides

    def train(self, steps: int) -> None:
        """Steps, in which rank 0's sender looks at every boundary for changes whose trial is over."""
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.full_like(parameter, 0.1)
            with Probe(self):
                self.optimizer.step()
            self.schedule.scheduler.step()
            self.core.boundary.completed += 1
            self.overrides.heal()
            self.judge()

    def judge(self) -> list[Outcome]:
        """What the sender, the leader and the agreement do for changes on trial."""
        core = self.core
        outcomes = []
        # As in a paused run, because here, too, a proposal is met where it is made.
        for revert, asked in core.reverts.due(core.boundary.completed, held=True):
            name = f"{revert.command.id}.undo{f'.{asked + 1}' if asked else ''}"
            condition = "step >= 0" if revert.command.unless is not None else None
            undoing = Command(id=name, action=revert.command.action, condition=condition)
            outcomes.append(self._meet(undoing, undo=revert.command.id))
        return outcomes

    def do(self, action: Act, *, command_id: str | None = None, **given: Any) -> Outcome:
        """Carry a command out at this boundary; raises AssertionError where the rank refuses it."""
        self._commands += 1
        command = Command(id=command_id or f"c{self._commands}", action=action, **given)  # type: ignore[arg-type]
        return self._meet(command)

    def _meet(self, command: Command, undo: str | None = None) -> Outcome:
        core = self.core
        rollback = command.action if isinstance(command.action, Rollback) and undo is None else None
        proposal = Proposal(
            number=1,
            command=command,
            actor="mk",
            step=core.boundary.completed,
            two_phase=in_two_phases(command),
            checkpoint=rollback.target if rollback is not None else None,
            incarnation=core.incarnation + 1,
            undo=undo,
        )
        refused = refusal(core, proposal)
        assert refused is None, refused
        armed = Armed(proposal)
        core.boundary.arm(armed)
        self.actions.meet()
        assert armed.outcome is not None
        core.events.append(
            CommandUpdate(
                time=0.0,
                step=armed.outcome.step,
                incarnation=core.incarnation,
                id=command.id,
                command="",
                args={},
                actor="mk",
                state="applied" if armed.outcome.ok else "rejected",
                reason=armed.outcome.reason,
            )
        )
        return armed.outcome

    def save(self) -> str:
        save = begin_save(self.core)
        assert save.pending.result(30).error is None
        return save.id

    def roll_back(self, checkpoint: str, **given: Any) -> Outcome:
        return self.do(Rollback(target=checkpoint, **given))

    def notes(self) -> list[str]:
        return [event.text for event in self.core.events if isinstance(event, Note)]

    def outcomes(self) -> dict[str, str]:
        return {event.id: event.state for event in self.core.events if isinstance(event, CommandUpdate)}


class Probe:
    """Notes what a step really uses: the last pre-hook sees the groups as the step will."""

    def __init__(self, rank: OneRank) -> None:
        self._rank = rank

    def __enter__(self) -> None:
        self._handle = self._rank.optimizer.register_step_pre_hook(lambda *_: self._note())

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _note(self) -> None:
        group = self._rank.optimizer.param_groups[0]
        self._rank.used[self._rank.step + 1] = (group["lr"], group["weight_decay"], group["betas"][0])
