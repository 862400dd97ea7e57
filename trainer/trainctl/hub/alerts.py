"""Runs the user's command for events that somebody should know of now (docs/alerts.md).

Follows the recorder, keeps to the settings of `config.toml` as they are at the moment, and never keeps anybody waiting:
alerts wait in a short queue, and the command runs beside the hub's loop, one at a time.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trainctl.hub.alerts_command import run_command
from trainctl.hub.alerts_gate import Gate, HeldBack, Limits
from trainctl.hub.alerts_rules import ALERT_FAILED, SETTINGS, wakes
from trainctl.hub.aside import Aside, StillBusy
from trainctl.wire.events import event_json, event_text, severity_of
from trainctl.wire.figures import duration
from trainctl.wire.jsonable import dumps
from trainctl.wire.messages import Envelope, Event, NodeReading, Ranks, Rows, RunInfo, Severity
from trainctl.wire.settings import AlertSettings, Settings, SettingsError, load_settings, settings_file

log = logging.getLogger(__name__)

LAST_CHANCE_S: Final = 5.0
_LOOK_EVERY_S = 1.0
_PATIENCE_S = 30.0
_WAITING = 20
_LATE_S = 10.0
_EARLIER: frozenset[Severity] = frozenset({"info", "warning", "error"})
_Mark = tuple[int, int, int] | None


@dataclass(frozen=True, kw_only=True)
class _Alert:
    """An event that was let through, with what was held back before it."""

    event: Event
    held: HeldBack
    late_s: float = 0.0  # how long ago the event was, where the alert itself was held back


class Alerts:
    """`info` says who the run is; `tell` records an anomaly about the alerts themselves; `events` are the record's,
    for what was told before this hub began."""

    def __init__(
        self, *, info: Callable[[], RunInfo], tell: Callable[[str, str, Severity], object], events: Iterable[Event] = ()
    ) -> None:
        self._info = info
        self._tell = tell
        self._file = settings_file()
        self._settings: AlertSettings | None = None  # None until the file was read for the first time
        self._look = Aside(lambda: _mark(self._file))
        self._read = Aside(lambda: load_settings(self._file))
        self._mark: _Mark | str = "unread"  # of the file whose settings hold
        self._seen: _Mark | str = "unread"
        self._gate = Gate()
        self._gate.remember(events, time.monotonic(), severities=_EARLIER)
        self._waiting: deque[_Alert] = deque()
        self._early: deque[Event] = deque(maxlen=_WAITING)
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._failing = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to read the settings and to run commands, in tasks of the running loop."""
        self._tasks = [asyncio.create_task(self._watch_settings()), asyncio.create_task(self._work())]

    async def close(self) -> None:
        """Give the alerts that are under way five seconds, and end what still runs then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_CHANCE_S):
                await self._idle.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def follow(self, envelope: Envelope) -> None:
        """Take one recorded envelope; an event that should wake somebody is put in the queue."""
        if isinstance(envelope.body, Rows | Ranks | NodeReading):
            return
        if self._settings is None:
            self._early.append(envelope.body)
        else:
            self._consider(envelope.body, self._settings)

    def tick(self, now: float) -> None:
        """Send what was held back and may go now; `now` is seconds of a monotonic clock."""
        settings = self._settings
        if settings is None or not settings.arguments:
            return
        while len(self._waiting) < _WAITING and (event := self._gate.due(now, _limits(settings))) is not None:
            if wakes(event, settings.severity):
                self._enqueue(_Alert(event=event, held=self._gate.take_held(), late_s=time.time() - event.time))

    def _consider(self, event: Event, settings: AlertSettings) -> None:
        self._gate.note(event)
        if not settings.arguments or not wakes(event, settings.severity):
            return
        room = len(self._waiting) < _WAITING
        if self._gate.admit(event, time.monotonic(), _limits(settings), room=room):
            self._enqueue(_Alert(event=event, held=self._gate.take_held()))

    def _enqueue(self, alert: _Alert) -> None:
        self._waiting.append(alert)
        self._idle.clear()
        self._news.set()

    # --- the command

    async def _work(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                try:
                    await self._send(self._waiting.popleft())
                except Exception:  # the next alert may fare better
                    log.exception("an alert could not be sent")
            self._idle.set()

    async def _send(self, alert: _Alert) -> None:
        settings = self._settings
        if settings is None or not settings.arguments:
            return
        info = self._info()
        problem = await run_command(
            settings.arguments,
            stdin=alert_json(alert.event, info, alert.held, late_s=alert.late_s).encode() + b"\n",
            extra=_environment(alert.event, info),
            directory=self._file.parent,
            timeout_s=settings.timeout_s,
        )
        if problem is None:
            if self._failing:
                self._tell(ALERT_FAILED, "the alert command works again", "good")
            self._failing = False
            return
        log.warning("the alert command failed: %s", problem)
        if not self._failing:
            self._failing = True
            text = (
                f"nobody was told that {event_text(alert.event)}: the alert command {problem}. Further failures are "
                f"only in hub.log until it works; correct [alerts] command in {self._file}"
            )
            self._tell(ALERT_FAILED, text, "warning")

    # --- the settings

    async def _watch_settings(self) -> None:
        while True:
            await self._look_at_settings()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _look_at_settings(self) -> None:
        try:
            mark = await self._look.run(_PATIENCE_S)
            settled = mark == self._seen or self._settings is None
            self._seen = mark
            if mark == self._mark or not settled:  # a file that changed this very second may be half written
                return
            settings = await self._read.run(_PATIENCE_S)
        except (StillBusy, OSError) as error:
            log.warning("%s cannot be looked at, the settings stay as they are: %s", self._file, error)
            return
        except SettingsError as error:
            self._mark = mark
            stay = "there are no alerts until it is corrected" if self._settings is None else "the old settings stay"
            self._tell(SETTINGS, f"{error}; {stay}", "warning")
            self._adopt(self._settings or AlertSettings())
            return
        self._mark = mark
        self._name_unknown(settings)
        if settings.alerts != self._settings:
            self._failing = False
        self._adopt(settings.alerts)

    def _adopt(self, settings: AlertSettings) -> None:
        self._settings = settings
        while self._early:
            self._consider(self._early.popleft(), settings)

    def _name_unknown(self, settings: Settings) -> None:
        for name in settings.unknown:
            if name.startswith("alerts."):
                self._tell(SETTINGS, f"{self._file}: there is no setting {name}; trainctl doctor checks it", "info")


def _limits(settings: AlertSettings) -> Limits:
    return Limits(per_hour=settings.per_hour, repeat_s=settings.repeat_s)


def alert_json(event: Event, info: RunInfo, held: HeldBack, *, late_s: float = 0.0) -> str:
    """What the command reads: the line that `trainctl log --json` prints of the event, with the run and a sentence."""
    return dumps(
        event_json(event)
        | {
            "severity": severity_of(event),
            "run": info.run,
            "id": info.id,
            "host": info.host,
            "dir": info.dir,
            "summary": _summary(event, info, held, late_s),
            "held_back": {"repeated": held.repeated, "over_rate": held.over_rate},
        }
    )


def _summary(event: Event, info: RunInfo, held: HeldBack, late_s: float) -> str:
    ago = f", {duration(late_s)} ago" if late_s >= _LATE_S else ""
    return f"{info.run} on {info.host}: {event_text(event)}{ago}{held.words()}"


def _environment(event: Event, info: RunInfo) -> dict[str, str]:
    return {
        "TRAINCTL_RUN": info.id,
        "TRAINCTL_RUN_ID": info.id,
        "TRAINCTL_RUN_NAME": info.run,
        "TRAINCTL_RUN_DIR": info.dir,
        "TRAINCTL_ALERT_SEVERITY": severity_of(event),
    }


def _mark(file: Path) -> _Mark:
    """Changes whenever the file does; None where there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
