"""Which micro-batches the other ranks made each step of, told where they differ from rank 0's.

Ranks usually read as many micro-batches a step as rank 0, and so have the same absolute indices, each of its own share
of the data. What a rank read of late goes with its report through the store in runs of consecutive steps. Rank 0 logs
`data_first.R` and `data_last.R` at the steps where rank R's range is another than its own `data_first` and `data_last`.
"""

import time
from collections.abc import Sequence

import msgspec

from trainctl.trainer.ranges import Range
from trainctl.trainer.rows import column
from trainctl.wire.messages import RankFigures, Rows

RUNS_A_REPORT = 100
RANKS_TOLD = 64
_STEPS_A_ROWS = 2000  # so that it fits a packet of the link
_REPORTS_OVERLAP = 10  # a report that rank 0 did not see in its second is in the next nine


class Run(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive steps, each of `batches` micro-batches, each beginning where the one before ended."""

    step: int
    steps: int
    first: int
    batches: int


class Report(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells once a second."""

    figures: RankFigures
    incarnation: int
    runs: list[Run]


encode_report = msgspec.msgpack.Encoder().encode
decode_report = msgspec.msgpack.Decoder(Report).decode


def in_runs(ranges: Sequence[tuple[int, Range]]) -> list[Run]:
    """Steps with their ranges, oldest first, run-length coded; the newest `RUNS_A_REPORT` runs."""
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
    return runs[-RUNS_A_REPORT:]


class Recently:
    """Where a rank's reports begin, so that one repeats what the nine before it told."""

    def __init__(self) -> None:
        self._steps: list[int] = []

    def since(self, step: int) -> int:
        """The first step of the report made at `step`."""
        self._steps = [known for known in self._steps if known <= step][-_REPORTS_OVERLAP:]
        self._steps.append(step)
        return self._steps[0]


class RankRanges:
    """Rank 0's side: what of others' reports is news, as rows."""

    def __init__(self, attempt: int) -> None:
        self._attempt = attempt
        self._incarnation = 0
        self._begins = 0  # the step after which this branch's own ones come
        self._told: dict[int, int] = {}  # the newest step compared, by rank
        self._differing: set[int] = set()
        self.passed_over = 0  # ranks beyond `RANKS_TOLD`

    def rewound(self, step: int) -> None:
        """The run went back to `step`: what was told up to there stands."""
        self._begins = step

    def observe(self, reports: Sequence[Report], own: Sequence[tuple[int, Range]], incarnation: int) -> list[Rows]:
        """Compare reports of this incarnation with rank 0's own ranges of the same steps."""
        if incarnation != self._incarnation:
            self._incarnation = incarnation
            self._told.clear()
        mine, made = dict(own), []
        newest = own[-1][0] if own else 0
        for report in reports:
            rank = report.figures.rank
            if report.incarnation != incarnation or rank == 0:
                continue
            told = max(self._begins, self._told.get(rank, 0))
            found = [(step, made_of) for step, made_of in _steps(report.runs) if told < step <= newest]
            if not found:
                continue
            self._told[rank] = found[-1][0]
            differing = [(step, made_of) for step, made_of in found if step in mine and mine[step] != made_of]
            if differing and self._admit(rank):
                parts = range(0, len(differing), _STEPS_A_ROWS)
                made += [self._rows(rank, differing[at : at + _STEPS_A_ROWS]) for at in parts]
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
            columns=[
                column(f"data_first.{rank}", [float(made_of[0]) for _, made_of in differing]),
                column(f"data_last.{rank}", [float(made_of[1]) for _, made_of in differing]),
            ],
        )


def _steps(runs: Sequence[Run]) -> list[tuple[int, Range]]:
    found = []
    for run in runs:
        for offset in range(run.steps):
            first = run.first + offset * run.batches
            found.append((run.step + offset, (first, first + run.batches - 1)))
    return found
