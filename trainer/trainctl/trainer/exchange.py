"""What ranks tell one another through the job's store beside the agreement: figures, and where each node's agent is.

In a thread of its own, for a store may block for as long as it likes: what rank 0 publishes of itself, and the clocks
of pauses and of changes on trial, go on meanwhile.
"""

import logging
import threading
import time
from collections.abc import Sequence

import msgspec

from trainctl.trainer.control import Control
from trainctl.trainer.core import Core
from trainctl.trainer.figures import figures_of, lost_here
from trainctl.trainer.meeting import Connection, StoreSilent
from trainctl.trainer.rank_ranges import RankRanges, Recently, Report, decode_report, encode_report, report_of
from trainctl.wire.messages import Ranks, Rows, SourceAddress

log = logging.getLogger(__name__)

WARNING_KEY = "w"  # that a rank's machine will go away, as it heard
_LEAVE_S = 2.0
_LAST_S = 1.0
_LAST_LOOK_S = 0.05


class Exchange(threading.Thread):
    """This rank's side of the once-a-second report, and rank 0's reading of everybody's.

    `report` and `everybody` are the sender's, and never wait. A store that does not answer costs the report of that
    second; `silent_since` says since when it has been so, on `time.monotonic`'s clock.
    """

    def __init__(self, core: Core, control: Control | None, reading: Connection | None) -> None:
        super().__init__(name="trainctl-exchange", daemon=True)
        self._core = core
        self._control = control
        self._reading = reading
        self._last_step = core.boundary.completed
        self._last_steps_s = core.steps_s
        self._keys = [f"g/{rank}" for rank in range(core.place.world_size)]
        self._due = threading.Event()
        self._closing = False
        self._mine: Report | None = None
        self._found: list[Report] | None = None  # of all ranks, since the sender looked last
        self._reports: list[Report] = []
        self._lost: dict[int, int] = {}
        self._recently = Recently()
        self.ranges = RankRanges(core.identity.attempt)
        self._asked_at: float | None = None
        self._failed_at: float | None = None
        self.agent: SourceAddress | None = None  # of this node, where this rank looks after it
        self.agents: list[SourceAddress] = []
        self._noticed: bytes | None = None

    def report(self, phases_s: dict[str, float], *, last: bool = False) -> None:
        """Hand over this rank's figures of the last second; those that still wait are replaced."""
        step, steps_s = self._core.boundary.completed, self._core.steps_s
        figures = figures_of(self._core, phases_s, max(0, step - self._last_step), steps_s - self._last_steps_s)
        incarnation = self._core.incarnation  # before the ranges: a rollback sets it after them
        since = self._recently.since(incarnation, self._core.ranges.began)
        lost = sum(lost_here(self._core).values())
        self._mine = report_of(figures, incarnation, self._core.ranges.since(since), since, last=last, lost=lost)
        self._last_step, self._last_steps_s = step, steps_s
        self._due.set()

    def everybody(self) -> Ranks | None:
        """The newest figures of all ranks, once."""
        found, self._found = self._found, None
        if found is None:
            return None
        self._reports = found
        self._lost |= {report.figures.rank: report.lost for report in found if report.figures.rank != 0}
        return Ranks(incarnation=self._core.incarnation, ranks=[report.figures for report in found])

    @property
    def lost_elsewhere(self) -> int:
        """How many values the other ranks could not keep, as far as they said."""
        return sum(self._lost.values())

    def differing_ranges(self) -> list[Rows]:
        """Of what `everybody` just gave: where another rank's data are other batches than rank 0's."""
        oldest = min((run.step for report in self._reports for run in report.runs), default=None)
        if oldest is None:
            return []
        incarnation = self._core.incarnation  # before the ranges, as in `report`
        own = self._core.ranges.since(oldest)
        return self.ranges.observe(self._reports, own, incarnation, began=self._core.ranges.began)

    # What `preemption` asks, of the last look at the store

    def has(self, _keys: Sequence[str]) -> bool:
        return self._noticed is not None

    def get_all(self, _keys: Sequence[str]) -> list[bytes | None]:
        return [self._noticed]

    @property
    def silent_since(self) -> float | None:
        """Since when the store has not answered; a call that is under way counts from when it was made."""
        return self._failed_at or self._asked_at

    def close(self, phases_s: dict[str, float]) -> None:
        """Exchange what this rank did since its last report, and end. Waits 2 s at most."""
        self.report(phases_s, last=True)
        self._closing = True
        self._due.set()
        if self.is_alive():
            self.join(_LEAVE_S)

    def run(self) -> None:
        if self._control is None:
            return
        while True:
            self._due.wait()
            self._due.clear()
            closing = self._closing
            self._asked_at = time.monotonic()
            try:
                self._exchange(self._control)
                if closing:
                    self._hear_the_last()
            except StoreSilent:
                self._failed_at = self._failed_at or self._asked_at
            except Exception as error:
                log.exception("trainctl: the ranks' figures are not exchanged, training goes on")
                self._core.complain("telemetry", f"the ranks' figures are not exchanged: {error}")
                return
            else:
                self._failed_at = None
            self._asked_at = None
            if closing:
                return

    def _exchange(self, control: Control) -> None:
        mine, agent = self._mine, self.agent
        if mine is not None:
            control.put(f"g/{mine.figures.rank}", encode_report(mine))
            self._recently.sent(mine.incarnation, mine.figures.step)
        if agent is not None:
            control.put(f"n/{self._core.place.rank}", msgspec.msgpack.encode(agent))
        if self._reading is None:
            return
        if self._noticed is None and self._reading.has([WARNING_KEY]):
            (self._noticed,) = self._reading.get_all([WARNING_KEY])
        self._read_reports(self._reading)
        keys = [key for rank in range(self._core.place.world_size) if self._reading.has([key := f"n/{rank}"])]
        addresses = self._reading.get_all(keys) if keys else []
        self.agents = [msgspec.msgpack.decode(found, type=SourceAddress) for found in addresses if found is not None]

    def _hear_the_last(self) -> None:
        """On rank 0: look again until the other ranks have said their last, for a moment: one that died never will."""
        deadline = time.monotonic() + _LAST_S
        while self._reading is not None and self._found is not None and time.monotonic() < deadline:
            if all(report.last for report in self._found):
                return
            time.sleep(_LAST_LOOK_S)
            self._read_reports(self._reading)

    def _read_reports(self, reading: Connection) -> None:
        if reading.has(self._keys):
            sealed = reading.get_all(self._keys)
            self._found = [decode_report(found) for found in sealed if found is not None]
