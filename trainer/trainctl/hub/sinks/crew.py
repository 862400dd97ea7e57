"""The sinks of one run: switched on as soon as the run is known, fed, watched, and ended in time."""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.recorder import Recorder
from trainctl.hub.sinks.access import Access
from trainctl.hub.sinks.known import Wanted, wanted
from trainctl.hub.sinks.worker import Job, Worker
from trainctl.wire.messages import Envelope, Severity
from trainctl.wire.settings import Settings, SettingsError, load_settings

log = logging.getLogger(__name__)

LEAVE_S = 10.0
_HANGS_S = 60.0
_TELL_AGAIN_S = 600.0


class Sinks:
    """All methods are called on the hub's loop; none of them waits, but `close`."""

    def __init__(
        self,
        *,
        recorder: Recorder,
        keeper: JournalKeeper,
        directory: Path,
        anomaly: Callable[[str, str, Severity, str | None], None],
    ) -> None:
        self._recorder = recorder
        self._record = recorder.record
        self._directory = directory
        self._anomaly = anomaly
        self._access = Access(recorder=recorder, keeper=keeper)
        self._loop = asyncio.get_running_loop()
        self._workers: dict[str, Worker] = {}
        self._feeds: dict[str, list[Worker]] = {}
        self._seen: tuple[str, ...] | None = None
        self._told: set[str] = set()
        self._told_at: dict[tuple[str, str], float] = {}
        self._hanging: set[str] = set()
        self._overflowed: dict[str, int] = {}
        self.left_behind = False
        recorder.follow(self._offer)

    def tick(self, now: float) -> None:
        """Start what is newly wanted, and look after those at work. `now` is monotonic."""
        if self._record.info.attempt > 0 and self._seen != (asked := tuple(self._record.info.sinks)):
            self._seen = asked
            self._switch_on(asked)
        for worker in self._workers.values():
            if not worker.off:
                self._look_after(worker, now)

    async def close(self, *, drain: bool) -> None:
        """End all: with `drain`, what is still to be written is, as far as that is done within ten seconds."""
        for worker in self._workers.values():
            worker.end(drain=drain)
        deadline = time.monotonic() + LEAVE_S
        for worker in self._workers.values():
            if not await asyncio.to_thread(worker.join, max(0.0, deadline - time.monotonic())):
                self.left_behind = True
                log.warning("sink %s did not end in time: %d messages are not written", worker.name, worker.behind)

    # --- at work

    def _offer(self, envelope: Envelope) -> None:
        for worker in self._feeds.get(envelope.stream, ()):
            worker.offer(envelope)

    def _switch_on(self, asked: tuple[str, ...]) -> None:
        try:
            settings = load_settings()
        except SettingsError as error:
            settings = Settings()
            self._tell_once(f"{error}: the sinks in it are off")
        found, problems = wanted(settings.sinks, asked)
        for problem in problems:
            self._tell_once(problem)
        for one in found:
            if one.name not in self._workers:
                self._start(one)

    def _start(self, one: Wanted) -> None:
        job = Job(
            name=one.name,
            history=one.kind.history,
            make=one.make,
            access=self._access,
            directory=self._directory,
            tell=self._tell_from_thread,
            state=lambda: self._record.state,
        )
        worker = self._workers[one.name] = Worker(job, head=self._record.heads["metrics"])
        for stream in one.kind.streams:
            self._feeds.setdefault(stream, []).append(worker)
        worker.start()
        log.info("sink %s is on", one.name)

    def _look_after(self, worker: Worker, now: float) -> None:
        since = worker.busy_since
        if since is not None and now - since > _HANGS_S and worker.name not in self._hanging:
            self._hanging.add(worker.name)
            self._tell_rarely(
                f"sink {worker.name} has not answered for {_HANGS_S:.0f} s: its copy stands still, training and "
                "everything else go on; it gets what it missed when it answers again",
                ("hangs", worker.name),
                now,
            )
        elif since is None or now - since <= _HANGS_S:
            self._hanging.discard(worker.name)
        overflowed = worker.overflowed
        if worker.history and overflowed > self._overflowed.get(worker.name, 0) and not worker.in_trouble:
            self._tell_rarely(
                f"sink {worker.name} is slower than the run and {worker.behind} messages behind: it is written from "
                "the journal",
                ("behind", worker.name),
                now,
            )
        self._overflowed[worker.name] = overflowed

    # --- telling

    def _tell_from_thread(self, subject: str, text: str, severity: Severity) -> None:
        try:
            self._loop.call_soon_threadsafe(partial(self._anomaly, "sink", text, severity, subject))
        except RuntimeError:
            log.warning("%s", text)  # the hub has left

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._anomaly("sink", text, "warning", None)

    def _tell_rarely(self, text: str, key: tuple[str, str], now: float) -> None:
        if now - self._told_at.get(key, -_TELL_AGAIN_S) >= _TELL_AGAIN_S:
            self._told_at[key] = now
            what, name = key
            self._anomaly("sink", text, "warning", f"{name} {what}")
