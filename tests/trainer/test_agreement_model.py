"""Every interleaving of one proposal, walked through: all ranks apply it at its step, or none does, and nobody hangs.

The model has what can interleave: each control thread arms, then reads how far training is; each training thread
counts a step, then reads whether something is armed; rank 0 decides; a rank at its boundary may lose patience. Ranks
are tied by a collective in each step, as in DDP: nobody completes step k before all have completed step k - 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from trainctl.trainer.agreement import Answer, answer, judge

LAST = 4


@dataclass(frozen=True)
class Rank:
    completed: int = 0
    looking: bool = False  # counted a step, has not yet read what is armed
    armed: bool = False
    given: Answer | None = None
    waiting: bool = False  # at its armed boundary
    applied: int | None = None


@dataclass(frozen=True)
class World:
    ranks: tuple[Rank, ...]
    decision: str | None = None
    step: int = 2

    def with_rank(self, index: int, rank: Rank) -> "World":
        return replace(self, ranks=(*self.ranks[:index], rank, *self.ranks[index + 1 :]))


def decided(world: World, wanted: str) -> World:
    """Compare-and-set: the first to write wins."""
    return world if world.decision else replace(world, decision=wanted)


def control_moves(world: World, index: int) -> Iterator[World]:
    rank = world.ranks[index]
    if rank.given is None and not rank.armed:
        yield world.with_rank(index, replace(rank, armed=True))
    if rank.given is None and rank.armed:
        given = answer(world.step, completed=rank.completed, held_at=None, refusal=None)
        yield world.with_rank(index, replace(rank, given=given))


def training_moves(world: World, index: int) -> Iterator[World]:
    rank = world.ranks[index]
    if rank.waiting:
        if world.decision is None:
            yield decided(world, "abort")  # patience ran out
        else:
            applied = world.step if world.decision == "go" else None
            yield world.with_rank(index, replace(rank, waiting=False, armed=False, applied=applied))
    elif rank.looking:
        meets = rank.armed and rank.completed == world.step
        yield world.with_rank(index, replace(rank, looking=False, waiting=meets))
    elif rank.completed < LAST and all(other.completed >= rank.completed for other in world.ranks):
        yield world.with_rank(index, replace(rank, completed=rank.completed + 1, looking=True))


def leader_moves(world: World) -> Iterator[World]:
    answers = [rank.given for rank in world.ranks]
    if world.decision is None and all(given is not None for given in answers):
        verdict, _ = judge([given for given in answers if given is not None])
        yield decided(world, "go" if verdict == "go" else "abort")


def moves(world: World) -> Iterator[World]:
    yield from leader_moves(world)
    for index in range(len(world.ranks)):
        yield from control_moves(world, index)
        yield from training_moves(world, index)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_in_every_interleaving_all_ranks_apply_at_the_step_or_none_does(ranks: int) -> None:
    start = World(ranks=(Rank(),) * ranks)
    seen, todo = {start}, [start]
    outcomes: set[str] = set()
    while todo:
        world = todo.pop()
        following = [found for found in moves(world) if found != world]
        if not following:
            assert all(rank.completed == LAST for rank in world.ranks), f"somebody hangs: {world}"
            applied = {rank.applied for rank in world.ranks}
            assert len(applied) == 1, f"half a command: {world}"
            assert (applied == {world.step}) == (world.decision == "go")
            outcomes.add(str(world.decision))
        for found in following:
            if found not in seen:
                seen.add(found)
                todo.append(found)
    assert outcomes == {"go", "abort"}, "both ends are reached, or the model shows nothing"
