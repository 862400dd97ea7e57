"""The rules by which every rank acts at the same boundary, or none does. Pure: no store, no thread, no clock.

    rank 0   proposes (number, command, step = completed + margin)
    rank R   answers  READY (armed for that boundary) | LATE (already past it) | REFUSED (cannot do it)
    one key  decides  GO, by rank 0 when all are ready; ABORT, by rank 0 otherwise, or by any rank that has waited for
                      the proposal's `patience_s` at its armed boundary. Written once by compare-and-set; all obey
                      what they read back
    GO       every rank applies at the boundary, or, in two phases (rollback, conditions), stages first:
             all staged → COMMIT, any failed → CANCEL, and nothing was touched. CANCEL too by any staged rank that has
             seen no sign of rank 0 for `DOUBT_S`. KEEP, by rank 0, where a change on trial is not to be undone: only
             then is it confirmed, for CANCEL also says that the store was silent

    THERE    nobody applies or stages before all ranks are at the boundary (gathering.py): one that said READY may leave

A bounded wait that then simply leaves gives half-applied commands, an unbounded one can deadlock; a bounded wait with
one decision key has neither (checked by tests/trainer/test_agreement_model.py over all interleavings).
"""

import hmac
from typing import Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Struct

from trainctl.wire.commands import Command, Resume, Rollback
from trainctl.wire.messages import Scalar

PATIENCE_S = 0.1
LONGEST_PATIENCE_S = 2.0
TRIES = 3
MAX_SKEW = 16  # steps; ranks tied by collectives are at most one apart
DOUBT_S = 30.0
FIRST_MARGIN = 2
_SKEW_S = 0.005
_MAC_BYTES = 16
_HALF = 32
_BATCHES = (1 << _HALF) - 1
_ROUND = (1 << 48) - 1  # the batches of all evaluations that one call of `on_eval` may make

GO, ABORT, COMMIT, CANCEL, KEEP = b"go", b"abort", b"commit", b"cancel", b"keep"


class Position(NamedTuple):
    """A boundary, or where a rank is; they come one after another in this order on every rank.

    `mark` 0 is the boundary of `step`. Above 0 it lies in an evaluation there: the upper half counts the evaluations
    of this step from 1, the lower half (`_BATCHES`) the batches that are done, or says that the evaluation is over.
    Each call of `on_eval` counts within 16 bits (`_ROUND`), so that its end is one place on ranks that differ in how
    many evaluations it makes there, if any.
    """

    step: int
    mark: int = 0

    @property
    def evaluating(self) -> bool:
        return self.mark != 0 and self.mark & _BATCHES != _BATCHES

    @property
    def batch(self) -> int:
        """How many batches of the evaluation are done."""
        return self.mark & _BATCHES

    def begins(self) -> "Position":
        """The next evaluation of this step begins."""
        return Position(self.step, ((self.mark >> _HALF) + 1) << _HALF)

    def ends(self) -> "Position":
        """The evaluation is over: behind all of its batches, however many another rank may have."""
        return Position(self.step, self.mark | _BATCHES)

    def returns(self) -> "Position":
        """Where an `on_eval` that is called here ends: behind all its evaluations, however many another rank has."""
        return Position(self.step, (self.mark + 1) | _ROUND)

    def meets(self, proposed: "Position") -> bool:
        """Whether the training thread, here, is at this boundary.

        The boundary of a step also comes behind an evaluation that belongs to it. A rank whose batches ran out meets
        the boundary of a batch that it does not have at its end, and one that does not have the evaluation at the end
        of `on_eval`: it has begun nothing that others would wait for.
        """
        if self.step != proposed.step or self.evaluating:
            return self == proposed
        return proposed.mark == 0 or self.mark in {proposed.mark | _BATCHES, proposed.mark | _ROUND}

    def passed(self, proposed: "Position") -> bool:
        """Whether the training thread, here, will not come to this boundary any more."""
        if self.step != proposed.step:
            return self.step > proposed.step
        return proposed.mark != 0 and self.mark > proposed.mark | _ROUND


class Proposal(Struct, frozen=True, kw_only=True):
    """What rank 0 proposes. `checkpoint` and `incarnation` are resolved once, by rank 0, for a rollback."""

    number: int
    command: Command
    actor: str
    step: int
    mark: int = 0  # see `Position`
    two_phase: bool = False
    checkpoint: str | None = None
    incarnation: int = 0
    expires_at: float | None = None  # Unix seconds: rank 0 declines it at the boundary when that is past
    undo: str | None = None  # the id of a change on trial whose time is over
    at: int = 0  # the step that rank 0 had completed when it proposed
    patience_s: float = PATIENCE_S  # how long a rank waits at its armed boundary for the decision
    leaving: int | None = None  # no command: this rank left its loop, so there are no common boundaries any more

    @property
    def position(self) -> Position:
        return Position(self.step, self.mark)


class Answer(Struct, frozen=True, kw_only=True):
    verdict: Literal["ready", "late", "refused"]
    step: int
    mark: int = 0
    reason: str | None = None

    @property
    def position(self) -> Position:
        return Position(self.step, self.mark)


class Outcome(Struct, frozen=True, kw_only=True):
    """What one rank did.

    `pending`: begun, and finished in the background (a checkpoint). `declined`: not done, as it should be (a condition
    that does not hold, a loop that ended before): a rejection and no failure. `expired`: it came too late. `waited`: in
    vain, for another rank that knows better why. `keeps`: rank 0 found that the change on trial is to stay.
    """

    ok: bool
    step: int
    before: Scalar = None
    after: Scalar = None
    reason: str | None = None
    pending: bool = False
    declined: bool = False
    expired: bool = False
    waited: bool = False
    keeps: bool = False


Verdict: TypeAlias = Literal["go", "again", "refused"]


def in_two_phases(command: Command) -> bool:
    """Whether it is staged before it is applied.

    So is what can fail after the agreement (a rollback's loading), what rank 0 alone may decide at the boundary, and
    what is to be withdrawn until the last moment.
    """
    return isinstance(command.action, Rollback) or command.condition is not None or command.expires_s is not None


def answer(proposed: Position, *, at: Position, held_at: Position | None, refusal: str | None) -> Answer:
    """A rank's answer after it armed itself: whoever is at or past the boundary is late, unless it is held there."""
    if refusal is not None:
        return Answer(verdict="refused", step=at.step, mark=at.mark, reason=refusal)
    late = at >= proposed and held_at != proposed
    return Answer(verdict="late" if late else "ready", step=at.step, mark=at.mark)


def no_common_step(*, own: int, other: int, whose: str) -> str | None:
    """Why ranks this far apart cannot agree. Sound only if `own` was read after `other`: then it really is behind."""
    if other - own <= MAX_SKEW:
        return None
    return (
        f"it is at step {own} and {whose} at step {other}: the ranks have no common step. A script whose ranks make "
        "different numbers of steps (Join, local SGD) declares it: Run.attach(max_skew=…)"
    )


def judge(answers: list[Answer]) -> tuple[Verdict, str | None]:
    """What rank 0 makes of all answers, and why the first rank refused that did, named unless all say the same."""
    for rank, given in enumerate(answers):
        if given.verdict == "refused":
            alike = all((other.verdict, other.reason) == ("refused", given.reason) for other in answers)
            return "refused", given.reason if alike else f"rank {rank}: {given.reason}"
    return ("go" if all(given.verdict == "ready" for given in answers) else "again"), None


def verdict_on(staged: list[Outcome]) -> bytes:
    """What rank 0 writes when every rank has staged, well or not. Rank 0 alone looks at conditions."""
    if staged[0].keeps:
        return KEEP
    return COMMIT if all(outcome.ok for outcome in staged) else CANCEL


def keep(cancelled_by: str) -> bytes:
    """The verdict where an operator withdrew the undoing of a change on trial."""
    return KEEP + b" " + cancelled_by.encode()


def keeps(verdict: bytes) -> bool:
    """Whether a change on trial stays for good."""
    return verdict.partition(b" ")[0] == KEEP


def kept_by(verdict: bytes) -> str | None:
    """The operator who withdrew the undoing, None where the change's own condition keeps it."""
    return verdict.partition(b" ")[2].decode(errors="replace") or None


def next_margin(margin: int, proposed: Position, answers: list[Answer]) -> int:
    """How far ahead to propose next: twice as far as the latest rank had run past, and one more.

    Ahead in steps, or in batches inside an evaluation; one that is over on some rank says nothing of how far.
    """
    late = [given.position for given in answers if given.verdict == "late"]
    if proposed.mark:
        behind = max((at.mark - proposed.mark for at in late if at.step == proposed.step and at.evaluating), default=0)
    else:
        behind = max((at.step - proposed.step for at in late), default=0)
    return min(1000, margin + 2 * min(behind, 1000) + 1)


def left_evaluation(given: Answer) -> bool:
    """Whether a rank was late because it has no evaluation under way, where one was proposed for."""
    return given.verdict == "late" and not given.position.evaluating


def eased(margin: int) -> int:
    """After an agreement: half-way back, so that one hiccup does not delay every later command."""
    return max(FIRST_MARGIN, margin // 2)


def fitted(margin: int, *, step_s: float, since_s: float, agreement_s: float) -> int:
    """One step ahead where the agreement surely ends before that boundary comes, so that a command waits half a step.

    `since_s` is how long ago the last boundary was. What an agreement takes is doubled, for it varies, and the boundary
    of another rank may come a little before rank 0's. A margin that was raised stays: ranks have just been late.
    """
    return 1 if margin == FIRST_MARGIN and step_s - since_s > 2 * agreement_s + _SKEW_S else margin


def patience(slowest_s: float) -> float:
    """How long ranks are to wait at the boundary where an agreement took up to `slowest_s`: hundreds take a while.

    At least `PATIENCE_S`, as training stands meanwhile at most `LONGEST_PATIENCE_S`.
    """
    return min(max(PATIENCE_S, 3.0 * slowest_s), LONGEST_PATIENCE_S)


def boundary_for(at: Position, margin: int, held_at: Position | None, *, inside: bool = False) -> Position:
    """What to propose: where a pause holds everybody, or `margin` steps ahead; batches `inside` an evaluation."""
    inside = inside and at.evaluating
    if held_at is not None and (held_at.mark or not inside):
        return held_at
    return Position(at.step, at.mark + margin) if inside else Position(at.step + margin)


class Seal:
    """Signs and checks what goes through the store: whoever reaches the store may deny, not forge.

    HMAC-SHA256 over attempt, key and content, cut to 16 bytes, with the run's secret.
    """

    def __init__(self, secret: bytes, attempt: int) -> None:
        self._secret = secret
        self._attempt = str(attempt).encode()

    def sign(self, key: str, content: bytes) -> bytes:
        return self._mac(key, content) + content

    def open(self, key: str, sealed: bytes) -> bytes | None:
        """The content, or None when it is not from a rank of this run."""
        mac, content = sealed[:_MAC_BYTES], sealed[_MAC_BYTES:]
        return content if hmac.compare_digest(mac, self._mac(key, content)) else None

    def _mac(self, key: str, content: bytes) -> bytes:
        message = b"\0".join((self._attempt, key.encode(), content))
        return hmac.digest(self._secret, message, "sha256")[:_MAC_BYTES]


_NOTHING = Command(id="goodbye", action=Resume())


def goodbye(number: int, rank: int) -> Proposal:
    """What a rank writes in place of a proposal when it leaves its loop."""
    return Proposal(number=number, command=_NOTHING, actor="", step=0, leaving=rank)


encode = msgspec.msgpack.Encoder().encode
decode_proposal = msgspec.msgpack.Decoder(Proposal).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
decode_outcome = msgspec.msgpack.Decoder(Outcome).decode
