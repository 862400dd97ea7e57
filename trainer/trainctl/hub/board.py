"""Where the run stands: its state and its particulars, told to subscribers when they change."""

import logging
import time

import msgspec

from trainctl.hub.disk import Disk, DiskHangs
from trainctl.hub.life import RunLife, change
from trainctl.hub.ownership import Ownership
from trainctl.hub.recorder import Recorder
from trainctl.wire.messages import FINAL_STATES, Anomaly, LinkHello, Ranks, RunInfo, RunState, Severity, StateChanged
from trainctl.wire.rundir import RunDir, write_atomic
from trainctl.wire.server import Server

log = logging.getLogger(__name__)


class RunBoard:
    """Keeps the record's state and `run.json` in step with what is known."""

    def __init__(
        self, *, recorder: Recorder, server: Server, run_dir: RunDir, ownership: Ownership, disk: Disk
    ) -> None:
        self.life = RunLife(recorder.record.state)
        self._info_on_disk: RunInfo | None = recorder.record.info
        self._recorder = recorder
        self._record = recorder.record
        self._server = server
        self._run_dir = run_dir
        self._ownership = ownership
        self._disk = disk

    @property
    def info_written(self) -> bool:
        """Whether run.json is what it should be."""
        return self._info_on_disk is self._record.info

    def info_gone(self) -> None:
        """Somebody deleted run.json."""
        self._info_on_disk = None

    @property
    def state(self) -> RunState:
        return self._record.state

    @property
    def info(self) -> RunInfo:
        return self._record.info

    @property
    def unreadable_blocks(self) -> int:
        return self._record.metrics.unreadable

    def knows(self, attempt: int) -> bool:
        """Whether an attempt's beginning is recorded already."""
        return self._record.knows(attempt)

    def begin(self, hello: LinkHello) -> None:
        """Rank 0 of a new attempt is there."""
        before = self.state
        first = not any(isinstance(event, StateChanged) for event in self._record.events)
        state = self.life.hello(hello, time.time())
        self._recorder.take(
            StateChanged(
                time=state.since,
                step=state.step,
                incarnation=state.incarnation,
                state=state.state,
                before=None if first else before.state,
                attempt=state.attempt,
                reason=None if first else f"attempt {state.attempt}",
                parent=hello.parent,
            )
        )
        self._record.progress(state)
        self._server.beat()

    def become(self, state: RunState) -> None:
        """The run is in this state now: tell of it where it is a new one."""
        event = change(self.state, state, time.time())
        if event is not None:
            self._recorder.take(event)
            if state.state in FINAL_STATES and self._record.ranks:
                self._end_ranks(state)
        self._record.progress(state)
        if event is not None:
            self._server.beat()

    def _end_ranks(self, state: RunState) -> None:
        """No rank reports any more: what they last said of themselves is not true now."""
        ended = state.state in {"finished", "stopped"}
        ranks = [
            msgspec.structs.replace(figures, state=state.state, step=state.step if ended else figures.step)
            for figures in self._record.ranks.values()
        ]
        self._recorder.take(Ranks(incarnation=state.incarnation, ranks=ranks))

    def take_info(self, info: RunInfo) -> None:
        """The run's particulars, into the snapshot and into run.json."""
        self._record.info = info
        self.write_info()

    def write_info(self) -> None:
        """Write run.json if it is not up to date; where that fails, `info_written` stays false."""
        if self.info_written or not self._ownership.held():
            return
        info = self._record.info

        def write() -> None:
            write_atomic(self._run_dir.info_file, msgspec.json.encode(info))
            self._info_on_disk = info

        try:
            self._disk.do(write)
        except DiskHangs:
            pass  # it goes on, or is tried again by whoever looks at `info_written`
        except OSError as error:
            log.warning("run.json cannot be written: %s", error)

    def anomaly(self, what: str, text: str, severity: Severity, subject: str | None = None) -> None:
        """Something an operator should know; `subject` where several of its kind may last at the same time."""
        state = self.state
        self._recorder.take(
            Anomaly(
                time=time.time(),
                step=state.step,
                incarnation=state.incarnation,
                what=what,
                text=text,
                severity=severity,
                subject=subject,
            )
        )
