"""How an evaluation that an operator asked for went on every rank, and whether training can go on where one raised.

Each rank reports in the job's store what became of its own `on_eval` (`e/N/R`). Rank 0 tells the outcome once all have,
and a rank whose own raised waits for that: in a collective that others still wait in, its next step would meddle.

    rank R   raised     `x/N`: after how many of its collectives; written by the first that raises
    another  is in a later one, which that rank never comes to: its `on_eval` cannot return, so it says that it hangs
    all      reported   where the ranks made the same number of collectives training goes on, else the exception passes

Collectives are counted in the script's default group; of those in groups of its own nothing is known.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

import msgspec
import torch
import torch.distributed as dist
from msgspec import Struct
from torch import nn

from trainctl.trainer.agreement import DOUBT_S, Proposal, encode
from trainctl.trainer.core import Core
from trainctl.trainer.meeting import StoreSilent
from trainctl.trainer.outcomes import update_of

log = logging.getLogger(__name__)

_POLL_S: Final = (0.02, 0.25)
_WORDS: Final = 300  # of an exception's text


class Report(Struct, frozen=True, kw_only=True):
    """What became of one rank's `on_eval`; `collectives`: made meanwhile, None where they cannot be counted."""

    complete: bool
    reason: str | None = None
    raised: bool = False
    collectives: int | None = None


class Talk(Protocol):
    """A rank's calls on the store, one at a time. Each raises `StoreSilent`."""

    def put(self, key: str, content: bytes) -> None: ...

    def has(self, keys: Sequence[str]) -> bool: ...

    def decide(self, key: str, content: bytes) -> bytes | None: ...

    def get_all(self, keys: Sequence[str]) -> list[bytes | None]: ...

    def delete(self, keys: Sequence[str]) -> None: ...


class Evaluated:
    """One rank's side of it, for the evaluation of proposal `number`. In a thread, for a store may block.

    `tell` is called with everybody's reports on rank 0. `over` is set when nothing more is to be learnt here.
    `before`: the evaluation that was asked for before this one, whose keys rank 0 takes away behind this one.
    """

    def __init__(
        self,
        talk: Talk,
        *,
        number: int,
        rank: int,
        ranks: int,
        tell: Callable[[Sequence[Report]], None],
        collectives: Callable[[], int | None] | None = None,
        before: "Evaluated | None" = None,
    ) -> None:
        self._thread = threading.Thread(target=self._run, name="trainctl-evaluated", daemon=True)
        self._talk = talk
        self._own = f"e/{number}/{rank}"
        self._all = [f"e/{number}/{other}" for other in range(ranks)]
        self._raised = f"x/{number}"
        self._leads = rank == 0
        self._earlier: list[Evaluated] = []
        if before is not None and self._leads and ranks > 1:
            self._earlier = [*before._earlier, before]
        self._tell = tell
        self._count = collectives or collectives_made
        self._began = self._count()
        self._mine: Report | None = None
        self._written: Report | None = None
        self._news = threading.Event()
        self._closing = False
        self._heard = time.monotonic()
        self.over = threading.Event()
        self.reports: list[Report] = []

    def report(self, *, complete: bool, reason: str | None = None, raised: bool = False) -> None:
        """How it went here."""
        self._mine = Report(complete=complete, reason=reason, raised=raised, collectives=self._since())
        if len(self._all) == 1:
            self._end([self._mine])
        self._news.set()

    def close(self, timeout_s: float = 0.0) -> None:
        """Wait a moment for what the others report, and end."""
        if self._mine is not None:
            self.over.wait(timeout_s)
        self._closing = True
        self._news.set()
        if self._thread.is_alive() and timeout_s > 0:
            self._thread.join(timeout_s)

    def start(self) -> None:
        """Follow it, where there are others."""
        if len(self._all) > 1:
            self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def silent_s(self) -> float:
        """How long the store has not answered."""
        return time.monotonic() - self._heard

    def _run(self) -> None:
        reported_at: float | None = None
        while not self._closing and not self.over.is_set():
            try:
                self._look()
                self._heard = time.monotonic()
            except StoreSilent:
                pass
            except Exception:
                log.exception("trainctl: what became of an evaluation is not known, training goes on")
                return
            wait_s = _POLL_S[1]
            if self._mine is not None:
                reported_at = reported_at or time.monotonic()
                wait_s = min(max((time.monotonic() - reported_at) / 20, _POLL_S[0]), _POLL_S[1])
            self._news.wait(wait_s)
            self._news.clear()

    def _look(self) -> None:
        mine = self._mine
        if mine is None and self._written is None and self._hangs():
            mine = Report(complete=False, reason=_HANGS, collectives=self._since())
        mine = mine or self._written
        if mine is None:
            return
        if mine is not self._written:
            if mine.raised:
                self._talk.decide(self._raised, encode(mine))
            self._talk.put(self._own, encode(mine))
            self._written = mine
        if not self._leads and not mine.raised:
            if self._mine is not None:
                self.over.set()
        elif self._talk.has(self._all):
            self._end([_read(sealed) for sealed in self._talk.get_all(self._all)])

    def _end(self, reports: list[Report]) -> None:
        self.reports = reports
        if self._leads:
            self._tell(reports)
        self.over.set()
        self._clear_away()

    def _clear_away(self) -> None:
        """Every rank has reported of this evaluation, so it has left those before, and read what it had to there."""
        with contextlib.suppress(StoreSilent):  # then behind the next one
            for earlier in self._earlier.copy():
                if earlier.over.is_set():  # else this rank has yet to read of it
                    self._talk.delete([*earlier._all, earlier._raised])
                    self._earlier.remove(earlier)

    def _hangs(self) -> bool:
        """Whether this rank is in a collective that one whose `on_eval` raised did not come to."""
        if not self._talk.has([self._raised]):
            return False
        (sealed,) = self._talk.get_all([self._raised])
        theirs, mine = _read(sealed).collectives, self._since()
        if self._mine is not None:
            return False  # it was done before it was counted, and is in its next step's collectives
        return theirs is not None and mine is not None and mine > theirs

    def _since(self) -> int | None:
        now = self._count()
        return None if now is None or self._began is None else now - self._began


_HANGS = "it waits in a collective that the others do not come to"


def told(reports: Sequence[Report]) -> str | None:
    """Why it failed, by rank where they differ; None where it is complete on every rank."""
    failed = [(rank, report) for rank, report in enumerate(reports) if not report.complete]
    if not failed:
        return None
    rank, first = next((found for found in failed if found[1].raised), failed[0])
    if not first.raised or len(reports) == 1:
        return first.reason
    alike = len({report.reason for report in reports}) == 1
    drifted = "" if in_step(reports) else f"; {NOT_IN_STEP}"
    return f"{'every rank' if alike else f'rank {rank}'}: {first.reason}{drifted}"


NOT_IN_STEP = (
    "the ranks have not made the same collectives since, so no step would be right: the job ends here. Go on from the "
    "last good checkpoint"
)


def in_step(reports: Sequence[Report]) -> bool:
    """Whether the next collective of each rank is the same one, as far as it is known."""
    return len({report.collectives for report in reports if report.collectives is not None}) <= 1


def words_for(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"on_eval raised {type(error).__name__}: {text[:_WORDS]}{'…' if len(text) > _WORDS else ''}"


@contextmanager
def put_back(models: Iterable[nn.Module]) -> Iterator[None]:
    """An evaluation that raises leaves a model in evaluation's mode: training on in it would be wrong, and silent."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    graded = torch.is_grad_enabled()
    try:
        yield
    except Exception:
        for module, training in modes:
            module.training = training
        torch.set_grad_enabled(graded)
        raise


def survives(core: Core, survey: Evaluated, error: Exception, meet: Callable[[], None]) -> bool:
    """Report that this rank's `on_eval` raised, and learn from what all report whether training can go on.

    Others may evaluate for as long as they like; what was agreed on for their batches is met here. False where the
    store is silent: then nobody can know.
    """
    log.warning("trainctl: the evaluation that was asked for failed on this rank", exc_info=error)
    survey.report(complete=False, reason=words_for(error), raised=True)
    core.doing = "evaluating"
    try:
        over = False
        while not over:
            if core.boundary.armed is not None:  # at least once: a proposal armed before this is met at this place
                meet()
            over = survey.over.wait(_POLL_S[0])
            # Asked in this order: its thread ends once it has set `over`.
            if (survey.silent_s > DOUBT_S or not survey.is_alive()) and not survey.over.is_set():
                return False
    finally:
        core.doing = None
    return in_step(survey.reports)


def survey_of(core: Core, talk: Talk, proposal: Proposal, before: Evaluated | None) -> Evaluated:
    """Begin to follow the evaluation of a proposal on this rank; `before`: the one that was asked for before."""
    step, incarnation, place = core.boundary.completed, core.incarnation, core.place

    def tell(reports: Sequence[Report]) -> None:
        reason = told(reports)
        state, by = "applied" if reason is None else "failed", (proposal.command, proposal.actor)
        core.event(update_of(*by, state, step, core.boundary, incarnation, place.world_size, reason=reason))

    number, rank, ranks = proposal.number, place.rank, place.world_size
    survey = Evaluated(talk, number=number, rank=rank, ranks=ranks, tell=tell, before=before)
    survey.start()
    return survey


def collectives_made() -> int | None:
    """How many collectives this process has begun in the default group, None where that is not to be had."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    try:
        group: Any = dist.distributed_c10d._get_default_group()
        return int(group._get_sequence_number_for_group())
    except (AttributeError, RuntimeError, ValueError):  # it has no public name, and not every backend counts
        return None


_decode = msgspec.msgpack.Decoder(Report).decode


def _read(sealed: bytes | None) -> Report:
    if sealed is None:
        return Report(complete=False, reason="a report that no rank of this run has signed")
    return _decode(sealed)
