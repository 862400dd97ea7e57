"""The agreement as two tables, a rank's side and rank 0's: state × event → next state and what to do then. Pure.

    rank     ARMED ─ at the boundary → WAITING ─ GO → GATHERING ─ all are there → APPLYING → APPLIED
               └─ GO → GOING ─ at the boundary ───────┘
             in two phases STAGING → STAGED ─ COMMIT lies before APPLYING; ABORT, CANCEL, ALONE end in DROPPED
    rank 0   IDLE → ASKING → DECIDING → SCHEDULED → REPORTING → IDLE
             in two phases COLLECTING → JUDGING lies before REPORTING

`Armed` and `Leader` go by these tables, and so does the model in tests/trainer/test_protocol.py, which lets them meet
in every order that it can think of. A pair that is not listed cannot come about.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeAlias, TypeVar

Row = TypeVar("Row", bound=StrEnum)


class ProtocolError(Exception):
    """An event that cannot come about in this state: an error of ours."""


class Rank(StrEnum):
    """Where one rank is with one proposal. The second word of a pair is of a proposal in two phases."""

    ARMED = "armed"  # undecided; the training thread is before the boundary
    WAITING = "waiting"  # undecided; the training thread waits at the boundary
    GOING = "going"  # decided: go; the training thread is before the boundary
    GATHERING = "gathering"  # decided: go; here, and the others are awaited
    APPLYING = "applying"
    STAGING = "staging"
    STAGED = "staged"  # all that can fail has been done; the verdict is awaited
    LEAVING = "leaving"  # undecided; this rank left its loop
    APPLIED = "applied"
    DROPPED = "dropped"  # nothing was done, and nothing will be
    FELL = "fell"  # it left its loop, or raised, after it was decided
    DOUBT = "doubt"  # it cannot learn what was decided: the training ends here


class RankEvent(StrEnum):
    REACH = "reach"  # the training thread is at the boundary
    GO = "go"
    ABORT = "abort"
    IMPATIENT = "impatient"  # the patience is over, at the boundary
    ALL = "all"  # every rank is at the boundary
    ALONE = "alone"  # one will not come
    UNMET = "unmet"  # the others have been awaited for too long
    STAGE = "stage"  # staged, well or not
    COMMIT = "commit"
    CANCEL = "cancel"  # or KEEP, which says besides that a change on trial stays for good
    UNHEARD = "unheard"  # no sign of rank 0 while staged
    SILENT = "silent"  # the store is, for as long as doubt may last
    DONE = "done"
    FALL = "fall"  # it left its loop, or raised


class Do(StrEnum):
    """What follows for a rank."""

    NOTHING = "nothing"
    FORCE_ABORT = "write ABORT unless it is decided, and obey what is read back"
    FORCE_CANCEL = "write CANCEL unless it is decided, and obey what is read back"
    GATHER = "say that it is here"
    CALL_OFF = "write that not all come unless it is decided, obey what is read back"
    STAGE = "do what may fail, and tell"
    APPLY = "apply, and tell"
    DISARM = "let go of it"
    TELL = "tell the outcome"
    RAISE = "end the training"


_R, _E = Rank, RankEvent
RankTable: TypeAlias = Mapping[tuple[Rank, RankEvent], tuple[Rank, Do]]

_BOTH: dict[tuple[Rank, RankEvent], tuple[Rank, Do]] = {
    (_R.ARMED, _E.REACH): (_R.WAITING, Do.NOTHING),
    (_R.ARMED, _E.GO): (_R.GOING, Do.NOTHING),
    (_R.ARMED, _E.ABORT): (_R.DROPPED, Do.DISARM),
    (_R.ARMED, _E.FALL): (_R.LEAVING, Do.FORCE_ABORT),
    (_R.WAITING, _E.ABORT): (_R.DROPPED, Do.DISARM),
    (_R.WAITING, _E.IMPATIENT): (_R.WAITING, Do.FORCE_ABORT),
    (_R.WAITING, _E.SILENT): (_R.DOUBT, Do.RAISE),
    (_R.WAITING, _E.FALL): (_R.LEAVING, Do.FORCE_ABORT),
    (_R.WAITING, _E.GO): (_R.GATHERING, Do.GATHER),
    (_R.GOING, _E.REACH): (_R.GATHERING, Do.GATHER),
    (_R.GOING, _E.FALL): (_R.FELL, Do.CALL_OFF),
    (_R.GATHERING, _E.ALONE): (_R.DROPPED, Do.TELL),
    (_R.GATHERING, _E.UNMET): (_R.GATHERING, Do.CALL_OFF),
    (_R.GATHERING, _E.SILENT): (_R.DOUBT, Do.RAISE),
    (_R.GATHERING, _E.FALL): (_R.FELL, Do.CALL_OFF),
    (_R.LEAVING, _E.GO): (_R.FELL, Do.CALL_OFF),
    (_R.LEAVING, _E.ABORT): (_R.DROPPED, Do.DISARM),
    (_R.APPLYING, _E.DONE): (_R.APPLIED, Do.TELL),
    (_R.APPLYING, _E.FALL): (_R.FELL, Do.TELL),
}
# Both threads of a rank may read a decision, one of them late; what is over stays as it was.
_KNOWN_BEFORE = (
    *(
        (state, _E.GO)
        for state in (_R.GOING, _R.GATHERING, _R.APPLYING, _R.STAGING, _R.STAGED, _R.APPLIED, _R.FELL, _R.DOUBT)
    ),
    *((state, _E.ABORT) for state in (_R.DROPPED, _R.DOUBT)),
    (_R.DROPPED, _E.GO),  # cancelled meanwhile
    *((state, _E.COMMIT) for state in (_R.APPLYING, _R.APPLIED, _R.FELL, _R.DOUBT)),
    *((state, _E.CANCEL) for state in (_R.DROPPED, _R.FELL, _R.DOUBT)),
    *((state, _E.FALL) for state in (_R.LEAVING, _R.APPLIED, _R.DROPPED, _R.FELL, _R.DOUBT)),
    *((state, _E.DONE) for state in (_R.APPLIED, _R.DROPPED)),
    (_R.DROPPED, _E.REACH),
)
_BOTH |= {pair: (pair[0], Do.NOTHING) for pair in _KNOWN_BEFORE}

ONE_PHASE: RankTable = _BOTH | {(_R.GATHERING, _E.ALL): (_R.APPLYING, Do.APPLY)}
TWO_PHASES: RankTable = _BOTH | {
    (_R.GATHERING, _E.ALL): (_R.STAGING, Do.STAGE),
    # Called off while this rank has not even come to the boundary, or is not done: it stages, and then learns of it.
    (_R.STAGING, _E.STAGE): (_R.STAGED, Do.NOTHING),
    (_R.STAGING, _E.CANCEL): (_R.STAGING, Do.NOTHING),
    (_R.GOING, _E.CANCEL): (_R.GOING, Do.NOTHING),
    (_R.GATHERING, _E.CANCEL): (_R.GATHERING, Do.NOTHING),
    (_R.STAGING, _E.FALL): (_R.FELL, Do.TELL),
    (_R.STAGED, _E.COMMIT): (_R.APPLYING, Do.APPLY),
    (_R.STAGED, _E.CANCEL): (_R.DROPPED, Do.TELL),
    (_R.STAGED, _E.UNHEARD): (_R.STAGED, Do.FORCE_CANCEL),
    (_R.STAGED, _E.SILENT): (_R.DOUBT, Do.RAISE),
    (_R.STAGED, _E.FALL): (_R.FELL, Do.TELL),
}


class Lead(StrEnum):
    """Where rank 0 is with one command."""

    IDLE = "idle"
    ASKING = "asking"  # proposed; answers are awaited
    DECIDING = "deciding"  # it is writing GO
    SCHEDULED = "scheduled"  # in one phase: ranks apply as they come to the boundary
    COLLECTING = "collecting"  # in two phases: what is staged is awaited
    JUDGING = "judging"  # it is writing COMMIT
    REPORTING = "reporting"  # all that is to be decided is; the ranks' reports are awaited


class LeadEvent(StrEnum):
    PROPOSE = "propose"
    NOBODY = "nobody"  # a rank has left its loop: there is no common boundary any more
    READY = "ready"  # all are
    NOT_READY = "not ready"  # ABORT is written: a rank is late, refuses, or does not answer
    WENT = "went"  # the decision that was read back is GO
    LOST = "lost"  # … is ABORT: a rank was impatient
    STAGED = "staged"  # by all
    NOT_STAGED = "not staged"  # CANCEL or KEEP is written: a rank could not, or it was withdrawn
    JUDGED = "judged"  # the verdict is read back
    REPORTED = "reported"
    SETTLED = "settled"  # what a silent store had left open is decided


_L, _LE = Lead, LeadEvent
_LEAD: dict[tuple[Lead, LeadEvent], Lead] = {
    (_L.IDLE, _LE.PROPOSE): _L.ASKING,
    (_L.ASKING, _LE.NOBODY): _L.IDLE,
    (_L.ASKING, _LE.READY): _L.DECIDING,
    (_L.ASKING, _LE.NOT_READY): _L.IDLE,
    (_L.DECIDING, _LE.LOST): _L.IDLE,
    (_L.SCHEDULED, _LE.REPORTED): _L.IDLE,
    (_L.REPORTING, _LE.REPORTED): _L.IDLE,
} | {(state, _LE.SETTLED): _L.IDLE for state in Lead}
LEAD_ONE_PHASE: Mapping[tuple[Lead, LeadEvent], Lead] = _LEAD | {(_L.DECIDING, _LE.WENT): _L.SCHEDULED}
LEAD_TWO_PHASES: Mapping[tuple[Lead, LeadEvent], Lead] = _LEAD | {
    (_L.DECIDING, _LE.WENT): _L.COLLECTING,
    (_L.COLLECTING, _LE.STAGED): _L.JUDGING,
    (_L.COLLECTING, _LE.NOT_STAGED): _L.REPORTING,
    (_L.JUDGING, _LE.JUDGED): _L.REPORTING,
}


def rank_step(state: Rank, event: RankEvent, *, two_phase: bool) -> tuple[Rank, Do]:
    """A rank's next state and what it is to do. Raises `ProtocolError`."""
    found = (TWO_PHASES if two_phase else ONE_PHASE).get((state, event))
    if found is None:
        raise ProtocolError(f"a rank that is {state} cannot meet {event!r}")
    return found


def lead_step(state: Lead, event: LeadEvent, *, two_phase: bool) -> Lead:
    """Rank 0's next state. Raises `ProtocolError`."""
    found = (LEAD_TWO_PHASES if two_phase else LEAD_ONE_PHASE).get((state, event))
    if found is None:
        raise ProtocolError(f"rank 0, which is {state}, cannot meet {event!r}")
    return found


def may_have_applied(state: Lead, *, two_phase: bool) -> bool:
    """Whether a rank may have applied, or may yet: what is not decided is then not known to have failed.

    Only rank 0 writes GO and COMMIT, so up to there it knows that nothing happened and nothing will.
    """
    one = {Lead.DECIDING, Lead.SCHEDULED, Lead.REPORTING}
    return state in ({Lead.JUDGING, Lead.REPORTING} if two_phase else one)


def leaves_open(state: Lead) -> bool:
    """Whether ranks wait for something that rank 0 has yet to decide."""
    return state in {Lead.ASKING, Lead.DECIDING, Lead.COLLECTING, Lead.JUDGING}
