"""The control thread of every rank: waits for proposals, answers, learns the decision, reports the outcome.

It runs beside training, waits inside the store without the GIL, and prints nothing. What it may not do is wait for the
training thread while a proposal is undecided: a collective may hold that one for as long as it likes.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from trainctl.trainer.agreement import (
    ABORT,
    CANCEL,
    COMMIT,
    DOUBT_S,
    GO,
    Outcome,
    Proposal,
    answer,
    decode_proposal,
    encode,
    goodbye,
    no_common_step,
)
from trainctl.trainer.boundary import Armed, Boundary
from trainctl.trainer.gathering import GATHER_S, GATHER_STEPS, Gathering, call_off, in_shadow, watch
from trainctl.trainer.meeting import Connection, StoreCut, StoreSilent
from trainctl.trainer.protocol import RankEvent
from trainctl.trainer.spent import Spent, of_rank

log = logging.getLogger(__name__)
T = TypeVar("T")

_AGAIN_S = 1.0
_WITHDRAW_S = 1.0
_LOOK_S = 5.0
_SHADOW_S = 0.2
_PASSED = "it went past the boundary without acting on it; nothing was changed on any rank"
_SHADOWS = "it only shadows the other ranks in torch's Join: it has no boundary now"


class InDoubt(RuntimeError):
    """This rank cannot learn whether the others applied a command.

    The one error that trainctl raises into a loop: half a command is worse than a stopped job, which resumes from its
    last good checkpoint.
    """


class Control(threading.Thread):
    """One rank's side of the agreement."""

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        boundary: Boundary,
        waiting: Connection,
        talking: Connection,
        refusal: Callable[[Proposal], str | None],
    ) -> None:
        super().__init__(name="trainctl-control", daemon=True)
        self._rank = rank
        self._ranks = ranks
        self._training = threading.get_ident()  # the thread that attaches is the one that trains
        self._boundary = boundary
        self._waiting = waiting
        self._talking = talking
        self._talk_lock = threading.Lock()
        self._refusal = refusal
        self._number = 1
        self._spent = Spent()
        boundary.withdraw = self._withdraw
        self._leaving = threading.Event()
        self._failed: str | None = None
        self.gathering: Gathering | None = None  # the newest
        self.gone: int | None = None  # the rank that was the first to leave its loop

    @property
    def problem(self) -> str | None:
        """Why no command reaches this rank; a connection that is cut may be made anew."""
        cut = self._waiting.problem
        return self._failed or (f"the job's store does not answer rank {self._rank}: {cut}" if cut else None)

    def put(self, key: str, content: bytes) -> None:
        """Write through the talking connection, from any thread. Raises `StoreSilent`."""
        with self._talk_lock:
            self._talking.put(key, content)

    def has(self, keys: Sequence[str]) -> bool:
        with self._talk_lock:
            return self._talking.has(keys)

    def decide(self, key: str, content: bytes) -> bytes | None:
        with self._talk_lock:
            return self._talking.decide(key, content)

    def get_all(self, keys: Sequence[str]) -> list[bytes | None]:
        with self._talk_lock:
            return self._talking.get_all(keys)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:  # there may be hundreds: others may talk in between
            with self._talk_lock:
                self._talking.delete([key])

    def run(self) -> None:
        armed: Armed | None = None
        try:
            while True:
                sealed = self._hear(f"p/{self._number}")
                proposal = decode_proposal(sealed) if sealed is not None else None
                if proposal is not None and proposal.leaving is not None:
                    self.gone = proposal.leaving
                    return
                if proposal is not None:
                    armed = Armed(proposal)
                    self._follow(armed)
                    armed = None
                    self._clear_away()
                self._number += 1
        except StoreSilent as error:
            self._failed = "the job's store does not answer"
            if armed is not None:
                armed.fail(error)
            if not self._boundary.closed:
                log.warning("trainctl: no more commands in this attempt, training goes on: %s", error)
        except Exception as error:
            self._failed = f"the control thread failed: {error}"
            if armed is not None:
                armed.fail(error)
            log.exception("trainctl: no more commands in this attempt, training goes on")

    def leave(self, timeout_s: float) -> None:
        """End this thread, which waits inside the store, by telling everybody that this rank left its loop.

        A thread that still waits there when the interpreter ends would abort the process.
        """
        self._leaving.set()
        deadline = time.monotonic() + timeout_s
        while self.is_alive() and (left_s := deadline - time.monotonic()) > 0:
            if not self._comes_back(self._say_goodbye, left_s):
                return
            self.join(0.1)

    def _say_goodbye(self) -> None:
        with self._talk_lock:
            number = self._number
            self._talking.decide(f"p/{number}", encode(goodbye(number, self._rank)))

    def _follow(self, armed: Armed) -> None:
        boundary, proposal = self._boundary, armed.proposal
        number = proposal.number
        refusal = self._refusal(proposal) or self._stray(proposal)
        if refusal is None:
            boundary.arm(armed)
            if boundary.closed:
                refusal = "the run has ended"
        given = answer(proposal.position, at=boundary.position, held_at=boundary.held_at, refusal=refusal)
        self._owe(f"a/{number}/{self._rank}", encode(given))
        armed.decide(self._hear(f"d/{number}") or ABORT)
        if armed.decision != GO:
            boundary.disarm(armed)
            return
        if boundary.closed:
            boundary.close()
        if proposal.two_phase:
            self._until_met(armed, armed.prepared)
            if not armed.staged and armed.outcome is not None:
                # The training thread left its loop, or raised, before it staged: the others must not wait for it.
                self._owe(f"l/{number}/{self._rank}", encode(armed.outcome))
            armed.judge(self._hear(f"c/{number}") or CANCEL)
        self._until_met(armed, armed.applied)
        assert armed.outcome is not None
        self._owe(f"r/{number}/{self._rank}", encode(armed.outcome))

    def _clear_away(self) -> None:
        """Rank 0 proposed what was just followed, so it has read all that this rank wrote about those before."""
        self._spent.past(self._number - 1)
        with contextlib.suppress(StoreSilent):  # then with the next one
            for number in self._spent.due():
                self.delete(of_rank(number, self._rank))
                self._spent.gone(number)

    def _hear(self, key: str) -> bytes | None:
        """Wait for a key as long as it takes, over a new connection where the old one is cut."""
        self._lasting(lambda: self._waiting.wait([key]))
        return self._lasting(lambda: self._waiting.get(key))

    def _owe(self, key: str, content: bytes) -> None:
        """Write what the others wait for, if need be later."""
        self._lasting(lambda: self.put(key, content))

    def _lasting(self, call: Callable[[], T]) -> T:
        told = False
        while True:
            try:
                found = call()
            except StoreCut as error:
                if self._leaving.wait(_AGAIN_S):
                    raise
                if not told:
                    log.warning("trainctl: no command reaches this rank, training goes on: %s", error)
                told = True
            else:
                if told:
                    log.warning("trainctl: commands reach this rank again")
                return found

    def _stray(self, proposal: Proposal) -> str | None:
        """Why this rank has no boundary in common with the others now."""
        if self._ranks > 1 and in_shadow(self._training):
            return _SHADOWS
        return no_common_step(own=self._boundary.completed, other=proposal.at, whose="rank 0")

    def _until_met(self, armed: Armed, event: threading.Event) -> None:
        """Wait for the training thread, unless it will not come.

        Its data ended within `Join` after it said *ready*, or it is past the boundary: then no command may wait for it,
        for each waits for the one before, on every rank.
        """
        boundary, proposed = self._boundary, armed.proposal.position

        def gone() -> str | None:
            # Where it is, and then whether it has met: it leaves a boundary that it meets only after it has said so.
            past = boundary.position.passed(proposed)
            if armed.met:
                return None
            return _PASSED if past else _SHADOWS if self._ranks > 1 and in_shadow(self._training) else None

        why = watch(event, gone, _SHADOW_S)
        if why is not None:
            boundary.disarm(armed)
            boundary.miss(armed, why)
            event.wait()

    # What the training thread calls, at its boundary only

    def together(self, armed: Armed) -> bool:
        """Whether every rank is at this boundary; where one does not come, nobody applies. Raises `InDoubt`."""
        limit_s = self.gather_limit_s
        if self._ranks == 1:
            armed.on(RankEvent.ALL)
            return True
        gathering = Gathering(self, number=armed.proposal.number, rank=self._rank, ranks=self._ranks, limit_s=limit_s)
        self.gathering = gathering
        found = gathering.wait()
        armed.on(RankEvent.SILENT if found is None else RankEvent.ALL if found else RankEvent.ALONE)
        if found is None:
            raise InDoubt(
                f"the job's store has been silent for {DOUBT_S:.0f} s while the ranks gathered to apply a command: "
                "this rank stops, so that no rank trains on with half of it. Resume from the last good checkpoint"
            )
        return found

    @property
    def gather_limit_s(self) -> float:
        return max(GATHER_S, GATHER_STEPS * self._boundary.step_s)

    def going(self, armed: Armed) -> bool:
        """The decision on what is armed here; when none came in time, force one. Raises `InDoubt`."""
        going = armed.going()
        if going is not None:
            return going
        deadline = time.monotonic() + DOUBT_S
        while (left_s := deadline - time.monotonic()) > 0:
            self._comes_back(lambda: self._force(armed), left_s)
            if armed.decision is not None:
                return armed.decision == GO
            time.sleep(min(_AGAIN_S, max(0.0, deadline - time.monotonic())))
        armed.on(RankEvent.SILENT)
        raise InDoubt(
            f"the job's store has been silent for {DOUBT_S:.0f} s while a command was being decided: this rank stops, "
            "so that no rank trains on with half of it. Resume from the last good checkpoint"
        )

    def staged(self, armed: Armed, staged: Outcome) -> bool:
        """Tell that this rank is staged, or why not, and wait for the common verdict. Raises `InDoubt`."""
        number = armed.proposal.number
        silent = "the job's store fell silent between loading and restoring: resume from the last good checkpoint"
        told = self._comes_back(lambda: self.put(f"l/{number}/{self._rank}", encode(staged)), DOUBT_S)
        armed.stage()
        if not (told and self._learns_the_verdict(armed)) or armed.doubt is not None:
            armed.on(RankEvent.SILENT)
            raise InDoubt(silent) from armed.doubt
        return armed.verdict == COMMIT

    def called_off(self, armed: Armed) -> bool:
        """Whether what this rank still prepares was withdrawn meanwhile. A store that is silent withdraws nothing."""
        found: list[bool] = []
        self._comes_back(lambda: found.append(self.has([f"c/{armed.proposal.number}"])), DOUBT_S)
        return found == [True]

    def _learns_the_verdict(self, armed: Armed) -> bool:
        """Wait for it; false where the store is silent.

        Others may load for as long as they like, if only rank 0 says that it still waits for them.

        A rank 0 that says nothing for `DOUBT_S` may never decide: then this rank does, and all obey what it wrote.
        """
        heard: bytes | None = None
        heard_at = time.monotonic()
        while not armed.judged.wait(_LOOK_S):
            sign: list[bytes | None] = []
            if not self._comes_back(lambda sign=sign: sign.append(self._look(armed)), DOUBT_S):  # type: ignore[misc]
                return armed.judged.is_set()
            if sign[0] != heard:
                heard, heard_at = sign[0], time.monotonic()
            elif time.monotonic() - heard_at > DOUBT_S:
                log.warning("trainctl: rank 0 has not decided for %.0f s: the command is cancelled", DOUBT_S)
                armed.on(RankEvent.UNHEARD)
                return self._comes_back(lambda: self._force_cancel(armed), DOUBT_S)
        return True

    # Calls on the store that must come back

    def _force(self, armed: Armed) -> None:
        """Write ABORT unless it was decided; either way the decision is known then."""
        with self._talk_lock:
            if self._is_past(armed):
                return
            held = self._talking.decide(f"d/{armed.proposal.number}", ABORT)
        armed.decide(held or ABORT)

    def _force_cancel(self, armed: Armed) -> None:
        with self._talk_lock:
            if self._is_past(armed):
                return
            held = self._talking.decide(f"c/{armed.proposal.number}", CANCEL)
        armed.judge(held or CANCEL)

    def _is_past(self, armed: Armed) -> bool:
        """Whether the control thread has followed it to its end; for who holds the lock under which it answers.

        Rank 0 takes away what was decided only after that answer: to decide it once more would be another decision.
        """
        return armed.proposal.number < self._number

    def _look(self, armed: Armed) -> bytes | None:
        """The newest sign that rank 0 waits for what is staged."""
        key = f"v/{armed.proposal.number}"
        with self._talk_lock:
            if self._is_past(armed) or not self._talking.has([key]):
                return None
            return self._talking.get(key)

    def _withdraw(self, armed: Armed) -> None:
        """This rank leaves its loop: what is not decided is not to be applied by the others."""
        if armed.decision != ABORT:
            self._comes_back(lambda: self._call_off(armed), _WITHDRAW_S)

    def _call_off(self, armed: Armed) -> None:
        with self._talk_lock:
            if self._is_past(armed):
                return
            call_off(self._talking, armed.proposal.number)
        if armed.decision is None:
            self._force(armed)

    def _comes_back(self, call: Callable[[], None], timeout_s: float) -> bool:
        """Whether a call on the store came back in time, and well.

        It is made by a thread of its own, for the training thread must not wait for ever: a store that is cut off does
        not fail, it blocks for as long as TCP does, and so does whoever waits for the lock that a blocked call holds.
        """
        done: list[bool] = []

        def attempt() -> None:
            with contextlib.suppress(StoreSilent):
                call()
                done.append(True)

        thread = threading.Thread(target=attempt, name="trainctl-asks", daemon=True)
        thread.start()
        thread.join(timeout_s)
        return bool(done)
