"""The hub as a whole: its parts put together, its clock, its beginning and its end."""

import asyncio
import logging
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from trainctl.hub.agents import AgentRelay
from trainctl.hub.alerts import Alerts
from trainctl.hub.announce import new_card, open_doors
from trainctl.hub.aside import Aside, StillBusy
from trainctl.hub.attendance import Attendance
from trainctl.hub.board import RunBoard
from trainctl.hub.desk import CommandDesk
from trainctl.hub.detect import Detectors
from trainctl.hub.detect_lookout import DiskLookout
from trainctl.hub.disk import Disk
from trainctl.hub.endings import Endings
from trainctl.hub.health import Health
from trainctl.hub.link import LinkListener, RankLine
from trainctl.hub.ownership import Ownership
from trainctl.hub.packing import JournalPacking
from trainctl.hub.patient_keeper import PatientKeeper
from trainctl.hub.recorder import Recorder
from trainctl.hub.requests import Requests
from trainctl.hub.roll_call import RollCall
from trainctl.hub.sinks.crew import Sinks
from trainctl.hub.starts_again import StartsAgain
from trainctl.hub.trouble import DiskTrouble
from trainctl.store.audit import AuditLog
from trainctl.store.journal import JournalIndex
from trainctl.store.record import RunRecord
from trainctl.store.replay import NoRecord, read_info, replay_journal
from trainctl.wire.cards import remove_card
from trainctl.wire.keys import Authority, source_keys, user_keys
from trainctl.wire.messages import Reply, Request, RunInfo, RunState, Stream
from trainctl.wire.rundir import RunDir
from trainctl.wire.server import Caller, Identity, Server

log = logging.getLogger(__name__)

_TICK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a hub is started."""

    run_dir: Path
    run_id: str
    name: str
    linger_s: float = 60.0


class Hub:
    """One run's hub: make it, then `run` it. It leaves when the run ended or a newer hub took over.

    Making it reads the journal and takes an epoch. Needs a running event loop; raises `UnsafePath` for bad keys.
    """

    def __init__(self, options: Options, listener: LinkListener) -> None:
        self._options = options
        self._listener = listener
        run_dir = RunDir(options.run_dir)
        try:
            run_dir.create()
        except OSError as error:
            log.warning("the run's directory cannot be written, history stays in memory: %s", error)
        self._disk = disk = Disk()
        self._ownership = Ownership(run_dir, disk)
        index = JournalIndex(run_dir.journal)
        self._record = _load(options, run_dir, index)
        self._keeper = PatientKeeper(run_dir.journal, index, disk, asyncio.get_running_loop().call_soon)
        self._card = new_card(
            run_id=options.run_id, name=options.name, epoch=self._ownership.epoch, directory=str(run_dir.path)
        )
        self._server = Server(
            identity=Identity(kind="hub", source=options.run_id, name=options.name, epoch=self._ownership.epoch),
            keys=source_keys(),
            authority=Authority(user_keys().public),
            handler=self,
            heads=self._record.heads,
        )
        recorder = Recorder(record=self._record, keeper=self._keeper, server=self._server, ownership=self._ownership)
        self._packing = JournalPacking(record=self._record, keeper=self._keeper, ownership=self._ownership)
        recorder.follow(Detectors(recorder).follow)
        audit = AuditLog(run_dir.audit_file, self._ownership.held_now)
        self._line = RankLine()
        self._agents = AgentRelay(keys=user_keys(), take=recorder.take, state=self.run_state)
        board = RunBoard(recorder=recorder, server=self._server, run_dir=run_dir, ownership=self._ownership, disk=disk)
        starts_again = StartsAgain(run_dir.path, disk)
        endings = Endings(board=board, agents=self._agents, run_dir=run_dir, starts_again=starts_again, disk=disk)
        self._desk = CommandDesk(
            recorder=recorder, server=self._server, audit=audit, run_dir=run_dir, line=self._line, endings=endings
        )
        self._requests = Requests(
            recorder=recorder, keeper=self._keeper, audit=audit, run_dir=run_dir, desk=self._desk, server=self._server
        )
        self._trouble = DiskTrouble(
            board=board, keeper=self._keeper, ownership=self._ownership, run_dir=run_dir, disk=disk
        )
        self._sinks = Sinks(recorder=recorder, keeper=self._keeper, directory=run_dir.path, anomaly=board.anomaly)
        health = Health(self._line, self._record.events)
        recorder.follow(health.follow)
        self._lookout = DiskLookout(run_dir=run_dir, events=self._record.events, tell=board.anomaly)
        recorder.follow(self._lookout.follow)
        self._alerts = Alerts(info=lambda: self._record.info, tell=board.anomaly, events=self._record.events)
        recorder.follow(self._alerts.follow)
        roll_call = RollCall(recorder=recorder, board=board, endings=endings)
        recorder.follow(roll_call.follow)
        self._attendance = Attendance(
            run_id=options.run_id,
            directory=run_dir.path,
            line=self._line,
            recorder=recorder,
            keeper=self._keeper,
            ownership=self._ownership,
            board=board,
            desk=self._desk,
            agents=self._agents,
            endings=endings,
            starts_again=starts_again,
            roll_call=roll_call,
            health=health,
        )
        self._leave = asyncio.Event()

    async def run(self) -> None:
        """Serve until it is time to leave. Raises what makes serving impossible."""
        try:
            self._card = await open_doors(self._server, self._card, self._options.run_dir)
            self._alerts.start()
            self._desk.restore()
            self._trouble.tell_damage(self._record.damage)
            self._trouble.tick(time.monotonic())
            await self._serve()
        finally:
            await self._end()

    def stop(self, why: str) -> None:
        """Leave, unless rank 0 is linked: it needs a hub until it says goodbye."""
        if self._line.linked and self._ownership.held():
            log.info("%s is ignored: rank 0 is linked", why)
            return
        log.info("%s: leaving", why)
        self._leave.set()

    @property
    def sinks_left_behind(self) -> bool:
        """Whether a sink still hangs in its library after `run` is over."""
        return self._sinks.left_behind

    # --- the server's handler

    async def handle(self, request: Request, caller: Caller) -> Reply | None:
        return await self._requests.handle(request, caller)

    def recorded(self, stream: Stream, first: int, last: int) -> list[bytes] | None:
        return self._requests.recorded(stream, first, last)

    def run_state(self) -> RunState:
        return self._record.state

    # --- while it lives

    async def _serve(self) -> None:
        tasks = [
            asyncio.create_task(work)
            for work in (
                self._server.serve(),
                self._attendance.serve(self._listener),
                self._tick_for_ever(),
                self._sync_for_ever(),
                self._packing.run(),
                self._lookout.run(),
                self._leave_wait(),
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _leave_wait(self) -> None:
        await self._leave.wait()

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            if not self._ownership.held():
                log.warning("a newer hub took over: leaving")
                self._leave.set()
                return
            self._keeper.settle()
            now = time.monotonic()
            self._attendance.tick(time.time(), now)
            self._desk.tick(time.time())
            self._trouble.tick(now)
            self._sinks.tick(now)
            self._alerts.tick(now)
            patience_s = self._options.linger_s
            if self._attendance.awaits_attempt:
                patience_s = max(patience_s, self._attendance.patience_s)
            if not self._line.linked and now - self._attendance.idle_since > patience_s:
                self.stop(f"nothing was linked for {patience_s:.0f} s")

    async def _sync_for_ever(self) -> None:
        syncing = Aside(self._keeper.sync)
        while True:
            await asyncio.sleep(_TICK_S)
            taken = list(self._attendance.left.taken) if self._keeper.safe_to_index else []
            if await _at_last(syncing):
                self._attendance.acknowledge(self._keeper.synced_link, self._line.attempt)
                if taken and self._ownership.held():
                    self._attendance.left.forget(taken, self._disk)

    async def _end(self) -> None:
        await self._alerts.close()
        await self._sinks.close(drain=self._ownership.held())
        await self._agents.close()
        await self._desk.close()
        self._listener.close()
        if not self._ownership.held():
            self._keeper.give_up()
        self._keeper.close()
        self._server.close()
        remove_card(self._card)
        await self._packing.finish()


async def _at_last(syncing: Aside[bool]) -> bool:
    """The outcome of one sync, however long the disk hangs: what was written meanwhile is the next one's."""
    while True:
        try:
            return await syncing.run(_TICK_S)
        except StillBusy:
            continue


def _load(options: Options, run_dir: RunDir, index: JournalIndex) -> RunRecord:
    now = time.time()
    try:
        info = read_info(run_dir.path)
    except NoRecord:
        info = RunInfo(
            run=options.name,
            id=options.run_id,
            dir=str(run_dir.path),
            host=socket.gethostname(),
            created=now,
            world_size=0,
            started=now,
            attempt=0,
        )
    record = RunRecord(info)
    try:
        replay_journal(record, index, run_dir.journal)
    except OSError as error:
        log.error("the journal cannot be read, history begins anew: %s", error)
    return record
