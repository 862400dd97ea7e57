"""The rules for runs that are started again are themselves checked: each finds what it is there for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attempts import Begun, Seen, Trained, attempts
from history import Applied, History, RankRecord, Told, problems
from trials import trials

from trainctl.store.audit import AuditLog
from trainctl.wire.commands import Abort, CheckpointSave, Command, Restart, SetTunable

SAVED = Applied(id="save", step=4, time=2.0)
SET = Applied(id="set", step=5, after=7, time=3.0)
SECOND = Applied(id="on", step=6, after=9, incarnation=2, attempt=2, time=20.0)
SENT = [
    Command(id="save", action=CheckpointSave()),
    Command(id="set", action=SetTunable(name="x", value=7)),
    Command(id="lost", action=SetTunable(name="x", value=8)),
    Command(id="on", action=SetTunable(name="x", value=9)),
    Command(id="again", action=Restart(target="one")),
    Command(id="end", action=Abort(now=True)),
]


def trained(x: float, *steps: int, attempt: int = 1, start: float = 1.0) -> list[Trained]:
    return [
        Trained(step=step, values={"x": x}, incarnation=attempt, attempt=attempt, time=start + step / 10)
        for step in steps
    ]


def audit(path: Path, *entries: tuple[str, str, float]) -> list[str]:
    (path / "audit.jsonl").unlink(missing_ok=True)
    log = AuditLog(path / "audit.jsonl")
    for name, state, at in entries:
        log.append({"id": name, "state": state, "time": at})
    return log.lines(100)


LOGGED = (
    *(("save", "accepted", 1.0), ("save", "applied", 2.5), ("set", "accepted", 2.6), ("set", "applied", 3.5)),
    *(("lost", "accepted", 4.0), ("again", "accepted", 5.0), ("again", "applied", 6.0), ("lost", "unknown", 6.0)),
    *(("on", "accepted", 19.0), ("on", "applied", 21.0), ("end", "accepted", 30.0), ("end", "applied", 31.0)),
)


@pytest.fixture
def good(tmp_path: Path) -> History:
    """Two ranks and two attempts: a restart ends the first, with a command under way, and an abort the second."""
    begun = (
        Begun(attempt=1, step=0, incarnation=1, time=0.0),
        Begun(attempt=2, step=4, incarnation=2, time=10.0),
    )
    first, second = trained(0, 1, 2, 3, 4, 5) + trained(7, 6), trained(7, 5, 6, attempt=2, start=10)
    record = RankRecord(
        rank=0,
        applied=(SAVED, SET, SECOND),
        fate="died",
        begun=begun,
        trained=first + second + trained(9, 7, attempt=2, start=10),
    )
    outcomes = dict.fromkeys(("save", "set", "on", "again", "end"), "applied") | {"lost": "unknown"}
    return History(
        ranks=(record, replace(record, rank=1)),
        told=[Told(operator="mk", id="on", state="applied", step=6, after=9, incarnation=2)],
        audit=audit(tmp_path, *LOGGED),
        outcomes=outcomes,
        commands={one.id: one for one in SENT},
        initial={"x": 0.0},
        seen=[Seen(operator="mk", run="run", attempt=number) for number in (1, 1, 2)],
        checkpoints={"one": 4},
    )


def both(history: History, **changed: Any) -> History:
    return replace(history, ranks=tuple(replace(record, **changed) for record in history.ranks))


def one(history: History, **changed: Any) -> History:
    return replace(history, ranks=(history.ranks[0], replace(history.ranks[1], **changed)))


def without(records: Sequence[Any], attempt: int) -> list[Any]:
    return [record for record in records if record.attempt != attempt]


LOST = Applied(id="lost", step=6, after=8, time=4.5)


def test_a_run_that_is_started_again_and_holds_has_no_problems(good: History) -> None:
    assert problems(good) == []


def test_what_only_some_ranks_of_an_ended_attempt_applied_is_unknown_or_failed(good: History, tmp_path: Path) -> None:
    half = one(good, applied=(SAVED, SET, LOST, SECOND))
    for state in ("unknown", "failed", "applied", "rejected", "conflict", "expired", "superseded"):
        log = audit(
            tmp_path,
            *((name, state if name == "lost" and told == "unknown" else told, at) for name, told, at in LOGGED),
        )
        found = problems(replace(half, outcomes=good.outcomes | {"lost": state}, audit=log))
        if state in {"unknown", "failed"}:
            assert found == []
        else:
            assert any(problem.startswith("truth: ") for problem in found), state


def test_ranks_of_an_ended_attempt_that_applied_something_else_are_found(good: History) -> None:
    other = one(good, applied=(SET, SAVED, SECOND))
    assert any("rank 1 applied ['set', 'save']" in found for found in problems(other))


def test_a_rank_of_the_newest_attempt_that_lives_and_missed_a_command_is_found(good: History) -> None:
    lives = one(good, applied=(SAVED, SET), trained=without(good.ranks[1].trained, 2), fate="lives")
    assert "agreement: rank 1 lives and did not apply ['on'], which rank 0 did" in problems(lives)


def test_an_id_that_is_applied_again_in_the_next_attempt_is_found(good: History) -> None:
    again = replace(SET, attempt=2, incarnation=2, step=7, time=22.0)
    twice = both(good, applied=(SAVED, SET, SECOND, again))
    assert "attempts: set was applied in attempts [1, 2]" in problems(twice)
    elsewhere = one(good, applied=(SAVED, SECOND, again))
    assert "attempts: set was applied in attempts [1, 2]" in problems(elsewhere)


def begins(history: History, **changed: Any) -> tuple[Begun, Begun]:
    first, second = history.ranks[0].begun
    return first, replace(second, **changed)


@pytest.mark.parametrize("changed", [{"step": 3}, {"incarnation": 3}, {"run": "other"}])
def test_ranks_that_begin_an_attempt_apart_are_found(good: History, changed: dict[str, Any]) -> None:
    found = list(attempts(one(good, begun=begins(good, **changed))))
    assert any("attempt 2 begins at different" in problem for problem in found)


def test_an_attempt_in_the_incarnation_of_the_one_before_is_found(good: History) -> None:
    found = list(attempts(both(good, begun=begins(good, incarnation=1))))
    assert any("attempt 2 begins incarnation 1, after 1" in problem for problem in found)


def test_a_rank_that_lives_and_did_not_begin_the_newest_attempt_is_found(good: History) -> None:
    stays = one(good, begun=good.ranks[0].begun[:1], fate="lives")
    assert "rank 1 lives and never began attempt 2" in list(attempts(stays))


def test_another_first_step_than_the_beginning_says_is_found(good: History) -> None:
    skipped = [step for step in good.ranks[0].trained if (step.attempt, step.step) != (2, 5)]
    found = list(attempts(both(good, trained=skipped)))
    assert any("began attempt 2 behind step 4 of incarnation 2, and its first step was 6 of 2" in one for one in found)


def test_ranks_that_trained_a_step_with_different_values_are_found(good: History) -> None:
    steps = [replace(step, values={"x": 1.0}) if step.step == 2 else step for step in good.ranks[1].trained]
    assert any("step 2 of incarnation 1 was trained with" in found for found in attempts(one(good, trained=steps)))


def test_a_restart_that_is_told_while_a_rank_goes_on_is_found(good: History) -> None:
    late = [*good.ranks[0].trained[:5], *trained(7, 6, start=6.0), *good.ranks[0].trained[6:]]
    found = list(attempts(both(good, trained=late)))
    assert "again has ended attempt 1, and rank 0 goes on at step 6" in found
    applied = (SAVED, SET, replace(LOST, time=6.5), SECOND)
    assert any("rank 0 goes on at step 6" in problem for problem in attempts(both(good, applied=applied)))


def test_a_restart_from_another_checkpoint_than_was_asked_for_is_found(good: History) -> None:
    found = list(attempts(replace(good, checkpoints={"one": 3})))
    assert found == ["again restarts from one, which is of step 3, and attempt 2 begins behind step 4"]


def test_a_restart_that_nothing_follows_and_an_abort_that_something_follows_are_found(good: History) -> None:
    first = both(good, applied=(SAVED, SET), begun=good.ranks[0].begun[:1], trained=good.ranks[0].trained[:6])
    found = list(attempts(replace(first, seen=good.seen[:1])))
    assert "again has restarted the run, and no attempt followed" in found
    third = both(good, begun=(*good.ranks[0].begun, Begun(attempt=3, step=4, incarnation=3, time=40.0)))
    assert "end has aborted the run, and attempt 3 followed" in list(attempts(third))


def test_a_checkpoint_that_was_told_and_is_lost_is_found(good: History) -> None:
    last = {**good.commands, "again": Command(id="again", action=Restart())}
    lost = replace(both(good, begun=begins(good, step=2)), commands=last)
    assert "save saved step 4, and attempt 2 begins behind step 2" in list(attempts(lost))
    assert not [found for found in attempts(replace(good, commands=last)) if "saved" in found]
    asked = replace(both(good, begun=begins(good, step=2)), checkpoints={"one": 2})
    assert not [found for found in attempts(asked) if "saved" in found], "an operator asked for an older one"


def test_what_operators_see_of_attempts_is_checked(good: History) -> None:
    for seen, words in (
        ([*good.seen, Seen(operator="mk", run="run", attempt=1)], "mk saw attempt 2, and later 1"),
        (good.seen[:2], "mk saw attempt 1 in the end, and it was 2"),
        ([*good.seen, Seen(operator="jo", run="other", attempt=2)], "there are 2 runs: ['other', 'run']"),
    ):
        assert words in list(attempts(replace(good, seen=seen)))


def test_another_incarnation_than_was_told_is_found(good: History) -> None:
    told = [replace(good.told[0], incarnation=1)]
    assert any("was told incarnation 1 of on; rank 0 has 2" in found for found in problems(replace(good, told=told)))


def second(history: History, x: float) -> list[Trained]:
    """The steps with another value at the beginning of the second attempt."""
    return [
        replace(step, values={"x": x}) if step.attempt == 2 and step.step < 7 else step
        for step in history.ranks[0].trained
    ]


def test_what_an_operator_has_set_is_there_in_the_next_attempt(good: History) -> None:
    found = list(trials(both(good, trained=second(good, 0.0))))
    assert any("trained step 5 of attempt 2 with x 0.0, and 7 was set" in problem for problem in found)
    silent = replace(good, outcomes=good.outcomes | {"set": "unknown"})
    assert list(trials(both(silent, trained=second(good, 0.0)))) == [], "nobody was told that it is set"
    half = both(good, applied=(SAVED, SET, LOST, SECOND), trained=second(good, 8.0))
    assert list(trials(half)) == [], "nobody was told, and it may have been written down"
    apart = replace(half, ranks=(half.ranks[0], replace(half.ranks[1], applied=(SAVED, SET, SECOND))))
    assert list(trials(apart)) == [], "on a rank, too, that was ended before it"


def test_a_step_that_is_trained_with_something_else_than_was_applied_is_found(good: History) -> None:
    early = [
        replace(step, values={"x": 7}) if step.step == 5 and step.attempt == 1 else step
        for step in good.ranks[0].trained
    ]
    found = list(trials(both(good, trained=early)))
    assert "rank 0 trained step 5 of attempt 1 with x 7, and 0.0 was set" in found


def test_a_trial_goes_on_in_the_next_attempt(good: History) -> None:
    """It began behind step 5, and begins anew where the next attempt does, behind step 4."""
    trying = {**good.commands, "set": Command(id="set", action=SetTunable(name="x", value=7), revert_after=3)}
    for step, after, words in (
        (7, 0.0, ""),
        (6, 0.0, "undid set at step 6, and not at 7"),
        (7, 1.0, "and was 0.0 before"),
    ):
        undone = Applied(id="set.undo", step=step, after=after, incarnation=2, attempt=2, time=12.0)
        steps = [
            replace(one, values={"x": after if one.attempt == 2 and one.step > step else one.values["x"]})
            for one in good.ranks[0].trained
        ]
        steps = (
            [replace(one, values={"x": 7}) if (one.attempt, one.step) == (2, 7) else one for one in steps]
            if step == 7
            else steps
        )
        found = list(trials(replace(both(good, applied=(SAVED, SET, undone), trained=steps), commands=trying)))
        assert (not found) if not words else any(words in problem for problem in found), found
