"""Where a command stands at the hub, from request to outcome: state × event → next state, and what the desk does.

    NEW ─ written down → ACCEPTED ─ rank 0 has scheduled it → SCHEDULED ─ its outcome → one of the final states
     └ refused, in conflict   └ its outcome, also of what the hub or the agents carry out
    nobody is left who could say more: EXPIRED where it was never scheduled and the run ended in order, else UNKNOWN
    the first outcome stands; UNKNOWN alone may still become known, where rank 0 comes back

The desk goes by this table (`hub/desk.py`). A pair that is not listed is an error of ours: it is complained about, and
changes nothing. Pure.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from trainctl.wire.commands import FINAL_COMMAND_STATES


class StandingError(Exception):
    """An event that cannot come about in this state: an error of ours."""


class Stands(StrEnum):
    """The states that operators see, and two from before: the values are those of `CommandState`."""

    NEW = "new"  # asked for, or given by rank 0 to itself: nothing is written down
    ORPHAN = "orphan"  # in the audit log and not in the journal: a hub died in between
    ACCEPTED = "accepted"
    SCHEDULED = "scheduled"
    APPLIED = "applied"
    REJECTED = "rejected"
    CONFLICT = "conflict"
    EXPIRED = "expired"
    FAILED = "failed"
    SUPERSEDED = "superseded"
    UNKNOWN = "unknown"


class Event(StrEnum):
    REFUSE = "refuse"  # by the hub's rules, or because it cannot be written down
    CLASH = "clash"  # with another command under way
    ACCEPT = "accept"  # it is in the audit log
    AGAIN = "again"  # the same id is asked for
    DUE = "due"  # its expiry has passed
    TAKE_BACK = "take back"  # an operator's cancel
    REPLACE = "replace"  # a newer command wants its place
    RELINK = "relink"  # the same rank 0 is linked again, to this hub or to its successor
    ENDED = "ended"  # the run, in order: rank 0 said goodbye
    LOST = "lost"  # rank 0 is gone without a word, or another attempt began
    RESTARTED = "restarted"  # the hub, which was carrying it out by itself or by the agents
    GIVE_UP = "give up"  # nobody asked for it again
    # What whoever carries it out says: rank 0, the agents, the hub itself.
    SCHEDULED = "scheduled"
    APPLIED = "applied"
    REJECTED = "rejected"
    CONFLICT = "conflict"
    EXPIRED = "expired"
    FAILED = "failed"
    SUPERSEDED = "superseded"
    UNKNOWN = "unknown"


class Do(StrEnum):
    """What follows for the desk."""

    NOTHING = "nothing"
    ANSWER = "answer with where it stands"
    WATCH = "answer with where it stands, and with how it goes on"
    TELL = "record it, and tell whoever asked"
    SETTLE = "record the outcome, tell whoever asked, write it to the audit log"
    HAND_ON = "hand it to rank 0 once more"
    WITHDRAW = "ask rank 0 to withdraw it"
    GIVE_WAY = "ask rank 0 to let it give way"


_S, _E = Stands, Event
FINAL: Final = frozenset(Stands(state) for state in FINAL_COMMAND_STATES)
OUTCOMES: Final = frozenset(Event(state) for state in FINAL_COMMAND_STATES)

_BEGIN: dict[tuple[Stands, Event], tuple[Stands, Do]] = {
    (state, event): result
    for state in (_S.NEW, _S.ORPHAN)
    for event, result in {
        _E.REFUSE: (_S.REJECTED, Do.SETTLE),
        _E.CLASH: (_S.CONFLICT, Do.SETTLE),
        _E.ACCEPT: (_S.ACCEPTED, Do.TELL),
        # Rank 0 gives itself commands: the end of a pause, of a change on trial, a preemption.
        _E.SCHEDULED: (_S.SCHEDULED, Do.TELL),
        **{outcome: (_S(outcome), Do.SETTLE) for outcome in OUTCOMES},
    }.items()
} | {(_S.ORPHAN, _E.GIVE_UP): (_S.UNKNOWN, Do.SETTLE)}

_UNDER_WAY: dict[tuple[Stands, Event], tuple[Stands, Do]] = {
    (state, event): result
    for state in (_S.ACCEPTED, _S.SCHEDULED)
    for event, result in {
        _E.AGAIN: (state, Do.WATCH),
        _E.DUE: (state, Do.WITHDRAW),
        _E.TAKE_BACK: (state, Do.WITHDRAW),
        _E.RELINK: (state, Do.HAND_ON),
        _E.LOST: (_S.UNKNOWN, Do.SETTLE),
        **{outcome: (_S(outcome), Do.SETTLE) for outcome in OUTCOMES},
    }.items()
} | {
    (_S.ACCEPTED, _E.SCHEDULED): (_S.SCHEDULED, Do.TELL),
    (_S.ACCEPTED, _E.REPLACE): (_S.ACCEPTED, Do.GIVE_WAY),
    (_S.ACCEPTED, _E.ENDED): (_S.EXPIRED, Do.SETTLE),
    (_S.ACCEPTED, _E.RESTARTED): (_S.UNKNOWN, Do.SETTLE),
    (_S.SCHEDULED, _E.REPLACE): (_S.SCHEDULED, Do.NOTHING),  # scheduled meanwhile: the newer one comes behind it
    (_S.SCHEDULED, _E.ENDED): (_S.UNKNOWN, Do.SETTLE),
}
# Only ranks schedule, and what is scheduled gives way to nobody and is in conflict with nobody any more.
for _event in (_E.SUPERSEDED, _E.CONFLICT):
    del _UNDER_WAY[_S.SCHEDULED, _event]

_OVER: dict[tuple[Stands, Event], tuple[Stands, Do]] = {
    (state, event): (state, Do.ANSWER if event is _E.AGAIN else Do.NOTHING)
    for state in FINAL
    for event in (_E.AGAIN, _E.DUE, _E.TAKE_BACK, _E.REPLACE, _E.ENDED, _E.LOST, _E.SCHEDULED, *OUTCOMES)
}
_OVER |= {(_S.UNKNOWN, outcome): (_S(outcome), Do.SETTLE) for outcome in OUTCOMES - {_E.UNKNOWN}}
_OVER[_S.UNKNOWN, _E.SCHEDULED] = (_S.SCHEDULED, Do.TELL)

TABLE: Final[Mapping[tuple[Stands, Event], tuple[Stands, Do]]] = _BEGIN | _UNDER_WAY | _OVER


def step(state: Stands, event: Event) -> tuple[Stands, Do]:
    """A command's next state and what the desk is to do. Raises `StandingError`."""
    found = TABLE.get((state, event))
    if found is None:
        raise StandingError(f"a command that is {state} cannot meet {event!r}")
    return found
