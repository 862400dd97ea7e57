"""What a history is: each rank's own record, the audit log, and what every operator was told. And whether it holds.

`problems` is a pure function; the simulated and the real histories are judged by it alike. Its rules:

    agreement   every rank that did not die applied the same commands, at the same steps, in the same order
    truth       `applied` means on every rank; `rejected`, `conflict`, `expired` and `superseded` mean on none
    superseded  by one that may have been applied: of two that an operator sent, one counts
    one outcome for one id, to everybody who asked, in the audit log and in the run's record; it never changes
    audit       nothing is applied that has no line in the log from before, and the chain of the log is whole
    an end      what was accepted has an outcome, unless the history was cut off
    trials      a change on trial is undone on every rank, to what was before it, or kept on every rank: where its
                condition holds or an operator withdrew its undoing, and somebody was told so; every step is trained
                with what was applied by then; the next attempt goes on with what operators have set, which is what rank
                0 had when it told of its last change, or later (trials.py)
    attempts    agreement is within an attempt, whose ranks died where another one followed; no id is applied in two
                attempts; all ranks begin one at the same step, where a restart's checkpoint says, and behind no
                checkpoint that was told; what a restart or an abort has ended is over when that is told; operators see
                one run, and its attempt never goes back (attempts.py)
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from attempts import Begun, Seen, Trained, attempts, attempts_of, ended_at_once
from trials import trials

from trainctl.store.audit import verify_lines
from trainctl.wire.commands import FINAL_COMMAND_STATES, Command

Fate = Literal["lives", "left", "died"]
UNTOUCHED = frozenset({"rejected", "conflict", "expired", "superseded"})
_ORDER = {"accepted": 0, "scheduled": 1}


@dataclass(frozen=True, kw_only=True)
class Applied:
    """One rank applied one command. `time` is on the clock of the audit log; `after` is the value it made."""

    id: str
    step: int
    incarnation: int = 1
    after: object = None
    time: float = float("inf")
    attempt: int = 1


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The change of this id was on trial no more on a rank, though nothing was applied. `behind` so many commands."""

    id: str
    step: int
    incarnation: int = 1
    behind: int = 0
    attempt: int = 1


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """What one rank wrote down, over all attempts, the newest of which it lives in. `left`: its loop was over; `died`:
    it was killed, or ended itself, as all ranks of the attempts before.

    `begun` and `trained`: its attempts and its steps, where it wrote them down. `values` and `on_trial`: what it had in
    the end, by name, and the changes still on trial; None where nobody looked.
    """

    rank: int
    applied: Sequence[Applied] = ()
    fate: Fate = "lives"
    kept: Sequence[Kept] = ()
    values: Mapping[str, object] = field(default_factory=dict)
    on_trial: frozenset[str] | None = None
    begun: Sequence[Begun] = ()
    trained: Sequence[Trained] = ()


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one operator heard of one command. `own` is what its client library concluded without being told.

    `incarnation` with the step of what is applied, None where nobody looked.
    """

    operator: str
    id: str
    state: str
    step: int | None = None
    after: object = None
    own: bool = False
    incarnation: int | None = None


@dataclass(frozen=True, kw_only=True)
class History:
    """`told` in the order in which each operator heard it; `outcomes` as the run's record has them at the end.

    `unaudited` are ids that may have no line: the hub could not write, and the command was one to stop or save.
    `commands` as they were sent, by id; `initial` values by name; `notes` that rank 0 made, None where nobody looked.
    `seen`: what operators saw of the run, in order; `checkpoints`: the steps of those that a restart was asked for.
    """

    ranks: Sequence[RankRecord]
    told: Sequence[Told] = ()
    audit: Sequence[str] = ()
    outcomes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    unaudited: frozenset[str] = frozenset()
    complete: bool = True
    commands: Mapping[str, Command] = field(default_factory=dict)
    initial: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] | None = None
    seen: Sequence[Seen] = ()
    checkpoints: Mapping[str, int] = field(default_factory=dict)


def problems(history: History) -> list[str]:
    """Everything that is inconsistent in a history, in words; empty when it holds."""
    rules: list[Callable[[History], Iterator[str]]] = [
        _once,
        _agreement,
        _truth,
        _one_outcome,
        _superseded,
        _audited,
        _chain,
        _ended,
        trials,
        attempts,
    ]
    return [f"{rule.__name__.strip('_')}: {problem}" for rule in rules for problem in rule(history)]


def _by_rank(history: History) -> dict[str, dict[int, Applied]]:
    found: dict[str, dict[int, Applied]] = {}
    for record in history.ranks:
        for applied in record.applied:
            found.setdefault(applied.id, {})[record.rank] = applied
    return found


def _once(history: History) -> Iterator[str]:
    for record in history.ranks:
        ids = [applied.id for applied in record.applied]
        for twice in sorted({name for name in ids if ids.count(name) > 1}):
            yield f"rank {record.rank} applied {twice} {ids.count(twice)} times"


def _agreement(history: History) -> Iterator[str]:
    # An evaluation that raised on some ranks is one that failed, however it went on the others.
    partly = _of_commands(history, {"eval"}) & _failed(history)
    numbers = attempts_of(history)
    for number in numbers:
        sequences = {
            record.rank: [one.id for one in record.applied if one.attempt == number and one.id not in partly]
            for record in history.ranks
        }
        fates = {record.rank: record.fate if number == numbers[-1] else "died" for record in history.ranks}
        yield from _alike(sequences, fates)
    for name, ranks in _by_rank(history).items():
        for what in ("step", "incarnation", "attempt", "after"):
            if len({repr(getattr(applied, what)) for applied in ranks.values()}) > 1:
                each = {rank: getattr(applied, what) for rank, applied in ranks.items()}
                yield f"the ranks applied {name} at different {what}: {each}"


def _failed(history: History) -> set[str]:
    """By whatever was said of it: the run's record is not read where the hub is gone in the end."""
    recorded = {name for name, state in history.outcomes.items() if state == "failed"}
    told = {told.id for told in history.told if not told.own and told.state == "failed"}
    return recorded | told | {str(entry["id"]) for entry in _entries(history) if entry.get("state") == "failed"}


def _alike(sequences: Mapping[int, list[str]], fates: Mapping[int, str]) -> Iterator[str]:
    """By rank, what each applied in one attempt: the same, as far as it lived."""
    longest_rank, longest = max(sequences.items(), key=lambda item: len(item[1]))
    for rank, own in sequences.items():
        if own != longest[: len(own)]:
            yield f"rank {rank} applied {own}, rank {longest_rank} {longest}"
        elif len(own) < len(longest) and fates[rank] != "died":
            missed = longest[len(own) :]
            yield f"rank {rank} {fates[rank]} and did not apply {missed}, which rank {longest_rank} did"


def _truth(history: History) -> Iterator[str]:
    everybody = {record.rank for record in history.ranks}
    applied = _by_rank(history)
    alone = _of_commands(history, _ALONE) | ended_at_once(history)
    recorded = {(name, state) for name, state in history.outcomes.items() if state == "applied"}
    said = {(told.id, told.state, told.step, repr(told.after)): told for told in history.told if not told.own}
    for told in said.values():
        ranks = applied.get(told.id, {})
        if told.state == "applied" and not everybody <= ranks.keys() and told.id not in alone:
            missing = sorted(everybody - ranks.keys())
            yield f"{told.operator} was told that {told.id} is applied; ranks {missing} did not"
        if told.state == "applied" and told.step is not None:
            yield from (
                f"{told.operator} was told step {told.step}, after {told.after!r} of {told.id}; rank {rank} has "
                f"step {own.step}, after {own.after!r}"
                for rank, own in ranks.items()
                if (own.step, repr(own.after)) != (told.step, repr(told.after))
            )
        if told.state == "applied" and told.incarnation is not None:
            yield from (
                f"{told.operator} was told incarnation {told.incarnation} of {told.id}; rank {rank} has "
                f"{own.incarnation}"
                for rank, own in ranks.items()
                if own.incarnation != told.incarnation
            )
    for name, state in sorted({(told.id, told.state) for told in said.values()} | set(history.outcomes.items())):
        ranks = applied.get(name, {})
        if (name, state) in recorded and not everybody <= ranks.keys() and name not in alone:
            yield f"the run's record says that {name} is applied; ranks {sorted(everybody - ranks.keys())} did not"
        if state in UNTOUCHED and ranks:
            yield f"{name} was told to be {state}; ranks {sorted(ranks)} applied it"
        if state == "failed" and ranks.keys() == everybody:
            yield f"{name} was told to have failed; every rank applied it"


_ALONE = frozenset({"note", "cancel", "checkpoint pin", "checkpoint unpin"})  # the hub carries them out


def _of_commands(history: History, names: Collection[str]) -> set[str]:
    return {entry["id"] for entry in _entries(history) if entry.get("command") in names}


def _one_outcome(history: History) -> Iterator[str]:
    final: dict[str, dict[str, str]] = {}

    def hear(name: str, state: str, source: str) -> None:
        if state in FINAL_COMMAND_STATES and state != "unknown":
            final.setdefault(name, {}).setdefault(state, source)

    for operator in sorted({told.operator for told in history.told}):
        newest: dict[str, str] = {}
        for told in (told for told in history.told if told.operator == operator and not told.own):
            before = newest.get(told.id)
            if before in FINAL_COMMAND_STATES and before not in {"unknown", told.state}:
                yield f"{operator} was told that {told.id} is {before}, and later that it is {told.state}"
            elif before in _ORDER and told.state in _ORDER and _ORDER[told.state] < _ORDER[before]:
                yield f"{operator} was told that {told.id} is {before}, and later only {told.state}"
            newest[told.id] = told.state
            hear(told.id, told.state, operator)
    for entry in _entries(history):
        hear(str(entry.get("id")), str(entry.get("state")), "the audit log")
    for name, state in history.outcomes.items():
        hear(name, state, "the run's record")
    for name, states in final.items():
        if len(states) > 1:
            yield f"{name} has {len(states)} outcomes: {states}"


def _superseded(history: History) -> Iterator[str]:
    """By one that took its place: an operator who sent both must not be left with neither."""
    for name, state in history.outcomes.items():
        words = re.search(r"sent (\S+) in its place", history.reasons.get(name, ""))
        if state == "superseded" and words is not None:
            newer = history.outcomes.get(words[1])
            if newer not in {"applied", "superseded", "unknown"}:
                yield f"{name} was superseded by {words[1]}, which is {newer}"


def _audited(history: History) -> Iterator[str]:
    accepted: dict[str, float] = {}
    for entry in _entries(history):
        if entry.get("state") == "accepted":
            accepted.setdefault(str(entry.get("id")), float(entry.get("time", "-inf")))
    for name, ranks in _by_rank(history).items():
        asked = re.sub(r"\.undo(\.\d+)?$", "", name)  # an undoing was audited with the change that it undoes
        if asked in history.unaudited or asked.startswith("auto-resume-"):
            continue
        if asked not in accepted:
            yield f"{name} was applied and the audit log has no line that it was accepted"
        elif min(applied.time for applied in ranks.values()) < accepted[asked]:
            yield f"{name} was applied before the audit log's line of it was made"


def _chain(history: History) -> Iterator[str]:
    if (problem := verify_lines(history.audit)) is not None:
        yield f"the audit log is not whole: {problem}"


def _ended(history: History) -> Iterator[str]:
    if not history.complete:
        return
    taken = {told.id for told in history.told if told.state == "accepted"}
    taken |= {str(entry["id"]) for entry in _entries(history) if entry.get("state") == "accepted"}
    for name in sorted(taken):
        if history.outcomes.get(name) not in FINAL_COMMAND_STATES:
            yield f"{name} was accepted and has no outcome: {history.outcomes.get(name)}"


def _entries(history: History) -> list[dict[str, Any]]:
    found = []
    for line in history.audit:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the chain's rule says so
        if isinstance(entry, dict):
            found.append(entry)
    return found
