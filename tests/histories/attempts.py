"""A run that is started again, as ranks and operators saw it: where each attempt began, and what ended the one before.

What an attempt leaves to the next one of changes and their trials is in trials.py.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from trainctl.wire.commands import Abort, CheckpointSave, Command, Restart, Rollback

if TYPE_CHECKING:
    from history import History


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A rank begins an attempt of `run` behind `step`, 0 where it begins anew."""

    attempt: int
    step: int
    incarnation: int
    run: str = "run"
    time: float = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A rank trained a step with these values, by name; written down when its boundary was passed."""

    step: int
    values: Mapping[str, object]
    incarnation: int = 1
    attempt: int = 1
    time: float = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What an operator saw of the run."""

    operator: str
    run: str
    attempt: int


def attempts_of(history: "History") -> list[int]:
    """The attempts that any rank wrote of, in order; at least the first."""
    found = {one.attempt for record in history.ranks for one in (*record.applied, *record.begun, *record.trained)}
    return sorted(found) or [1]


def ended_at_once(history: "History") -> set[str]:
    """The ids of what needs no boundary, and which no rank applies: `restart` and `abort --now`."""
    return {
        name
        for name, command in history.commands.items()
        if isinstance(command.action, Restart) or (isinstance(command.action, Abort) and command.action.now)
    }


def attempts(history: "History") -> Iterator[str]:
    """What is wrong with a run that was started again."""
    yield from _once(history)
    yield from _beginnings(history)
    yield from _steps(history)
    yield from _ends(history)
    yield from _confirmed(history)
    yield from _seen(history)


def _once(history: "History") -> Iterator[str]:
    """An id counts once in a run, whatever is sent to which attempt."""
    where: dict[str, set[int]] = {}
    for record in history.ranks:
        for applied in record.applied:
            where.setdefault(applied.id, set()).add(applied.attempt)
    for name, numbers in sorted(where.items()):
        if len(numbers) > 1:
            yield f"{name} was applied in attempts {sorted(numbers)}"


def _beginnings(history: "History") -> Iterator[str]:
    """All ranks begin an attempt alike, each in an incarnation of its own; who lives has begun the newest."""
    newest = 0
    for number in attempts_of(history):
        begun = {record.rank: one for record in history.ranks for one in record.begun if one.attempt == number}
        for what in ("step", "incarnation", "run"):
            if len({getattr(one, what) for one in begun.values()}) > 1:
                each = {rank: getattr(one, what) for rank, one in begun.items()}
                yield f"attempt {number} begins at different {what}: {each}"
        used = {one.incarnation for record in history.ranks for one in record.applied if one.attempt == number}
        used |= {one.incarnation for record in history.ranks for one in record.trained if one.attempt == number}
        first = min((one.incarnation for one in begun.values()), default=None)
        if first is not None and (first <= newest or any(one < first for one in used)):
            yield f"attempt {number} begins incarnation {first}, after {newest} and with {sorted(used)}"
        newest = max(newest, first or 0, *used)
    last = attempts_of(history)[-1]
    for record in history.ranks:
        if record.begun and record.fate != "died" and record.begun[-1].attempt != last:
            yield f"rank {record.rank} {record.fate} and never began attempt {last}"


def _steps(history: "History") -> Iterator[str]:
    """Each step is trained with the same values on every rank, and the first of an attempt follows its beginning."""
    used: dict[tuple[int, int, int], dict[int, Mapping[str, object]]] = {}
    for record in history.ranks:
        for one in record.trained:
            used.setdefault((one.attempt, one.incarnation, one.step), {})[record.rank] = one.values
        for begun in record.begun:
            mine = (one for one in record.trained if one.attempt == begun.attempt)
            first = next(mine, None)
            if first is not None and (first.step, first.incarnation) != (begun.step + 1, begun.incarnation):
                yield (
                    f"rank {record.rank} began attempt {begun.attempt} behind step {begun.step} of incarnation "
                    f"{begun.incarnation}, and its first step was {first.step} of {first.incarnation}"
                )
    for (_, incarnation, step), values in used.items():
        if any(one != next(iter(values.values())) for one in values.values()):
            yield f"step {step} of incarnation {incarnation} was trained with {values}"


def _ends(history: "History") -> Iterator[str]:
    """A restart or an abort that is told as applied has ended every rank of its attempt, and what it said follows."""
    begun: dict[int, tuple[float, int]] = {}  # by attempt, when the first rank began it, and behind which step
    for record in history.ranks:
        for one in record.begun:
            begun[one.attempt] = min(begun.get(one.attempt, (one.time, one.step)), (one.time, one.step))
    accepted, applied = _times(history, "accepted"), _times(history, "applied")
    for name in sorted(ended_at_once(history) & accepted.keys() & applied.keys()):
        ended = max((number for number, (at, _) in begun.items() if at < accepted[name]), default=1)
        for record in history.ranks:
            late = [
                one.step
                for one in (*record.applied, *record.trained)
                if one.attempt == ended and applied[name] < one.time < float("inf")
            ]
            if late:
                yield f"{name} has ended attempt {ended}, and rank {record.rank} goes on at step {late[0]}"
        following = min((number for number in begun if number > ended), default=None)
        action = history.commands[name].action
        if isinstance(action, Abort) and following is not None:
            yield f"{name} has aborted the run, and attempt {following} followed"
        if not isinstance(action, Restart):
            continue
        expected = history.checkpoints.get(action.target)
        if following is None:
            if history.complete or any(record.fate == "lives" for record in history.ranks):
                yield f"{name} has restarted the run, and no attempt followed"
        elif expected is not None and begun[following][1] != expected:
            yield (
                f"{name} restarts from {action.target}, which is of step {expected}, and attempt {following} begins "
                f"behind step {begun[following][1]}"
            )


def _confirmed(history: "History") -> Iterator[str]:
    """A checkpoint that was told is not lost: the next attempt begins there or later, unless asked not to."""
    numbers, asked = attempts_of(history), _asked_for(history)
    for ended, following in itertools.pairwise(numbers):
        begins = {one.step for record in history.ranks for one in record.begun if one.attempt == following}
        if following in asked or not begins:
            continue
        longest = max(([one for one in record.applied if one.attempt == ended] for record in history.ranks), key=len)
        saved: str | None = None
        at = 0
        for one in longest:
            command = history.commands.get(one.id)
            if command is not None and isinstance(command.action, Rollback):
                saved, at = None, 0
            elif command is not None and isinstance(command.action, CheckpointSave) and _is_applied(history, one.id):
                saved, at = one.id, one.step
        if saved is not None and min(begins) < at:
            yield f"{saved} saved step {at}, and attempt {following} begins behind step {min(begins)}"


def _asked_for(history: "History") -> set[int]:
    """The attempts that may begin at an older checkpoint, because somebody asked for it by name."""
    begun = {(one.time, one.attempt) for record in history.ranks for one in record.begun}
    found = set()
    for name, at in _times(history, "accepted").items():
        command = history.commands.get(name)
        if command is not None and isinstance(command.action, Restart) and command.action.target != "last":
            found |= {min((attempt for time, attempt in begun if time > at), default=0)}
    return found


def _is_applied(history: "History", name: str) -> bool:
    told = any(told.id == name and told.state == "applied" and not told.own for told in history.told)
    return told or history.outcomes.get(name) == "applied"


def _seen(history: "History") -> Iterator[str]:
    """It is one run to everybody, its attempts only grow, and in the end everybody sees the newest."""
    runs = {one.run for record in history.ranks for one in record.begun} | {one.run for one in history.seen}
    if len(runs) > 1:
        yield f"there are {len(runs)} runs: {sorted(runs)}"
    newest: dict[str, int] = {}
    for one in history.seen:
        if one.attempt < newest.get(one.operator, 0):
            yield f"{one.operator} saw attempt {newest[one.operator]}, and later {one.attempt}"
        newest[one.operator] = one.attempt
    last = attempts_of(history)[-1]
    for operator, number in newest.items():
        if number != last:
            yield f"{operator} saw attempt {number} in the end, and it was {last}"


def _times(history: "History", state: str) -> dict[str, float]:
    """When the audit log first had a state of each command, by id."""
    found: dict[str, float] = {}
    for line in history.audit:
        try:
            entry: Any = json.loads(line)
        except ValueError:
            continue  # the chain's rule says so
        if isinstance(entry, dict) and entry.get("state") == state and "time" in entry:
            found.setdefault(str(entry.get("id")), float(entry["time"]))
    return found


def commands_in(lines: list[str]) -> dict[str, Command]:
    """What was sent, as the audit log has it."""
    entries = [json.loads(line) for line in lines]
    return {entry["id"]: msgspec.json.decode(entry["request"], type=Command) for entry in entries if "request" in entry}
