"""One thread for one sink: feed it, refill what it missed, flush, and when it fails leave it alone for a while."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from trainctl.hub.sinks.access import Access, HubGone
from trainctl.hub.sinks.feed import Feed
from trainctl.hub.sinks.memory import Progress, confirmed, read_progress, write_progress
from trainctl.hub.sinks.sink import Branching, Sink, Start, Unusable
from trainctl.hub.sinks.trouble import Trouble
from trainctl.wire.messages import Envelope, Rows, RunState, Severity

log = logging.getLogger(__name__)

_FLUSH_S = 1.0
_LONGEST_REST_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker works on."""

    name: str
    history: bool  # whether the sink wants every value, or only the newest
    make: Callable[[], Sink]
    access: Access
    directory: Path  # the run's
    tell: Callable[[str, str, Severity], None]  # the anomaly's subject, its text; from any thread
    state: Callable[[], RunState]


class Worker:
    """`offer` from the hub's loop; everything else happens in the thread."""

    def __init__(self, job: Job, *, head: int) -> None:
        self.name, self.history = job.name, job.history
        self.busy_since: float | None = None
        self.in_trouble = False
        self.off = False  # for good: trying again would not help
        self._job = job
        self._feed = Feed()
        self._trouble = Trouble()
        self._head, self._head_epoch = head, 0
        self._confirmed = False
        self._drain = True
        self._file = job.directory / "sinks" / f"{job.name}.json"
        self._progress = Progress()
        self._flushed = Progress()
        self._flush_at = 0.0
        self._thread = threading.Thread(target=self._run, name=f"sink-{job.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, envelope: Envelope) -> None:
        """Never waits; what the feed has no room for is read from the journal later."""
        self._feed.offer(envelope)
        if envelope.stream == "metrics":
            self._head_epoch = envelope.epoch
            self._head = envelope.seq  # last: what is in the feed need not be read from the journal

    def end(self, *, drain: bool) -> None:
        """Nothing more comes. With `drain` what is still to be written is written first."""
        self._drain = drain
        self._feed.end()

    def join(self, timeout_s: float) -> bool:
        """Whether it ended in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def overflowed(self) -> int:
        return self._feed.overflowed

    @property
    def behind(self) -> int:
        """Messages that are recorded and not yet flushed to the sink."""
        return max(0, self._head - self._flushed.seq)

    # --- the thread

    def _run(self) -> None:
        self._flushed = self._progress = read_progress(self._file)
        while True:
            try:
                self._confirm()
                self._one_life()
            except HubGone:
                return
            except (Unusable, ImportError) as error:
                self.off = True
                self._feed.end()
                self._feed.clear()
                text = f"sink {self.name} is off: {error}; training and everything else go on"
                self._job.tell(f"{self.name} off", text, "warning")
                return
            except Exception as error:  # noqa: BLE001 - other people's libraries raise what they like
                delay_s = self._failed(error)
                self._feed.rest(delay_s)
            else:
                return
            finally:
                self.busy_since = None
            if self._feed.ended:
                log.warning("sink %s: %d messages were not written", self.name, self.behind)
                return

    def _confirm(self) -> None:
        """Once: go back to where the journal ended when its numbers began to mean something else than was written."""
        if self._confirmed or not self.history:
            return
        before = self._progress
        found = confirmed(before, *self._job.access.epochs())
        if found.seq < before.seq:
            write_progress(self._file, found)
        self._flushed = self._progress = found
        self._confirmed = True
        if found.seq < before.seq:
            text = (
                f"sink {self.name} had more than the journal, which lost its end or was deleted meanwhile: it gets all "
                "that is recorded from there on"
            )
            self._job.tell(f"{self.name} was further", text, "info")

    def _one_life(self) -> None:
        """Open, serve until the hub leaves, close."""
        sink = self._job.make()
        try:
            self.busy_since = time.monotonic()
            self._open(sink)
            self._serve(sink)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                sink.close(self._job.state())
            raise
        sink.close(self._job.state())

    def _open(self, sink: Sink) -> None:
        start = Start(
            picture=self._job.access.picture(),
            directory=self._job.directory,
            notes=dict(self._flushed.notes),
            # Of what a sink says of itself it does not say that it is over.
            tell=lambda text: self._job.tell(f"{self.name} says", f"sink {self.name} {text}", "warning"),
        )
        notes = sink.open(start)
        before = self._flushed
        self._progress = msgspec.structs.replace(before, notes=notes)
        self._flushed = self._progress  # a sink that fails from here on is opened again with these notes
        if self.history and notes != before.notes:
            write_progress(self._file, self._progress)
        if self.history and before.incarnation:
            sink.branch(Branching(from_step=before.step + 1, time=time.time()))
        self._flush(sink)

    def _serve(self, sink: Sink) -> None:
        while True:
            ended = self._feed.ended
            if ended and not self._drain:
                return
            self.busy_since = None
            envelope = self._feed.take(0 if self._missing() else _FLUSH_S / 2)
            began = self.busy_since = time.monotonic()
            if envelope is not None:
                self._take(sink, envelope)
            elif self._missing():
                self._refill(sink, self._head)
            if began >= self._flush_at or (ended and envelope is None):
                self._flush(sink)
            if ended and envelope is None and not self._missing():
                return
            # The interpreter runs one thread at a time: leave the hub as much of it as was taken.
            self._feed.rest(min(time.monotonic() - began, _LONGEST_REST_S))

    def _missing(self) -> bool:
        return self.history and self._head > self._progress.seq

    def _take(self, sink: Sink, envelope: Envelope) -> None:
        if not self.history or not isinstance(envelope.body, Rows):
            sink.write(envelope.body)
            return
        if envelope.seq > self._progress.seq + 1:
            self._refill(sink, envelope.seq - 1)
        if envelope.seq > self._progress.seq:
            self._write(sink, envelope.body, envelope.seq)

    def _refill(self, sink: Sink, last: int) -> None:
        """Write what was recorded and not offered, up to `last`, from the journal."""
        while self._progress.seq < last and not (self._feed.ended and not self._drain):
            began = time.monotonic()
            self.busy_since = began
            found = self._job.access.missed(self._progress.seq + 1, last)
            if not found or found[0].seq != self._progress.seq + 1:
                self._recall(sink, last)
                return
            for envelope in found:
                if isinstance(envelope.body, Rows) and envelope.seq > self._progress.seq:
                    self._write(sink, envelope.body, envelope.seq)
            if began >= self._flush_at:
                self._flush(sink)
            self._feed.rest(min(time.monotonic() - began, _LONGEST_REST_S))

    def _recall(self, sink: Sink, last: int) -> None:
        """The journal does not have it (it could not be written, or was packed): take it from the hub's memory."""
        since, after_step = self._progress.incarnation, self._progress.step
        for incarnation in self._job.access.incarnations():
            if incarnation < since:
                continue
            # From the last step on and not after it: more may have been logged at that step.
            for rows in self._job.access.remembered(incarnation, after_step if incarnation == since else 0):
                if self._feed.ended and not self._drain:
                    return
                began = self.busy_since = time.monotonic()
                self._write(sink, rows, self._progress.seq)
                self._feed.rest(min(time.monotonic() - began, _LONGEST_REST_S))
        self._advance(last, self._progress.incarnation, self._progress.step)

    def _write(self, sink: Sink, rows: Rows, seq: int) -> None:
        before = self._progress
        if rows.incarnation > before.incarnation and rows.steps:
            sink.branch(self._job.access.branching(before.incarnation, rows.incarnation, rows.times[0]))
        sink.write(rows)
        newest = max(rows.steps, default=0)
        step = max(before.step, newest) if rows.incarnation == before.incarnation else newest
        self._advance(seq, max(before.incarnation, rows.incarnation), step)

    def _advance(self, seq: int, incarnation: int, step: int) -> None:
        # Whatever was taken is the history as this hub knows it.
        epoch = max(self._progress.epoch, self._head_epoch)
        self._progress = Progress(epoch=epoch, seq=seq, incarnation=incarnation, step=step, notes=self._progress.notes)

    def _flush(self, sink: Sink) -> None:
        sink.flush()
        if self.history and self._progress != self._flushed:
            write_progress(self._file, self._progress)
        self._flushed = self._progress
        now = time.monotonic()
        self._flush_at = now + _FLUSH_S
        if self._trouble.worked(now):
            self.in_trouble = False
            self._job.tell(self.name, f"sink {self.name} works again, and has what it missed", "good")

    def _failed(self, error: Exception) -> float:
        """Begin again at what was flushed, later; return when."""
        log.warning("sink %s failed", self.name, exc_info=error)
        delay_s, begins = self._trouble.failed()
        self.in_trouble = True
        self._progress = self._flushed
        self._feed.clear()
        if begins and not self._feed.ended:
            self._job.tell(
                self.name,
                f"sink {self.name} failed ({type(error).__name__}: {_brief(error)}): its copy of the history stands "
                f"still, training and everything else go on. It is tried again, at first after {delay_s:.0f} s, then "
                "less and less often, and gets what it missed",
                "warning",
            )
        return delay_s


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"
