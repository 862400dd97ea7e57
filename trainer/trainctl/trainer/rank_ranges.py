"""Which micro-batches the other ranks made each step of, told where they differ from rank 0's.

Ranks usually read as many micro-batches a step as rank 0, and so have the same absolute indices, each of its own share
of the data. What a rank read of late goes with its report through the store in runs of consecutive steps. Rank 0 logs
`data_first.R` and `data_last.R` at the steps where rank R's range is another than its own `data_first` and `data_last`.

A report repeats what the nine before it told, and what could not be put into the store waits in it. Where rank 0 misses
more than that, the gap is told, and rank R's range is logged at the first step behind it whatever it is.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from trainctl.trainer.ranges import KEPT_STEPS, Range
from trainctl.trainer.rows import columns
from trainctl.wire.messages import RankFigures, Rows

RUNS_A_REPORT = 100
RANKS_TOLD = 64
_RANKS_NAMED = 5
_STEPS_A_ROWS = 2000  # so that it fits a packet of the link
_REPORTS_OVERLAP = 10  # a report that rank 0 did not see in its second is in the next nine


class Run(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive steps, each of `batches` micro-batches, each beginning where the one before ended."""

    step: int
    steps: int
    first: int
    batches: int


class Report(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells once a second. `since`: the first step that it would tell of; `last`: no more will come;
    `lost`: values that it could not keep since the attempt began."""

    figures: RankFigures
    incarnation: int
    runs: list[Run]
    since: int
    last: bool = False
    lost: int = 0


encode_report = msgspec.msgpack.Encoder().encode
decode_report = msgspec.msgpack.Decoder(Report).decode


def report_of(
    figures: RankFigures,
    incarnation: int,
    ranges: Sequence[tuple[int, Range]],
    since: int,
    *,
    last: bool = False,
    lost: int = 0,
) -> Report:
    """The report of a rank's ranges of the steps from `since` on; the newest of them, where they are too many."""
    runs = in_runs(ranges)
    if len(runs) > RUNS_A_REPORT:
        runs = runs[-RUNS_A_REPORT:]
        since = runs[0].step
    elif len(ranges) >= KEPT_STEPS:
        since = max(since, runs[0].step)
    return Report(figures, incarnation, runs, since, last, lost)


def in_runs(ranges: Sequence[tuple[int, Range]]) -> list[Run]:
    """Steps with their ranges, oldest first, run-length coded."""
    runs: list[Run] = []
    for step, (first, last) in ranges:
        batches, before = last - first + 1, runs[-1] if runs else None
        goes_on = (
            before is not None
            and step == before.step + before.steps
            and batches == before.batches
            and first == before.first + before.steps * before.batches
        )
        if before is not None and goes_on:
            runs[-1] = Run(before.step, before.steps + 1, before.first, batches)
        else:
            runs.append(Run(step, 1, first, batches))
    return runs


class Recently:
    """Where a rank's reports begin, so that one repeats what the nine before it told.

    Asked by the thread that makes reports, and told by the one that puts them into the store.
    """

    def __init__(self) -> None:
        self._branch = 0
        self._sent: tuple[int, ...] = ()

    def since(self, incarnation: int, began: int) -> int:
        """The first step of the next report; the branch of this incarnation began behind step `began`."""
        if incarnation != self._branch:
            self._branch, self._sent = incarnation, (began + 1,)
        return self._sent[0]

    def sent(self, incarnation: int, step: int) -> None:
        """A report that was made at `step` is in the store."""
        if incarnation == self._branch:
            self._sent = (*self._sent, step)[-_REPORTS_OVERLAP:]  # the step itself may have been about to be noted


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Steps, the last included, of which it is not known what some ranks made them of."""

    first: int
    last: int
    ranks: list[int]

    def __str__(self) -> str:
        named = ", ".join(str(rank) for rank in self.ranks[:_RANKS_NAMED])
        more = f" and {len(self.ranks) - _RANKS_NAMED} more" if len(self.ranks) > _RANKS_NAMED else ""
        ranks = "rank" if len(self.ranks) == 1 else "ranks"
        return (
            f"which data {ranks} {named}{more} made steps {self.first} to {self.last} of is not recorded: their "
            "reports did not come through the job's store, or held too many changes. They need not have been rank 0's"
        )


class RankRanges:
    """Rank 0's side: what of others' reports is news, as rows."""

    def __init__(self, attempt: int) -> None:
        self._attempt = attempt
        self._incarnation = 0
        self._told: dict[int, int] = {}  # the newest step compared, by rank
        self._differing: set[int] = set()
        self.passed_over = 0  # ranks beyond `RANKS_TOLD`
        self.gaps: list[Gap] = []  # emptied by whoever tells of them

    def observe(
        self, reports: Sequence[Report], own: Sequence[tuple[int, Range]], incarnation: int, *, began: int = 0
    ) -> list[Rows]:
        """Compare reports of this incarnation, which began behind step `began`, with rank 0's ranges of those steps."""
        if incarnation != self._incarnation:
            self._incarnation = incarnation
            self._told.clear()
        mine, made = dict(own), []
        newest = own[-1][0] if own else 0
        missed: dict[tuple[int, int], list[int]] = {}
        for report in reports:
            rank = report.figures.rank
            if report.incarnation != incarnation or rank == 0:
                continue
            told = max(began, self._told.get(rank, 0))
            found = [(step, made_of) for step, made_of in _steps(report.runs) if told < step <= newest]
            if report.since <= told + 1:
                told = max(told, min(newest, report.figures.step - 1))  # also over steps that it made of no batch
            if not found:
                self._told[rank] = told
                continue
            self._told[rank] = max(told, found[-1][0])
            differing = [(step, made_of) for step, made_of in found if step in mine and mine[step] != made_of]
            if report.since > told + 1:
                missed.setdefault((told + 1, report.since - 1), []).append(rank)
                differing = [found[0], *(known for known in differing if known != found[0])]
            if differing and self._admit(rank):
                parts = range(0, len(differing), _STEPS_A_ROWS)
                made += [self._rows(rank, differing[at : at + _STEPS_A_ROWS]) for at in parts]
        self.gaps += [Gap(first=first, last=last, ranks=ranks) for (first, last), ranks in missed.items()]
        return made

    def _admit(self, rank: int) -> bool:
        if rank not in self._differing and len(self._differing) >= RANKS_TOLD:
            self.passed_over += 1
            return False
        self._differing.add(rank)
        return True

    def _rows(self, rank: int, differing: Sequence[tuple[int, Range]]) -> Rows:
        now = time.time()
        return Rows(
            attempt=self._attempt,
            incarnation=self._incarnation,
            steps=[step for step, _ in differing],
            times=[now] * len(differing),
            columns=columns(
                (f"data_first.{rank}", f"data_last.{rank}"), np.array([made_of for _, made_of in differing], "<f8").T
            ),
        )


def _steps(runs: Sequence[Run]) -> list[tuple[int, Range]]:
    found = []
    for run in runs:
        for offset in range(run.steps):
            first = run.first + offset * run.batches
            found.append((run.step + offset, (first, first + run.batches - 1)))
    return found
