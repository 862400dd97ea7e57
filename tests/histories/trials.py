"""What becomes of changes on trial in a history: each is undone at its time, or kept for a reason that was told.

It follows each rank's own record with nothing but what was sent: the newest value of each thing, and what it goes back
to. So it needs no word of the trainer about what is on trial, and holds that against what it finds.

An attempt that follows another begins with what rank 0 had written down of the one before: what it had when it told of
its last change, or after one that it applied since. Which of these it was shows in the steps that are trained then.
"""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import isclose
from typing import TYPE_CHECKING

from attempts import attempts_of

from trainctl.wire.commands import (
    FINAL_COMMAND_STATES,
    Cancel,
    Command,
    LrRelease,
    LrScale,
    LrSet,
    Rollback,
    SetTunable,
)
from trainctl.wire.expressions import parse

if TYPE_CHECKING:
    from attempts import Trained
    from history import Applied, History, Kept, RankRecord

UNDOING = re.compile(r"(.+)\.undo(\.\d+)?")


@dataclass
class _Trial:
    command: Command
    begun: int

    @property
    def due(self) -> int:
        return self.begun + (self.command.revert_after or 0)

    def stays(self, step: int) -> bool:
        """Whether its condition holds behind this step; those of histories speak of steps alone."""
        return self.command.unless is not None and parse(self.command.unless)({"step": step})


def undone_by(name: str) -> str | None:
    """The change that a command of this id undoes, or None."""
    found = UNDOING.fullmatch(name)
    return found[1] if found else None


def thing_of(command: Command | None) -> str | None:
    """What a command changes, None where it changes no value. The histories' changes are for all groups."""
    match command:
        case Command(action=SetTunable(name=name)):
            return name
        case Command(action=LrScale() | LrSet() | LrRelease()):
            return "lr"
        case _:
            return None


@dataclass
class _Stand:
    """What is set at a moment of a rank's life."""

    now: dict[str, object]
    confirmed: dict[str, object]  # what the end of a trial goes back to
    trials: dict[str, _Trial] = field(default_factory=dict)  # by what is changed

    def copy(self) -> "_Stand":
        return self.rewound(max((trial.begun for trial in self.trials.values()), default=0))

    def rewound(self, step: int) -> "_Stand":
        """The same where a branch goes on behind `step`."""
        trials = {thing: replace(trial, begun=min(trial.begun, step)) for thing, trial in self.trials.items()}
        return _Stand(dict(self.now), dict(self.confirmed), trials)


class _Life:
    """One rank's record, followed from its beginning."""

    def __init__(self, record: "RankRecord", history: "History") -> None:
        self._record = record
        self._history = history
        self._stand = _Stand(dict(history.initial), dict(history.initial))

    def problems(self, attempts: Sequence[int]) -> list[str]:
        """All that is wrong from the first of these attempts on."""
        attempt, *later = attempts
        before = self._stand.copy()
        found = list(self._live(attempt))
        if not later:
            return found + list(self._end())
        tries = []
        for left in _left_behind(self._history, attempt, later[0], before):
            self._stand = left
            tries.append(self.problems(later))
        return found + min(tries, key=len)

    def stands(self, attempt: int, before: _Stand) -> list[tuple[str | None, _Stand]]:
        """What was set at the beginning of an attempt, and behind each command that it applied."""
        self._stand = before.copy()
        found: list[tuple[str | None, _Stand]] = [(None, before)]
        for applied in self._record.applied:
            if applied.attempt == attempt:
                list(self._apply(applied))
                found.append((applied.id, self._stand.copy()))
        return found

    def _live(self, attempt: int) -> Iterator[str]:
        kept = [one for one in self._record.kept if one.attempt == attempt]
        steps = deque(one for one in self._record.trained if one.attempt == attempt)
        wrong: set[str] = set()  # told once: what is wrong at one step stays so for thousands
        for number, applied in enumerate(one for one in self._record.applied if one.attempt == attempt):
            while kept and kept[0].behind <= number:
                yield from self._keep(kept.pop(0))
            while steps and self._precedes(steps[0], applied):
                yield from self._train(steps.popleft(), wrong)
            yield from self._apply(applied)
        for one in kept:
            yield from self._keep(one)
        for step in steps:
            yield from self._train(step, wrong)

    def _precedes(self, step: "Trained", applied: "Applied") -> bool:
        command = self._history.commands.get(applied.id)
        if command is not None and isinstance(command.action, Rollback):
            return step.incarnation < applied.incarnation
        return (step.incarnation, step.step) <= (applied.incarnation, applied.step)

    def _train(self, step: "Trained", wrong: set[str]) -> Iterator[str]:
        for thing, value in step.values.items():
            if thing in self._stand.now.keys() - wrong and not _alike(value, self._stand.now[thing]):
                wrong.add(thing)
                where, was_set = f"step {step.step} of attempt {step.attempt}", self._stand.now[thing]
                yield f"rank {self._record.rank} trained {where} with {thing} {value}, and {was_set} was set"

    def _apply(self, applied: "Applied") -> Iterator[str]:
        if (changed := undone_by(applied.id)) is not None:
            yield from self._undo(applied, changed)
            return
        command = self._history.commands.get(applied.id)
        if command is not None and isinstance(command.action, Rollback):
            for trial in self._stand.trials.values():
                trial.begun = min(trial.begun, int(str(applied.after)))
        elif command is not None and (thing := thing_of(command)) is not None:
            self._stand.now[thing] = applied.after
            self._stand.trials.pop(thing, None)
            if command.revert_after is not None:
                self._stand.trials[thing] = _Trial(command, applied.step)
            else:
                self._stand.confirmed[thing] = applied.after

    def _undo(self, applied: "Applied", changed: str) -> Iterator[str]:
        rank, thing = self._record.rank, thing_of(self._history.commands.get(changed))
        trial = self._stand.trials.get(thing) if thing is not None else None
        if thing is None or trial is None or trial.command.id != changed:
            yield f"rank {rank} applied {applied.id}, and {changed} was not on trial"
            return
        if applied.step < trial.due:
            yield f"rank {rank} undid {changed} at step {applied.step}, and not at {trial.due}"
        if trial.stays(applied.step):
            yield f"rank {rank} undid {changed} at step {applied.step}, where {trial.command.unless} holds"
        if thing in self._stand.confirmed and not _alike(applied.after, self._stand.confirmed[thing]):
            before = self._stand.confirmed[thing]
            yield f"rank {rank} undid {changed}: {thing} is {applied.after}, and was {before} before"
        self._stand.now[thing] = applied.after
        del self._stand.trials[thing]

    def _keep(self, kept: "Kept") -> Iterator[str]:
        rank, thing = self._record.rank, thing_of(self._history.commands.get(kept.id))
        trial = self._stand.trials.get(thing) if thing is not None else None
        if thing is None or trial is None or trial.command.id != kept.id:
            yield f"rank {rank} kept {kept.id}, which was not on trial"
            return
        holds = kept.step >= trial.due and trial.stays(kept.step)
        if not holds and kept.id not in _withdrawn(self._history):
            yield (
                f"rank {rank} kept {kept.id} at step {kept.step}: nobody withdrew its undoing, it is due at step "
                f"{trial.due}, and was to be kept if {trial.command.unless}"
            )
        self._stand.confirmed[thing] = self._stand.now.get(thing)
        del self._stand.trials[thing]

    def _end(self) -> Iterator[str]:
        record, expected = self._record, {trial.command.id for trial in self._stand.trials.values()}
        if record.on_trial is not None and record.on_trial != expected:
            yield f"rank {record.rank} has {sorted(record.on_trial)} on trial in the end, and not {sorted(expected)}"
        for thing, value in record.values.items():
            if thing in self._stand.now and not _alike(value, self._stand.now[thing]):
                yield f"rank {record.rank} has {thing} {value} in the end, and not {self._stand.now[thing]}"


def _left_behind(history: "History", ended: int, following: int, before: _Stand) -> list[_Stand]:
    """With what the next attempt may begin: where its first steps tell, that alone."""
    # Of rank 0; what it had applied and was killed before it wrote that down, another may have written down.
    longest = max(history.ranks, key=lambda record: sum(one.attempt == ended for one in record.applied))
    stands = _Life(longest, history).stands(ended, before)
    told = {told.id for told in history.told if told.state == "applied" and not told.own}
    told |= {name for name, state in history.outcomes.items() if state == "applied"}
    certain = [
        number
        for number, (name, _) in enumerate(stands)
        if name in told and thing_of(history.commands.get(undone_by(str(name)) or str(name))) is not None
    ]
    step = next((one.step for record in history.ranks for one in record.begun if one.attempt == following), 0)
    found = [stand.rewound(step) for _, stand in stands[certain[-1] if certain else 0 :]]
    first = next((one for record in history.ranks for one in record.trained if one.attempt == following), None)
    fits = [
        stand
        for stand in found
        if first is None or all(_alike(value, stand.now.get(thing, value)) for thing, value in first.values.items())
    ]
    return fits or found[-1:]


def trials(history: "History") -> Iterator[str]:
    """What is wrong with changes on trial: their ends on each rank, alike on all, and what was told of them."""
    for record in history.ranks:
        yield from _Life(record, history).problems(attempts_of(history))
    yield from _no_half(history)
    yield from _reasons(history)


def _no_half(history: "History") -> Iterator[str]:
    """Who did not die kept what any other kept, at the same place."""
    most = max(history.ranks, key=lambda record: len(record.kept))
    for record in history.ranks:
        own, others = ([(one.id, one.step, one.incarnation) for one in found.kept] for found in (record, most))
        if own != others[: len(own)] or (len(own) < len(others) and record.fate != "died"):
            yield f"rank {record.rank} {record.fate} and kept {own}, rank {most.rank} {others}"


def _reasons(history: "History") -> Iterator[str]:
    """Whoever is told why a change stays, or that its end came to nothing, is told the truth; and somebody is told."""
    applied = {one.id for record in history.ranks for one in record.applied}
    kept = {one.id for record in history.ranks for one in record.kept}
    if history.notes is not None:
        for name in sorted({one.id for one in history.ranks[0].kept}):
            if not any(text.endswith(f"the change of command {name} stays") for text in history.notes):
                yield f"{name} was kept, and nobody was told why"
    for name, state in sorted(history.outcomes.items()):
        changed, reason = undone_by(name), history.reasons.get(name, "")
        if changed is None or state not in FINAL_COMMAND_STATES - {"applied", "unknown"}:
            continue
        newer = re.match(r"(?:rank \d+: )?(\S+) took its place", reason)
        if newer is not None and thing_of(history.commands.get(newer[1])) != thing_of(history.commands.get(changed)):
            yield f"{name} is {state} for {newer[1]}, which changes something else"
        if newer is not None and newer[1] not in applied:
            yield f"{name} is {state} for {newer[1]}, which no rank applied"
        on_trial_still = any(changed in (record.on_trial or ()) or record.fate == "died" for record in history.ranks)
        if re.search(r"cancelled by|stays$", reason) and changed not in kept and not on_trial_still:
            yield f"{name} is {state} ({reason}), and no rank kept {changed}"


def _withdrawn(history: "History") -> set[str | None]:
    """The changes whose undoing an operator sent a cancel for."""
    actions = [command.action for command in history.commands.values()]
    return {undone_by(action.command) for action in actions if isinstance(action, Cancel)} - {None}


def _alike(one: object, other: object) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return isclose(one, other, rel_tol=1e-9)
    return one == other
