"""Every interleaving of one proposal, walked through: all ranks apply it at its boundary, or none does, nobody hangs.

The model has what can interleave: each control thread arms, then reads how far training is; each training thread
goes to its next boundary, then reads whether something is armed; rank 0 decides; a rank at its boundary may lose
patience. Ranks are tied by a collective in each step, as in DDP, and by one behind each evaluation: nobody goes on
before all have come as far. Behind step 1 there are evaluations, of other lengths and numbers on other ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from trainctl.trainer.agreement import Answer, Position, answer, judge

LAST = 4


@dataclass(frozen=True)
class Place:
    """One stop on a rank's way. `looks`: whether the training thread reads there what is armed, and from where."""

    at: Position
    looks: bool = True
    inside: bool = False
    behind: int = 0  # how many collectives lie before it


def way(*evaluations: int, on_eval: int | None = 1) -> list[Place]:
    """What a rank passes: `on_eval`, so many times, and in each evaluations of so many batches. None: there is none."""
    if on_eval is None:
        return [Place(Position(step), behind=max(0, step)) for step in range(LAST + 1)]
    at = Position(1)
    places = [Place(Position(0)), Place(at, looks=False, behind=1)]
    for _ in range(on_eval):
        returned = at.returns()
        for batches in evaluations:
            at = at.begins()
            places.append(Place(at, looks=False, behind=1))
            places += [Place(Position(1, at.mark + done), inside=True, behind=1) for done in range(1, batches + 1)]
            at = at.ends()
            places.append(Place(at, inside=True, behind=1))
        at = returned
        places.append(Place(at, inside=True, behind=1))
    places.append(Place(at, behind=2))  # then the step's own boundary
    return places + [Place(Position(step), behind=step + 1) for step in range(2, LAST + 1)]


@dataclass(frozen=True)
class Rank:
    passed: int = 0
    looking: bool = False  # went on, has not yet read what is armed
    armed: bool = False
    given: Answer | None = None
    waiting: bool = False  # at its armed boundary
    applied: Position | None = None


@dataclass(frozen=True)
class World:
    ranks: tuple[Rank, ...]
    proposed: Position
    decision: str | None = None

    def with_rank(self, index: int, rank: Rank) -> "World":
        return replace(self, ranks=(*self.ranks[:index], rank, *self.ranks[index + 1 :]))


def decided(world: World, wanted: str) -> World:
    """Compare-and-set: the first to write wins."""
    return world if world.decision else replace(world, decision=wanted)


class Model:
    """`ways`: what each rank passes."""

    def __init__(self, ways: list[list[Place]]) -> None:
        self.ways = ways

    def place(self, world: World, index: int) -> Place:
        return self.ways[index][world.ranks[index].passed]

    def moves(self, world: World) -> Iterator[World]:
        answers = [rank.given for rank in world.ranks]
        if world.decision is None and all(given is not None for given in answers):
            verdict, _ = judge([given for given in answers if given is not None])
            yield decided(world, "go" if verdict == "go" else "abort")
        for index in range(len(world.ranks)):
            yield from self.control_moves(world, index)
            yield from self.training_moves(world, index)

    def control_moves(self, world: World, index: int) -> Iterator[World]:
        rank = world.ranks[index]
        if rank.given is None and not rank.armed:
            yield world.with_rank(index, replace(rank, armed=True))
        if rank.given is None and rank.armed:
            given = answer(world.proposed, at=self.place(world, index).at, held_at=None, refusal=None)
            yield world.with_rank(index, replace(rank, given=given))

    def training_moves(self, world: World, index: int) -> Iterator[World]:
        rank, place = world.ranks[index], self.place(world, index)
        if rank.waiting:
            if world.decision is None:
                yield decided(world, "abort")  # patience ran out
            else:
                applied = world.proposed if world.decision == "go" else None
                yield world.with_rank(index, replace(rank, waiting=False, armed=False, applied=applied))
        elif rank.looking:
            meets = rank.armed and place.looks and place.at.meets(world.proposed)
            meets = meets and not (place.inside and not world.proposed.mark)
            yield world.with_rank(index, replace(rank, looking=False, waiting=meets))
        elif rank.passed + 1 < len(self.ways[index]) and self.may_go_on(world, index):
            yield world.with_rank(index, replace(rank, passed=rank.passed + 1, looking=True))

    def may_go_on(self, world: World, index: int) -> bool:
        """Whether all others have reached the collectives that lie before the next stop."""
        following = self.ways[index][world.ranks[index].passed + 1].behind
        return all(self.reaches(world, other) >= following for other in range(len(world.ranks)) if other != index)

    def reaches(self, world: World, index: int) -> int:
        """How many collectives a rank has entered: the one before its next stop, once it has nothing else to do."""
        rank, mine = world.ranks[index], self.ways[index]
        here = mine[rank.passed].behind
        if rank.waiting or rank.looking or rank.passed + 1 == len(mine):
            return here
        return max(here, mine[rank.passed + 1].behind)


def walk(ways: list[list[Place]], proposed: Position) -> set[str]:
    """Go through all interleavings; the decisions that were met."""
    model, start = Model(ways), World(ranks=(Rank(),) * len(ways), proposed=proposed)
    seen, todo = {start}, [start]
    outcomes: set[str] = set()
    while todo:
        world = todo.pop()
        following = [found for found in model.moves(world) if found != world]
        if not following:
            ended = all(rank.passed + 1 == len(mine) for rank, mine in zip(world.ranks, ways, strict=True))
            assert ended, f"somebody hangs: {world}"
            applied = {rank.applied for rank in world.ranks}
            assert len(applied) == 1, f"half a command: {world}"
            assert (applied == {proposed}) == (world.decision == "go")
            outcomes.add(str(world.decision))
        for found in following:
            if found not in seen:
                seen.add(found)
                todo.append(found)
    return outcomes


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_in_every_interleaving_all_ranks_apply_at_the_step_or_none_does(ranks: int) -> None:
    outcomes = walk([way(on_eval=None)] * ranks, Position(2))
    assert outcomes == {"go", "abort"}, "both ends are reached, or the model shows nothing"


@pytest.mark.parametrize("batches", [(2,), (2, 2), (1, 3), (3, 1), (0, 2)])
def test_behind_a_batch_of_an_evaluation_too_however_many_each_rank_has(batches: tuple[int, ...]) -> None:
    begun = Position(1).begins()
    for proposed in (Position(1), Position(2), Position(1, begun.mark + 1), Position(1, begun.mark + 2)):
        outcomes = walk([way(count) for count in batches], proposed)
        assert outcomes == {"go", "abort"}, proposed


@pytest.mark.parametrize(
    ("on_eval", "evaluations"),
    [
        pytest.param(1, [(2,), ()], id="rank 0 evaluates for all, or rank 1 raises before its first batch"),
        pytest.param(1, [(), (2,)], id="rank 0 has none"),
        pytest.param(1, [(1, 2), (1,)], id="one has two"),
        pytest.param(2, [(1,), ()], id="twice at one step"),
    ],
)
def test_where_ranks_differ_in_how_many_evaluations_they_make_too(
    on_eval: int, evaluations: list[tuple[int, ...]]
) -> None:
    longest = way(*max(evaluations, key=len), on_eval=on_eval)
    marks = sorted({place.at for place in longest if place.at.evaluating and place.at.batch})
    for proposed in (Position(1), Position(2), *marks):
        outcomes = walk([way(*own, on_eval=on_eval) for own in evaluations], proposed)
        assert outcomes == {"go", "abort"}, proposed


def test_the_ends_of_evaluations_and_of_on_eval_come_in_one_order_on_every_rank() -> None:
    begun = Position(3).begins()
    second = begun.ends().begins()
    returned = Position(3).returns()
    again = returned.begins()
    assert begun < begun.ends() < second < second.ends() < returned < again < returned.returns() < Position(4)
    assert again.evaluating
    assert not again.batch
    batch = Position(3, second.mark + 5)
    assert [at.passed(batch) for at in (second, returned, again, Position(4))] == [False, False, True, True]
    assert not again.passed(Position(3)), "the step's own boundary comes behind all of them"
