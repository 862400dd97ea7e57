"""The checker of histories is itself checked: a good history passes, and each rule finds what it is there for."""

from dataclasses import replace
from pathlib import Path

import pytest
from history import Applied, History, Kept, RankRecord, Told, problems
from trials import trials

from trainctl.store.audit import AuditLog
from trainctl.wire.commands import Cancel, Command, Rollback, SetTunable


def audit(path: Path, *entries: tuple[str, str, float]) -> list[str]:
    log = AuditLog(path / "audit.jsonl")
    for name, state, at in entries:
        log.append({"id": name, "state": state, "time": at, "command": "set"})
    return log.lines(100)


@pytest.fixture
def good(tmp_path: Path) -> History:
    """Two commands: one is applied on both ranks, one is rejected."""
    done = (Applied(id="a", step=5, after=1, time=2.0),)
    told = [Told(operator="mk", id="a", state=state) for state in ("accepted", "scheduled")]
    told += [Told(operator="mk", id="a", state="applied", step=5, after=1)]
    told += [Told(operator="mk", id="b", state="rejected")]
    return History(
        ranks=(RankRecord(rank=0, applied=done), RankRecord(rank=1, applied=done)),
        told=told,
        audit=audit(tmp_path, ("a", "accepted", 1.0), ("a", "applied", 3.0), ("b", "rejected", 3.0)),
        outcomes={"a": "applied", "b": "rejected"},
    )


def rank_1(history: History, *applied: Applied, fate: str = "lives") -> History:
    return replace(history, ranks=(history.ranks[0], RankRecord(rank=1, applied=applied, fate=fate)))  # type: ignore[arg-type]


def both(history: History, *applied: Applied) -> History:
    return replace(history, ranks=tuple(replace(record, applied=applied) for record in history.ranks))


def test_a_history_that_holds_has_no_problems(good: History) -> None:
    assert problems(good) == []


def test_a_rank_that_lives_and_missed_a_command_is_found(good: History) -> None:
    found = " ".join(problems(rank_1(good)))
    assert "rank 1 lives and did not apply ['a'], which rank 0 did" in found
    assert "mk was told that a is applied; ranks [1] did not" in found


def test_a_rank_that_left_its_loop_and_missed_a_command_is_found(good: History) -> None:
    outcomes = {"a": "failed", "b": "rejected"}
    failed = replace(rank_1(good, fate="left"), told=[], outcomes=outcomes, audit=good.audit[:1])
    assert problems(failed) == ["agreement: rank 1 left and did not apply ['a'], which rank 0 did"]


def test_a_killed_rank_may_have_missed_what_nobody_was_told_is_applied(good: History) -> None:
    told = [told for told in good.told if told.id == "b"]
    lost = replace(
        rank_1(good, fate="died"), told=told, outcomes={"a": "unknown", "b": "rejected"}, audit=good.audit[:1]
    )
    assert problems(lost) == []
    assert problems(rank_1(good, fate="died")), "but not what somebody was told is applied"


@pytest.mark.parametrize(
    ("applied", "words"),
    [
        (Applied(id="a", step=6, after=1, time=2.0), "at different step: {0: 5, 1: 6}"),
        (Applied(id="a", step=5, after=2, time=2.0), "at different after: {0: 1, 1: 2}"),
        (Applied(id="a", step=5, after=1, time=2.0, incarnation=2), "at different incarnation"),
    ],
)
def test_ranks_that_disagree_on_what_or_where_are_found(good: History, applied: Applied, words: str) -> None:
    assert any(words in problem for problem in problems(rank_1(good, applied)))


def test_another_order_is_found(good: History, tmp_path: Path) -> None:
    first, second = good.ranks[0].applied[0], Applied(id="c", step=5, time=2.0)
    mixed = replace(rank_1(good, second, first), outcomes={})
    mixed = replace(mixed, ranks=(replace(mixed.ranks[0], applied=(first, second)), mixed.ranks[1]))
    assert any("rank 1 applied ['c', 'a'], rank 0 ['a', 'c']" in problem for problem in problems(mixed))


def test_a_command_that_is_applied_twice_is_found(good: History) -> None:
    done = good.ranks[0].applied[0]
    assert any("rank 0 applied a 2 times" in problem for problem in problems(both(good, done, done)))


@pytest.mark.parametrize("state", ["rejected", "conflict", "expired", "superseded"])
def test_who_was_told_that_nothing_happened_was_told_the_truth(good: History, state: str) -> None:
    told = [Told(operator="mk", id="a", state="accepted"), Told(operator="mk", id="a", state=state)]
    found = problems(replace(good, told=told, outcomes={"a": state}, audit=good.audit[:1]))
    assert found == [f"truth: a was told to be {state}; ranks [0, 1] applied it"]


def test_a_command_that_was_superseded_by_one_that_came_to_nothing_is_found(good: History) -> None:
    reasons = {"old": "mk sent b in its place"}
    lost = replace(good, outcomes=good.outcomes | {"old": "superseded"}, reasons=reasons)
    assert problems(lost) == ["superseded: old was superseded by b, which is rejected"]
    assert not problems(replace(lost, reasons={"old": "mk sent a in its place"}))


def test_a_failure_that_every_rank_applied_is_found(good: History) -> None:
    found = problems(replace(good, told=[], outcomes={"a": "failed"}, audit=good.audit[:1]))
    assert found == ["truth: a was told to have failed; every rank applied it"]


def test_another_step_or_value_than_was_told_is_found(good: History) -> None:
    wrong = Told(operator="mk", id="a", state="applied", step=6, after=1)
    assert any("was told step 6" in problem for problem in problems(replace(good, told=[wrong])))


def test_two_outcomes_are_found_wherever_they_are_told(good: History) -> None:
    other = [*good.told, Told(operator="jo", id="a", state="expired")]
    assert any("a has 2 outcomes" in problem for problem in problems(replace(good, told=other)))
    assert any("a has 2 outcomes" in problem for problem in problems(replace(good, outcomes={"a": "failed"})))


def test_an_outcome_that_changes_is_found_and_unknown_may_become_known(good: History) -> None:
    changed = [*good.told, Told(operator="mk", id="b", state="applied")]
    assert any(
        "mk was told that b is rejected, and later that it is applied" in found
        for found in problems(replace(good, told=changed))
    )
    backwards = [Told(operator="mk", id="a", state="scheduled"), Told(operator="mk", id="a", state="accepted")]
    assert any("later only accepted" in found for found in problems(replace(good, told=backwards)))
    learned = [Told(operator="mk", id="a", state="unknown"), *good.told[2:]]
    assert problems(replace(good, told=learned)) == []
    own = [Told(operator="mk", id="b", state="conflict", own=True), *good.told]
    assert problems(replace(good, told=own)) == [], "what a client concluded by itself is not the hub's word"


def test_what_was_applied_without_a_line_before_it_is_found(good: History, tmp_path: Path) -> None:
    assert any("no line that it was accepted" in found for found in problems(replace(good, audit=())))
    early = Applied(id="a", step=5, after=1, time=0.5)
    assert problems(both(good, early)) == ["audited: a was applied before the audit log's line of it was made"]
    assert problems(replace(good, audit=(), unaudited=frozenset({"a"}))) == []
    (tmp_path / "audit.jsonl").unlink()
    undone = Applied(id="a.undo", step=9, time=4.0)
    assert not [found for found in problems(both(good, *good.ranks[0].applied, undone)) if "audited" in found]


def test_an_edited_audit_log_is_found(good: History) -> None:
    edited = [line.replace("rejected", "expired") for line in good.audit]
    assert any("chain: the audit log is not whole: line 3" in found for found in problems(replace(good, audit=edited)))
    assert any("chain" in found for found in problems(replace(good, audit=good.audit[1:])))


def test_a_command_without_an_end_is_found(good: History) -> None:
    open_ended = replace(good, outcomes={"a": "scheduled", "b": "rejected"})
    assert problems(open_ended) == ["ended: a was accepted and has no outcome: scheduled"]
    assert problems(replace(open_ended, complete=False)) == []


CHANGED = Applied(id="c", step=5, after=7)


def trial(
    *applied: Applied, kept: tuple[Kept, ...] = (), unless: str | None = None, x: int = 0, notes: tuple[str, ...] = ()
) -> History:
    """`c` sets x from 0 to 7 for three steps on two ranks; `d` sets it to 9 for good, `back` goes back to step 2."""
    trying = Command(id="c", action=SetTunable(name="x", value=7), revert_after=3, unless=unless)
    newer = Command(id="d", action=SetTunable(name="x", value=9))
    sent = [trying, newer, Command(id="back", action=Rollback(target="last"))]
    ranks = [RankRecord(rank=rank, applied=(CHANGED, *applied), kept=kept, values={"x": x}) for rank in (0, 1)]
    return History(ranks=ranks, commands={one.id: one for one in sent}, initial={"x": 0}, notes=notes)


KEPT = Kept(id="c", step=8, behind=1)
TOLD = "step > 0 holds: the change of command c stays"


@pytest.mark.parametrize(
    "history",
    [
        trial(x=7),  # its time is not over
        trial(Applied(id="c.undo", step=8, after=0)),
        trial(Applied(id="c.undo", step=9, after=0), unless="step < 0"),
        trial(kept=(KEPT,), unless="step > 0", x=7, notes=(TOLD,)),
        trial(Applied(id="d", step=6, after=9), x=9),
        trial(Applied(id="back", step=6, after=2), Applied(id="c.undo.2", step=5, after=0)),
    ],
)
def test_a_trial_that_ends_as_it_should_holds(history: History) -> None:
    assert list(trials(history)) == []


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (trial(x=0), "has x 0 in the end, and not 7"),
        (trial(Applied(id="c.undo", step=7, after=0)), "undid c at step 7, and not at 8"),
        (trial(Applied(id="c.undo", step=8, after=1), x=1), "x is 1, and was 0 before"),
        (trial(Applied(id="c.undo", step=8, after=0), unless="step > 0"), "undid c at step 8, where step > 0 holds"),
        (trial(Applied(id="d", step=6, after=9), Applied(id="c.undo", step=8, after=0)), "c was not on trial"),
        (trial(Applied(id="back", step=6, after=2), Applied(id="c.undo", step=4, after=0)), "at step 4, and not at 5"),
        (trial(kept=(KEPT,), unless="step < 0", x=7, notes=(TOLD,)), "nobody withdrew its undoing"),
        (trial(kept=(KEPT,), unless="step > 0", x=7), "c was kept, and nobody was told why"),
    ],
)
def test_a_trial_that_ends_otherwise_is_found(history: History, words: str) -> None:
    assert any(words in problem for problem in trials(history)), list(trials(history))


def test_a_change_that_one_rank_kept_and_another_did_not_is_found() -> None:
    whole = trial(kept=(KEPT,), unless="step > 0", x=7, notes=(TOLD,))
    half = replace(whole, ranks=[whole.ranks[0], replace(whole.ranks[1], kept=())])
    assert any("rank 1 lives and kept []" in problem for problem in trials(half))
    lost = replace(half, ranks=[half.ranks[0], replace(half.ranks[1], fate="died")])
    assert list(trials(lost)) == [], "it was killed before"


def test_an_operator_who_withdraws_an_undoing_keeps_the_change() -> None:
    kept = trial(kept=(KEPT,), unless="step < 0", x=7, notes=("c.undo was cancelled: the change of command c stays",))
    cancel = Command(id="e", action=Cancel(command="c.undo"))
    assert list(trials(replace(kept, commands={**kept.commands, "e": cancel}))) == []


def test_a_reason_that_is_not_true_is_found() -> None:
    undoing = replace(trial(x=7), outcomes={"c.undo": "rejected"})
    for reason, words in ((TOLD, "no rank kept c"), ("d took its place", "which no rank applied")):
        assert any(words in problem for problem in trials(replace(undoing, reasons={"c.undo": reason})))


def test_a_trial_that_is_forgotten_on_a_rank_is_found() -> None:
    found = trial(x=7)
    ranks = [replace(record, on_trial=frozenset[str]()) for record in found.ranks]
    assert any(
        "has [] on trial in the end, and not ['c']" in problem for problem in trials(replace(found, ranks=ranks))
    )
