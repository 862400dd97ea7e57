"""Two commands at once: the table of wire/precedence.py, row by row."""

from pathlib import Path

import pytest

from trainctl.wire import precedence
from trainctl.wire.commands import (
    Abort,
    Act,
    AddNote,
    CheckpointSave,
    Command,
    Evaluate,
    LrRelease,
    LrScale,
    LrSet,
    Pause,
    Restart,
    Resume,
    Rollback,
    SetTunable,
    Stop,
)
from trainctl.wire.precedence import Relation, UnderWay, conflict_reason, outcome, relation

DECAY_ALL, DECAY_0, DECAY_1 = (SetTunable(name="weight_decay", value=0.1, group=group) for group in (None, 0, 1))
LR, CLIP, STEPS = LrSet(value=1e-4), SetTunable(name="clip", value=1.0), SetTunable(name="accumulation", value=4)


def under_way(action: Act, actor: str = "dana", *, scheduled: bool = False) -> UnderWay:
    return UnderWay(command=Command(id="older", action=action), actor=actor, scheduled=scheduled)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("newer", "older", "same_operator", "another"),
    [
        (Pause(), Stop(), "conflict", "conflict"),
        (LR, Abort(), "conflict", "conflict"),
        (CheckpointSave(), Restart(), "conflict", "conflict"),
        (Stop(), Stop(), "conflict", "conflict"),
        (Abort(), Stop(), "queue", "queue"),
        (Abort(now=True), Stop(), "queue", "queue"),
        (Restart(), Stop(), "queue", "queue"),
        (Abort(now=True), Abort(), "queue", "queue"),
        (Restart(), Abort(), "queue", "queue"),
        (Abort(), Abort(), "conflict", "conflict"),
        (Stop(), Abort(), "conflict", "conflict"),
        (Abort(), Abort(now=True), "conflict", "conflict"),
        (Abort(now=True), Restart(), "conflict", "conflict"),
        (Abort(now=True), Abort(now=True), "conflict", "conflict"),
        (Restart(), Abort(now=True), "conflict", "conflict"),
        (AddNote(text="x"), Stop(), "queue", "queue"),
        (LR, LrScale(factor=0.5), "supersede", "conflict"),
        (LrRelease(), LR, "supersede", "conflict"),
        (LrScale(factor=0.5), LR, "queue", "conflict"),
        (LrSet(value=1e-4, group=1), LrSet(value=1e-3, group=0), "queue", "conflict"),
        (LrSet(value=1e-4, group=1), LrSet(value=1e-3, group=1), "supersede", "conflict"),
        (CLIP, SetTunable(name="clip", value=2.0), "supersede", "conflict"),
        (CLIP, STEPS, "queue", "queue"),
        (DECAY_1, DECAY_0, "queue", "conflict"),
        (DECAY_1, DECAY_1, "supersede", "conflict"),
        (DECAY_ALL, DECAY_0, "supersede", "conflict"),
        (DECAY_0, DECAY_ALL, "queue", "conflict"),
        (Resume(), Pause(), "queue", "conflict"),
        (Pause(), Pause(), "queue", "conflict"),
        (LR, Rollback(target="last"), "queue", "conflict"),
        (Rollback(target="last"), CLIP, "queue", "conflict"),
        (Rollback(target="last"), Rollback(target="best"), "queue", "conflict"),
        (CheckpointSave(), Rollback(target="last"), "queue", "queue"),
        (CheckpointSave(), CheckpointSave(), "queue", "queue"),
        (Evaluate(), Pause(), "queue", "queue"),
        (Pause(), LR, "queue", "queue"),
        (Stop(), Rollback(target="last"), "queue", "queue"),
    ],
    ids=str,
)
def test_what_becomes_of_the_newer(newer: Act, older: Act, same_operator: Relation, another: Relation) -> None:
    assert relation(newer, "dana", under_way(older)) == same_operator
    assert relation(newer, "kim", under_way(older)) == another


def test_the_documented_table_is_the_one_in_the_code() -> None:
    table = [line for line in str(precedence.__doc__).splitlines() if line.startswith("|")]
    documented = Path(__file__).parents[2].joinpath("docs", "commands.md").read_text(encoding="utf-8")
    assert len(table) == 12
    assert "\n".join(table) in documented


def test_what_is_scheduled_is_not_superseded_any_more() -> None:
    assert relation(LR, "dana", under_way(LR, scheduled=True)) == "queue"


@pytest.mark.parametrize("newer", [Abort(now=True), Restart()], ids=str)
def test_what_needs_no_boundary_gets_by_an_abort_that_comes_to_none(newer: Act) -> None:
    assert relation(newer, "kim", under_way(Abort(), scheduled=True)) == "queue"


def test_one_conflict_outweighs_everything() -> None:
    pending = [under_way(LR, "dana"), under_way(CLIP, "kim"), under_way(LrScale(factor=2), "kim")]
    conflict, superseded = outcome(LR, "dana", pending)
    assert (conflict, superseded) == (pending[2], [])
    assert outcome(LR, "dana", pending[:2]) == (None, [pending[0]])


def test_a_conflict_says_who_and_what_and_what_to_do() -> None:
    said = conflict_reason(LR, under_way(LrScale(factor=2), "kim"))
    assert all(word in said for word in ("kim", "lr scale", "older", "accepted", "send yours again"))
    assert "the run is ending" in conflict_reason(LR, under_way(Stop(), scheduled=True))
