"""Two commands at once: what becomes of the newer one while the older has no outcome yet. Pure; one table.

| the newer command | the older one, still under way | then |
|---|---|---|
| anything that needs a boundary | stop, abort, `abort --now` or restart | conflict: the run is ending |
| abort | stop | queue: behind the stop's save |
| `abort --now`, restart | stop or abort | queue: at once, by the agents |
| `abort --now`, restart | `abort --now` or restart | conflict: the ranks are being ended |
| lr set, lr release | the same operator's lr command of the same groups, not scheduled | supersede the older |
| set NAME | the same operator's set NAME of the same groups, not scheduled | supersede the older |
| lr …, set NAME, pause or resume | another operator's of the same (lr, NAME, or pause and resume) | conflict |
| lr …, set, rollback | another operator's rollback | conflict |
| rollback | another operator's lr …, set or rollback | conflict |
| anything else | anything else | queue: one after another, in the order in which they were accepted |

A queued command is decided at its own boundary; what it meets there says `wire/meets.py`. One that is superseded gives
way once the newer one is applied, and is carried out where that comes to nothing (`trainer/superseded.py`).
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from trainctl.wire.commands import (
    Abort,
    Act,
    Command,
    LrRelease,
    LrScale,
    LrSet,
    Pause,
    Restart,
    Resume,
    Rollback,
    SetTunable,
    Stop,
    carrier_of,
    spec_of,
)

Relation: TypeAlias = Literal["queue", "conflict", "supersede"]


@dataclass(frozen=True, kw_only=True)
class UnderWay:
    """A command that was accepted and has no outcome yet."""

    command: Command
    actor: str
    scheduled: bool


def relation(newer: Act, actor: str, older: UnderWay) -> Relation:
    """The table above for one older command."""
    if isinstance(older.command.action, Stop | Abort | Restart):
        return _while_ending(newer, older.command.action)
    mine = actor == older.actor
    if not mine:
        return "conflict" if _same_subject(newer, older.command.action) else "queue"
    return "supersede" if not older.scheduled and _replaces(newer, older.command.action) else "queue"


def outcome(newer: Act, actor: str, pending: list[UnderWay]) -> tuple[UnderWay | None, list[UnderWay]]:
    """(the one that the newer command is in conflict with, those that it supersedes)."""
    related = [(relation(newer, actor, older), older) for older in pending]
    conflict = next((older for kind, older in related if kind == "conflict"), None)
    if conflict is not None:
        return conflict, []
    return None, [older for kind, older in related if kind == "supersede"]


def conflict_reason(newer: Act, older: UnderWay) -> str:
    """Who and what stands in the way, and what to do."""
    what = f"{older.actor}'s {spec_of(older.command.action).name} ({older.command.id})"
    stands = "scheduled" if older.scheduled else "accepted"
    if isinstance(older.command.action, Stop | Abort | Restart):
        return f"{what} is {stands}: the run is ending, and {spec_of(newer).name} would come too late"
    return f"{what} is {stands} and changes the same: look at its outcome, then send yours again if you still want it"


def _while_ending(newer: Act, older: Act) -> Relation:
    by = carrier_of(newer)
    if by == "agents":  # they need no boundary, and a rank that hangs comes to none
        return "conflict" if carrier_of(older) == "agents" else "queue"
    harder = isinstance(newer, Abort) and isinstance(older, Stop)
    return "queue" if harder or by == "hub" else "conflict"


def _replaces(newer: Act, older: Act) -> bool:
    """An absolute setting says all that the older one said; `lr scale` builds on it."""
    match newer, older:
        case ((LrSet() | LrRelease()), (LrSet() | LrScale() | LrRelease())):
            return newer.group is None or newer.group == older.group
        case SetTunable(), SetTunable():
            return newer.name == older.name and (newer.group is None or newer.group == older.group)
        case _:
            return False


def _same_subject(newer: Act, older: Act) -> bool:
    changes = (LrSet, LrScale, LrRelease, SetTunable, Rollback)
    match newer, older:
        case Rollback(), _:
            return isinstance(older, changes)
        case _, Rollback():
            return isinstance(newer, changes)
        case SetTunable(), SetTunable():
            return newer.name == older.name
        case _:
            return any(
                isinstance(newer, kinds) and isinstance(older, kinds)
                for kinds in ((LrSet, LrScale, LrRelease), (Pause, Resume))
            )
