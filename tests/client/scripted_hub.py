"""A hub for the client's tests: the real server over real sockets, with a script instead of training behind it."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trainctl.store.audit import check_audit
from trainctl.store.record import RunRecord
from trainctl.wire import manifest
from trainctl.wire.cards import remove_card, write_card
from trainctl.wire.checking import check as check_files
from trainctl.wire.commands import Command, args_of, check, spec_of
from trainctl.wire.keys import Authority, source_keys, user_keys
from trainctl.wire.messages import (
    AuditLines,
    AuditRequest,
    Body,
    Card,
    Checkpoints,
    CheckpointsRequest,
    Column,
    CommandQuery,
    CommandReply,
    CommandRequest,
    CommandUpdate,
    Envelope,
    EventsRequest,
    HistoryRequest,
    LrState,
    RankPlace,
    Reply,
    Request,
    Rows,
    RunInfo,
    RunState,
    SnapshotRequest,
    Stream,
    Tunable,
    Tunables,
    TunablesRequest,
    Verified,
    VerifyRequest,
)
from trainctl.wire.paths import runs_dir
from trainctl.wire.rundir import RunDir, write_atomic
from trainctl.wire.server import Caller, Identity, Refusal, Server

CAPABILITIES: dict[str, bool | str] = dict.fromkeys(("pause", "lr", "set", "checkpoint", "rollback", "stop"), True)


def make_info(run_id: str, name: str, **changes: Any) -> RunInfo:
    info = RunInfo(
        run=name,
        id=run_id,
        dir=str(runs_dir() / run_id),
        host=socket.gethostname(),
        created=1.0,
        started=time.time(),
        world_size=2,
        total_steps=100,
        capabilities=CAPABILITIES | {"eval": "no on_eval was given"},
        tunables=[Tunable(name="clip", value=1.0, kind="float", minimum=0.1, maximum=100.0)],
        ranks=[RankPlace(rank=rank, node="node-a", pid=2**30 + rank) for rank in range(2)],
    )
    return msgspec.structs.replace(info, **changes)


def rows(first: int, last: int, incarnation: int = 1, **values: float) -> Rows:
    """Rows `first` to `last`; each metric is its value plus a thousandth of the step."""
    steps = list(range(first, last + 1))
    named = values or {"loss": 3.0, "lr": 1e-3, "lr_scheduled": 1e-3, "step_time_s": 0.5}
    columns = [
        Column(name=name, dtype="f8", data=np.array([value + step / 1000 for step in steps], "<f8").tobytes())
        for name, value in named.items()
    ]
    times = [time.time() + step / 1e6 for step in steps]
    return Rows(attempt=1, incarnation=incarnation, steps=steps, times=times, columns=columns)


def make_checkpoint(info: RunInfo, identity: str, step: int, when: float = 10.0, **metrics: float) -> Path:
    """A small checkpoint that is good by its manifest."""
    directory = RunDir(info.dir).checkpoints / identity
    directory.mkdir(parents=True)
    data = directory / "data.bin"
    data.write_bytes(identity.encode() * 10)
    size, digest = manifest.hash_file(data)
    manifest.write_manifest(
        directory,
        manifest.Manifest(
            id=identity,
            run=info.id,
            step=step,
            incarnation=1,
            attempt=1,
            world_size=2,
            time=when,
            files=[manifest.ManifestFile(name="data.bin", bytes=size, sha256=digest)],
            metrics=metrics,
        ),
    )
    return directory


@dataclass
class Script:
    """How the hub behaves. `answers` gives the states of a command; none means that it says nothing."""

    answers: Callable[[Command], list[tuple[str, dict[str, Any]]]] = lambda _: [("accepted", {}), ("applied", {})]
    commands: list[Command] = field(default_factory=list)
    updates: dict[str, CommandUpdate] = field(default_factory=dict)
    audit: list[str] = field(default_factory=list)


class ScriptedHub:
    """Runs in a thread of its own, so that the program under test may run its own loop."""

    def __init__(self, info: RunInfo, *, epoch: int = 1, script: Script | None = None, record: RunRecord | None = None):
        self.info = info
        self.script = script or Script()
        self.record = record or RunRecord(info)
        self.state = RunState(
            state="running",
            since=time.time(),
            step=self.record.state.step,
            step_time=time.time(),
            total_steps=info.total_steps,
            lr=LrState(scheduled=1e-3, effective=5e-4),
            steps_per_s=2.0,
            tokens_per_s=1000.0,
            phases={"forward": 0.6, "backward": 0.4},
        )
        self.epoch = epoch
        self.journal: list[tuple[Envelope, bytes]] = []
        self._started: Future[None] = Future()
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._server: Server
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self.card: Card

    def start(self) -> "ScriptedHub":
        directory = RunDir(self.info.dir)
        directory.create()
        write_atomic(directory.info_file, msgspec.json.encode(self.info))
        self._thread.start()
        self._started.result(10)
        write_card(self.card)
        return self

    def stop(self, *, card: bool = True) -> None:
        """End it; a killed hub leaves its `card` behind."""
        if card:
            remove_card(self.card)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def publish(self, body: Body) -> None:
        self._call(lambda: self._publish(body))

    def set_state(self, **changes: Any) -> None:
        def change() -> None:
            self.state = msgspec.structs.replace(self.state, **changes)
            self._server.beat()

        self._call(change)

    def _call(self, act: Callable[[], None]) -> None:
        done: Future[None] = Future()

        def run() -> None:
            try:
                act()
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
                done.set_exception(error)
            else:
                done.set_result(None)

        self._loop.call_soon_threadsafe(run)
        done.result(10)

    def _publish(self, body: Body, *, send: bool = True) -> None:
        envelope, encoded = self._server.number(body, attempt=1)
        self.journal.append((envelope, encoded))
        self.record.apply(envelope)
        if isinstance(body, Rows):
            self.state = msgspec.structs.replace(self.state, step=body.steps[-1], step_time=body.times[-1])
        if send:
            self._server.send(envelope, encoded)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._server = Server(
            identity=Identity(kind="hub", source=self.info.id, name=self.info.run, epoch=self.epoch),
            keys=source_keys(),
            authority=Authority(user_keys().public),
            handler=self,
            heads=dict(self.record.heads),
        )
        await self._server.start("127.0.0.1")
        self.card = Card(
            kind="hub",
            source=self.info.id,
            name=self.info.run,
            epoch=self.epoch,
            addresses=[f"tcp://127.0.0.1:{self._server.port}"],
            server_key=source_keys().public,
            host="elsewhere",  # so that nobody concludes anything from a process id
            pid=os.getpid(),
            started=self.info.started,
            dir=self.info.dir,
        )
        serving = asyncio.create_task(self._server.serve())
        self._started.set_result(None)
        await self._stop.wait()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        self._server.close()

    # --- the handler

    def recorded(self, stream: Stream, first: int, last: int) -> list[bytes] | None:
        found = [encoded for envelope, encoded in self.journal if envelope.stream == stream]
        numbers = [envelope.seq for envelope, _ in self.journal if envelope.stream == stream]
        wanted = [encoded for number, encoded in zip(numbers, found, strict=True) if first <= number <= last]
        return wanted if wanted and numbers[0] <= first else None

    def run_state(self) -> RunState:
        return self.state

    async def handle(self, request: Request, caller: Caller) -> Reply | None:
        match request:
            case SnapshotRequest():
                snapshot = self.record.snapshot(msgspec.structs.replace(request, req=caller.req))
                return msgspec.structs.replace(snapshot, state=self.state, heads=dict(self._server.heads))
            case CommandRequest():
                return self._command(request.command, caller)
            case CommandQuery():
                if request.id not in self.script.updates:
                    raise Refusal("not_found", f"no command {request.id}")
                return CommandReply(req=caller.req, update=self.script.updates[request.id])
            case HistoryRequest():
                return self.record.history(request)
            case EventsRequest():
                return self.record.events_page(request)
            case CheckpointsRequest():
                found = manifest.list_checkpoints(RunDir(self.info.dir).checkpoints)
                last = manifest.pick(found, "last")
                return Checkpoints(req=caller.req, checkpoints=found, last=last.id if last else None)
            case VerifyRequest():
                return self._verify(request, caller)
            case TunablesRequest():
                return Tunables(req=caller.req, tunables=self.info.tunables)
            case AuditRequest():
                run_dir = RunDir(self.info.dir)
                checked, problem = check_audit(run_dir.audit_file, manifest.kept_audit_heads(run_dir.checkpoints))
                return AuditLines(req=caller.req, lines=self.script.audit, checked=checked, problem=problem)
            case _:
                raise Refusal("not_found", f"the script has no answer to {type(request).__name__}")

    def _verify(self, request: VerifyRequest, caller: Caller) -> Verified:
        found = check_files(RunDir(self.info.dir).checkpoints / request.id)
        return Verified(req=caller.req, id=request.id, ok=found.ok, text=found.text, readable=found.readable)

    def _command(self, command: Command, caller: Caller) -> Reply | None:
        assert check(command.action) is None
        if command.id in self.script.updates:
            return CommandReply(req=caller.req, update=self.script.updates[command.id])
        self.script.commands.append(command)
        for state, changes in self.script.answers(command):
            update = self.update(command, state, caller.actor.name, **changes)
            self.script.updates[command.id] = update
            self._publish(update)
            self._server.reply(caller, CommandReply(req=caller.req, update=update))
        return None

    def update(self, command: Command, state: str, actor: str = "ann", **changes: Any) -> CommandUpdate:
        update = CommandUpdate(
            time=time.time(),
            step=self.state.step,
            incarnation=1,
            id=command.id,
            command=spec_of(command.action).name,
            args=args_of(command.action),
            actor=actor,
            state=state,
            ranks=2 if state == "applied" else None,
        )
        return msgspec.structs.replace(update, **changes)


@contextmanager
def hub(run_id: str = "run-1", name: str = "gpt", **options: Any) -> Iterator[ScriptedHub]:
    """A hub that runs inside the block and takes its card away afterwards."""
    info_changes = options.pop("info", {})
    running = ScriptedHub(make_info(run_id, name, **info_changes), **options).start()
    try:
        yield running
    finally:
        running.stop()


def write_journal(running: ScriptedHub) -> None:
    """Put what the hub published on disk, as the real one does."""
    from trainctl.store.journal import JournalWriter

    writer = JournalWriter(RunDir(running.info.dir).journal)
    for envelope, encoded in running.journal:
        writer.append(encoded, envelope.stream, envelope.seq)
    writer.sync()
    writer.close()
