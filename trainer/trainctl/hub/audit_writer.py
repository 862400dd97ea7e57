"""Writing down for the desk: in threads, in turn, and with a word to the operators when the audit log takes nothing."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable

from trainctl.hub.audit_trail import AuditTrail, unwritten
from trainctl.hub.recorder import Recorder
from trainctl.hub.rules import allowed_without_audit
from trainctl.hub.trouble import RETRY_S
from trainctl.store.audit import AuditLog, NotTheWriter
from trainctl.store.audit_entries import accepted_entry, outcome_entry
from trainctl.wire.commands import Command
from trainctl.wire.messages import Anomaly, CommandUpdate, Severity
from trainctl.wire.rundir import RunDir

log = logging.getLogger(__name__)


class AuditWriter:
    """`turn` is held by whoever writes: by the desk around `accept`, by this where it writes in the background."""

    def __init__(self, *, audit: AuditLog, recorder: Recorder, run_dir: RunDir, turn: asyncio.Lock) -> None:
        self._trail = AuditTrail(audit)
        self._recorder = recorder
        self._run_dir = run_dir
        self._turn = turn
        self._failed = False
        self._again = 0.0
        self._writing: set[asyncio.Task[None]] = set()

    async def accept(self, command: Command, actor: str, accepted: float) -> str | None:
        """Write down that a command is accepted, before it is; why it is not to be accepted, or None."""
        anyway = allowed_without_audit(command)
        entry = accepted_entry(command, actor, accepted)
        try:
            await asyncio.to_thread(lambda: self._trail.write(entry, keep=anyway))
        except NotTheWriter:
            return "a newer hub took over"  # nobody hears this: whoever asked asks that one
        except OSError as error:
            why = error.strerror or str(error)
            self._fails(why)
            if anyway:
                return None
            return (
                f"the audit log cannot be written ({why}), so only stop, abort and checkpoint save are carried out: "
                f"make {self._run_dir.path} writable and leave room there"
            )
        self._works()
        return None

    def settle(self, update: CommandUpdate) -> None:
        """Write an outcome down as soon as it is this one's turn and the log takes it."""
        self._in_the_background(lambda: self._trail.write(outcome_entry(update), keep=True))

    def tick(self, now: float) -> None:
        """Try again what the log did not take; `now` is wall clock."""
        if self._trail.waiting and not self._writing and now >= self._again:
            self._again = now + RETRY_S
            self._in_the_background(self._trail.write_late)

    def take_up(self, outcomes: Iterable[CommandUpdate], lines: Iterable[str]) -> None:
        """After a restart of the hub: what the journal has and these lines, all of the log's, have not."""
        self._trail.keep(unwritten(outcomes, lines), "the hub before this one ended first")

    async def close(self) -> None:
        """Wait until everything is in the log, or cannot be."""
        await asyncio.gather(*self._writing)
        if self._trail.waiting:
            await self._write(self._trail.write_late)
            self._trail.give_up()

    def _in_the_background(self, write: Callable[[], None]) -> None:
        writing: Coroutine[None, None, None] = self._write(write)
        task = asyncio.create_task(writing)
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, write: Callable[[], None]) -> None:
        async with self._turn:
            try:
                await asyncio.to_thread(write)
            except NotTheWriter:
                log.warning("a newer hub took over: it finds in the journal what the audit log lacks")
            except OSError as error:
                self._fails(error.strerror or str(error))
            else:
                self._works()

    def _fails(self, why: str) -> None:
        if not self._failed:
            self._tell(
                f"the audit log cannot be written ({why}): commands that change training are refused, stop, abort and "
                f"checkpoint save are not; what happens meanwhile is written down later. Make {self._run_dir.path} "
                "writable and leave room there",
                "error",
            )
        self._failed = True

    def _works(self) -> None:
        if self._failed:
            lost = self._trail.lost
            self._tell(f"the audit log is written again; {lost or 'no'} entries are missing", "good")
        self._failed = False

    def _tell(self, text: str, severity: Severity) -> None:
        state = self._recorder.record.state
        self._recorder.take(
            Anomaly(
                time=time.time(),
                step=state.step,
                incarnation=state.incarnation,
                what="audit",
                text=text,
                severity=severity,
            )
        )
