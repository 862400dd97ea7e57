"""Which incarnation grew out of which: small files, so that an abandoned branch is never taken for the live one.

    numbers/branch-000002.json   {"incarnation": 2, "parent": 1, "after_step": 20, "skipped": 7, "ranks": 2}

says that incarnation 2 goes on from step 20 of incarnation 1: what incarnation 1 did after step 20 was left behind by a
rollback, or lost by a restart. Each of the 2 ranks left out 7 micro-batches there, and a restart that finds no newer
checkpoint than the one of step 20 leaves them out too. Rank 0 writes one when it attaches and at every rollback, before
the outcome is told.
"""

import contextlib
import math

import msgspec

from trainctl.wire.rundir import RunDir, write_atomic


class Branch(msgspec.Struct, frozen=True, kw_only=True):
    incarnation: int
    parent: int = 0  # 0: a beginning
    after_step: int = 0
    skipped: int = 0  # micro-batches that each of `ranks` ranks left out at its beginning
    ranks: int = 0


def record_branch(run_dir: RunDir, branch: Branch) -> None:
    """Write down where an incarnation begins. Raises OSError."""
    path = run_dir.numbers / f"branch-{branch.incarnation:06d}.json"
    write_atomic(path, msgspec.json.encode(branch))


def read_branches(run_dir: RunDir) -> dict[int, Branch]:
    found: dict[int, Branch] = {}
    for path in run_dir.numbers.glob("branch-*.json"):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            branch = msgspec.json.decode(path.read_bytes(), type=Branch)
            found[branch.incarnation] = branch
    return found


def live_steps(branches: dict[int, Branch]) -> dict[int, float]:
    """The last live step of each incarnation of the live branch, from the newest back to its beginning.

    An incarnation that is not in it was abandoned as a whole. Empty when nothing is recorded.
    """
    limits: dict[int, float] = {}
    current, limit = max(branches, default=0), math.inf
    while current and current not in limits:
        limits[current] = limit
        branch = branches.get(current)
        if branch is None:
            break
        current, limit = branch.parent, min(limit, branch.after_step)
    return limits
