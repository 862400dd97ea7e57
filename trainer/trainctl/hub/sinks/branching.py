"""What a new branch of the history makes void, and what belongs in its place. Pure."""

from collections.abc import Mapping
from typing import TypeAlias

from trainctl.store.metrics import Branch

Chain: TypeAlias = list[tuple[int, int | None]]


def chain_of(branches: Mapping[int, Branch], incarnation: int) -> Chain:
    """The incarnations that one stands on, oldest first, each with the last step that counts of it."""
    chain: Chain = []
    at: int | None = incarnation
    cut: int | None = None
    while at is not None and at in branches:
        chain.append((at, cut))
        branch = branches[at]
        cut = branch.after_step if cut is None else min(cut, branch.after_step)
        at = branch.parent if branch.parent is not None and branch.parent < at else None
    return chain[::-1]


def parting_step(before: Chain, after: Chain) -> int:
    """The first step at which two branches are not the same history; 0 where they share none."""
    step = 0
    for (old, old_cut), (new, new_cut) in zip(before, after, strict=False):
        ends = [cut for cut in (old_cut, new_cut) if cut is not None]
        if old != new or not ends:
            break
        step = min(ends) + 1
        if old_cut != new_cut:
            break
    return step


def spans_between(chain: Chain, from_step: int) -> list[tuple[int, int, int]]:
    """What of a chain lies between `from_step` and its newest incarnation: (incarnation, first step, last step)."""
    spans = []
    first = from_step
    for incarnation, cut in chain:
        if cut is None:
            break
        if cut >= first:
            spans.append((incarnation, first, cut))
            first = cut + 1
    return spans
