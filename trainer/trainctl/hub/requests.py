"""What the hub answers to clients."""

import asyncio
import contextlib
import logging
import time

from trainctl.hub.aside import Aside, StillBusy
from trainctl.hub.desk import CommandDesk
from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.recorder import Recorder
from trainctl.hub.snapshots import fitting
from trainctl.hub.verifying import check
from trainctl.store.audit import AuditLog, check_audit
from trainctl.store.history import history_steps
from trainctl.store.older_events import OlderEvents
from trainctl.wire.codec import DATA_LIMIT
from trainctl.wire.held_states import list_with_memory
from trainctl.wire.manifest import kept_audit_heads, pick
from trainctl.wire.messages import (
    AuditLines,
    AuditRequest,
    CheckpointInfo,
    Checkpoints,
    CheckpointSaved,
    CheckpointsRequest,
    CommandQuery,
    CommandReply,
    CommandRequest,
    Events,
    EventsRequest,
    History,
    HistoryRequest,
    Nodes,
    NodesRequest,
    Reply,
    Request,
    RunState,
    SnapshotRequest,
    Stream,
    Tunables,
    TunablesRequest,
    Verified,
    Verifying,
    VerifyRequest,
)
from trainctl.wire.rundir import RunDir
from trainctl.wire.server import Caller, Refusal, Server

log = logging.getLogger(__name__)

_TURN_S = 0.02
_LISTING_S = 5.0
_OLDER_S = 0.5
_AUDIT_BYTES = DATA_LIMIT - 64 * 1024


class Requests:
    """The server's handler: looks things up in the record and in the run's directory."""

    def __init__(
        self,
        *,
        recorder: Recorder,
        keeper: JournalKeeper,
        audit: AuditLog,
        run_dir: RunDir,
        desk: CommandDesk,
        server: Server,
    ) -> None:
        self._recorder = recorder
        self._record = recorder.record
        self._keeper = keeper
        self._audit = audit
        self._run_dir = run_dir
        self._desk = desk
        self._server = server
        self._listed: list[CheckpointInfo] = []
        self._older = OlderEvents(run_dir.journal)
        self._one_older = asyncio.Lock()  # many who ask cost one thread

    def run_state(self) -> RunState:
        return self._record.state

    def recorded(self, stream: Stream, first: int, last: int) -> list[bytes] | None:
        if self._keeper.hangs:
            return None  # a snapshot has what is new, and everybody else shall not wait
        self._keeper.settle()
        try:
            return self._keeper.index.read(stream, first, last) or None
        except OSError as error:
            log.warning("the journal cannot be read for a backfill: %s", error)
            return None

    async def handle(self, request: Request, caller: Caller) -> Reply | None:
        match request:
            case SnapshotRequest():
                checkpoints = await self._checkpoints()
                return fitting(self._record.snapshot(request, checkpoints))
            case CommandRequest(command=command):
                await self._desk.do(command, caller)
                return None
            case CommandQuery(id=command_id):
                update = self._desk.watch(command_id, caller)
                if update is None:
                    raise Refusal("unknown_command", f"no command has the id {command_id}")
                return CommandReply(req=request.req, update=update)
            case HistoryRequest():
                return await self._history(request)
            case EventsRequest():
                return await self._events(request)
            case CheckpointsRequest():
                return await self._list(request)
            case VerifyRequest():
                return await self._verify(request, caller)
            case TunablesRequest():
                return Tunables(req=request.req, tunables=self._record.info.tunables)
            case AuditRequest():
                return await self._audit_lines(request)
            case NodesRequest():
                return Nodes(req=request.req, nodes=[self._record.nodes[name] for name in sorted(self._record.nodes)])
            case _:
                raise Refusal("not_supported", f"a hub does not answer {type(request).__name__}")

    async def _history(self, request: HistoryRequest) -> History:
        """In turns with everybody else, for a request may name thousands of metrics."""
        if self._keeper.hangs and self._keeper.index.gone:
            raise Refusal(
                "disk_hangs",
                "the file system of the run's directory does not answer, so the history in it cannot be read now",
                "training goes on, and so does what is published; ask again when the disk answers",
            )
        steps = history_steps(self._record.metrics, request)
        turn_ends = time.monotonic() + _TURN_S
        while True:
            try:
                next(steps)
            except StopIteration as done:
                answer: History = done.value
                return answer
            if time.monotonic() > turn_ends:
                await asyncio.sleep(0)
                turn_ends = time.monotonic() + _TURN_S

    async def _events(self, request: EventsRequest) -> Events:
        """From memory, and what is too old for that from the journal's files."""
        record = self._record
        if not record.wants_older(request):
            return record.events_page(request)
        first, forgotten = record.oldest_event, record.events_forgotten
        reading = Aside(lambda: self._older.page(request, first, forgotten, within_s=_OLDER_S))
        try:
            async with self._one_older:
                if not self._keeper.hangs:
                    return await reading.run(_LISTING_S)
        except StillBusy:
            pass
        except OSError as error:
            raise Refusal("journal_unreadable", f"older events cannot be read: {error.strerror}") from None
        raise Refusal(
            "disk_hangs",
            "the file system of the run's directory does not answer, so older events cannot be read from it now",
            "training goes on, and so does what is published; ask again when the disk answers",
        )

    async def _checkpoints(self) -> list[CheckpointInfo]:
        """What there is; what there was when the disk last answered, while it hangs."""
        if not self._keeper.hangs:
            listing = Aside(lambda: list_with_memory(self._run_dir.checkpoints, self._record.in_memory))
            with contextlib.suppress(StillBusy):
                self._listed = await listing.run(_LISTING_S)
        return self._listed

    async def _list(self, request: CheckpointsRequest) -> Checkpoints:
        found = await self._checkpoints()
        last, best = pick(found, "last"), pick(found, "best", self._record.info.best_by)
        return Checkpoints(
            req=request.req, checkpoints=found, last=last.id if last else None, best=best.id if best else None
        )

    async def _verify(self, request: VerifyRequest, caller: Caller) -> Verified:
        found = pick(await self._checkpoints(), request.id, self._record.info.best_by)
        if found is None:
            raise Refusal(
                "no_checkpoint", f"there is no checkpoint {request.id}", "trainctl checkpoint ls lists what there is"
            )
        if found.where == "memory":
            raise Refusal("no_checkpoint", f"{found.id} is in memory only: there are no files to hash")
        checkpoint_id, total = found.id, found.bytes

        def tell(done: int) -> None:
            message = Verifying(req=caller.req, id=checkpoint_id, done_bytes=done, total_bytes=total)
            self._server.reply(caller, message)

        verdict = await check(self._run_dir.checkpoints / found.id, tell if request.progress else None)
        self._recorder.take(
            CheckpointSaved(
                time=time.time(),
                step=found.step,
                incarnation=found.incarnation,
                id=found.id,
                bytes=found.bytes,
                verified=verdict.ok if verdict.readable else None,
                pinned=found.pinned,
                note=found.note,
                metrics=found.metrics,
                error=None if verdict.ok else verdict.text,
            )
        )
        return Verified(req=request.req, id=found.id, ok=verdict.ok, text=verdict.text, readable=verdict.readable)

    async def _audit_lines(self, request: AuditRequest) -> AuditLines:
        try:
            lines = await asyncio.to_thread(self._audit.lines, request.limit)
            checked, problem = await asyncio.to_thread(self._check_audit) if request.verify else (None, None)
        except OSError as error:
            raise Refusal("audit_unreadable", f"the audit log cannot be read: {error.strerror}") from None
        size, first = 0, len(lines)
        while first and size + len(lines[first - 1]) < _AUDIT_BYTES:
            first -= 1
            size += len(lines[first]) + 8
        return AuditLines(req=request.req, lines=lines[first:], checked=checked, problem=problem)

    def _check_audit(self) -> tuple[int, str | None]:
        # Here, where the whole log lies: whoever asks may see neither the directory nor more than a reply holds.
        head = self._audit.head  # read first: what is written meanwhile comes behind it
        return check_audit(self._audit.path, kept_audit_heads(self._run_dir.checkpoints), head)
