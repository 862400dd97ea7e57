"""The sender thread: everything that leaves a rank leaves here, ten times a second, and nothing in here may block.

On rank 0 it drains what was logged, numbers it, writes it to the hub and hands the hub's commands to the leader. On
every rank it hands the rank's figures to the exchange once a second and looks after the node's agent.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from trainctl.trainer.agents import NodeAgent
from trainctl.trainer.buffer import Entry, Rewind, StepMark
from trainctl.trainer.core import Core
from trainctl.trainer.device import let_captures_be
from trainctl.trainer.drops import DropWatch
from trainctl.trainer.exchange import Exchange
from trainctl.trainer.figures import Pace, lost_here, run_state
from trainctl.trainer.leader import Leader
from trainctl.trainer.leaving import leave_behind
from trainctl.trainer.link import Link, wait_readable
from trainctl.trainer.patience import LIMIT_S, SILENT_S, Patience
from trainctl.trainer.preemption import Preemption
from trainctl.trainer.pruning import Pruner
from trainctl.trainer.rank_ranges import RANKS_TOLD
from trainctl.trainer.reach import Reach
from trainctl.trainer.rows import RowMaker
from trainctl.trainer.saved import Saved
from trainctl.trainer.steering_file import SteeringFile
from trainctl.trainer.tally import Tally, clip_of
from trainctl.wire.commands import Command, Resume
from trainctl.wire.messages import (
    Event,
    LinkAgents,
    LinkBye,
    LinkCancel,
    LinkCommand,
    LinkInfo,
    LinkProgress,
    LinkTrouble,
    Ranks,
    Rows,
    RunInfo,
    RunState,
    SourceAddress,
)
from trainctl.wire.own_ids import AUTO_RESUME

log = logging.getLogger(__name__)

TICK_S = 0.1
_FIGURES_S = 1.0
_STATE_S = 0.5
_RESUME_AGAIN_S = 5.0
_BATCH = 20_000
_RANKS_A_RECORD = 200  # nearly always fits a packet of the link, which cuts what does not
_LEAVE_S = 5.0  # for the exchange between the ranks and the deletions, before and beside that
_NO_STEP_S = 30.0
_DELETED_S = 2.0
_KEPT_S = 2.0


class Sender(threading.Thread):
    """`finish` ends it: it sends what is left, says goodbye and waits a moment for the hub to have it on disk."""

    def __init__(
        self,
        core: Core,
        *,
        exchange: Exchange,
        reach: Reach,
        agent: NodeAgent | None,
        link: Link | None,
        leader: Leader | None,
        info: Callable[[], RunInfo],
        preemption: Preemption | None = None,
    ) -> None:
        super().__init__(name="trainctl-sender", daemon=True)
        self._core = core
        self._exchange = exchange
        self._reach = reach
        self._agent = agent
        self._link = link
        self._leader = leader
        self._info = info
        self._pruner = Pruner(core, core.retention) if core.place.leads and core.retention is not None else None
        self._preemption = preemption
        self._steering = SteeringFile(core)
        self._saved: deque[Saved] = deque()
        self._rows = RowMaker(
            attempt=core.identity.attempt, incarnation=core.incarnation, completed=core.boundary.completed
        )
        self._pace = Pace()
        self._tally = Tally()
        self._drop_watch = DropWatch()
        self._phases_s: dict[str, float] = {}
        self._next_figures = 0.0
        self._next_state = 0.0
        self._told_agents: list[SourceAddress] = []
        self._told_connects = 0
        self._state_since = (core.state(), time.time())
        self._step_time = time.time()
        self._bye: LinkBye | None = None
        self._closing = threading.Event()
        self._warned_no_step = False
        self._failed = False

    def finish(self, bye: LinkBye) -> None:
        """Send what is left and end. Training's exit goes first: this waits for 3 s of a hub's silence, for 3 s in
        which a device brings none of the values that were logged, and 10 s in all where the hub is only starting or
        still takes what is left."""
        self._bye = bye
        self._closing.set()
        self.join(LIMIT_S + _LEAVE_S)

    def abandon(self) -> None:
        """In a forked child: let go of the link, which belongs to the parent."""
        if self._link is not None:
            self._link.close()

    def run(self) -> None:
        try:
            let_captures_be()
            self._exchange.start()
            while not self._closing.is_set():
                self._safe_tick()
                if self._link is not None:
                    wait_readable(self._link, TICK_S)
                else:
                    self._closing.wait(TICK_S)
            self._exchange.close(self._phases_s)
            self._tell_everybody(time.monotonic())
            self._goodbye()
        except Exception:
            log.exception("trainctl: telemetry stopped, training goes on")

    def _safe_tick(self) -> None:
        """One bad value costs one tick, not the telemetry of the whole run."""
        try:
            self._tick(time.monotonic())
        except Exception as error:
            if not self._failed:
                log.exception("trainctl: a part of the telemetry failed, training goes on")
            self._failed = True
            self._core.complain("telemetry", f"a part of the telemetry failed: {type(error).__name__}: {error}")

    def _tick(self, now: float) -> None:
        core = self._core
        self._settle_saves(now)
        self._steering.keep()
        if self._preemption is not None:
            self._preemption.tick(now)
        if self._leader is not None:
            self._undo_what_is_due()
        if self._link is None:
            self._keep_own_loss()
        else:
            self._drain(now)
            for message in self._link.tick(now):
                if isinstance(message, LinkTrouble):
                    core.troubles = message.troubles
                elif self._leader is not None and isinstance(message, LinkCommand | LinkCancel):
                    self._leader.submit(message)
        if self._pruner is not None:
            self._pruner.tick(self._link)
        for name, seconds in core.phases.take().items():
            self._phases_s[name] = self._phases_s.get(name, 0.0) + seconds
        if self._link is not None and (now >= self._next_state or core.state() != self._state_since[0]):
            self._next_state = now + _STATE_S
            self._tell_state()
        if now >= self._next_figures:
            self._next_figures = now + _FIGURES_S
            self._each_second(now)
        self._tell_everybody(now)

    def _drain(self, now: float) -> None:
        core, link = self._core, self._link
        assert link is not None
        entries: list[Entry] = []
        for entry in core.buffer.take(_BATCH):
            if isinstance(entry, Rewind):
                # In the order in which it happened: old rows, the rollback, rows of the new incarnation.
                self._record_rows(entries, now)
                self._record_events(now)
                entries = []
                self._pace.rewind()
                core.last_metrics.clear()
                core.last_metrics.update(entry.metrics)
            elif isinstance(entry, StepMark):
                self._pace.step(entry)
                self._step_time = entry.time
            entries.append(entry)
        self._record_rows(entries, now)
        self._record_events(now)
        if core.tunables_changed.is_set():
            core.tunables_changed.clear()
            link.tell(LinkInfo(info=self._info()))

    def _record_rows(self, entries: list[Entry], now: float) -> None:
        self._record(self._rows.feed(entries), now)

    def _record(self, made: list[Rows], now: float) -> None:
        assert self._link is not None
        newest = self._rows.newest
        self._core.last_metrics.update(newest)
        self._core.own_loss = newest.get("loss", self._core.own_loss)
        newest.clear()
        clip = clip_of(self._core.tunables.values()) if made else None
        for rows in made:
            self._tally.observe(rows, clip)
            self._link.record(rows, now)
        for complaint in self._rows.complaints:
            self._core.complain("metric", complaint)
        self._rows.complaints.clear()
        for remark in self._rows.remarks:
            self._core.complain("metric", remark, severity="info")
        self._rows.remarks.clear()

    def _keep_own_loss(self) -> None:
        """A rank that does not speak for the run logs nothing but its own loss, for its figures."""
        for entry in self._core.buffer.take(_BATCH):
            if not isinstance(entry, StepMark | Rewind):
                loss = entry[1].get("loss")
                self._core.own_loss = float(loss) if isinstance(loss, float | int) else self._core.own_loss

    def _dropped(self) -> dict[str, int]:
        """Lost telemetry by reason, since this attempt began."""
        link = self._link
        return lost_here(self._core) | {
            "ranks": self._exchange.lost_elsewhere,
            "value": self._rows.refused_values,
            "names": self._rows.refused_names,
            "link": link.lost - link.crowded if link is not None else 0,
            "link-memory": link.crowded if link is not None else 0,
            "size": link.oversize if link is not None else 0,
        }

    def _record_events(self, now: float) -> None:
        assert self._link is not None
        self._tell_events(self._steering.released(), now)
        while self._core.events:
            event = self._core.events.popleft()
            if self._preemption is not None:
                self._preemption.hear(event)
            if not self._steering.holds(event):
                self._tell_events([event], now)

    def _tell_events(self, events: list[Event], now: float) -> None:
        assert self._link is not None
        for event in events:
            self._link.record(event, now)
            self._next_state = now  # whoever hears of an outcome and asks must see what it changed

    def _each_second(self, now: float) -> None:
        phases_s, self._phases_s = self._phases_s, {}
        self._pace.phases(time.time(), phases_s)
        self._exchange.report(phases_s)
        if self._leader is not None:
            self._reach.look(now)
        if self._agent is not None:
            try:
                self._agent.ensure(now)
            except OSError as error:
                log.warning("trainctl: no agent on this node, its GPUs are not shown: %s", error)
                self._agent = None
        if self._agent is not None and (address := self._agent.address()) is not None:
            self._exchange.agent = address
        if self._link is None:
            return
        self._tell_agents()
        self._auto_resume()
        self._warn_no_step()

    def _tell_everybody(self, now: float) -> None:
        """What all ranks said of themselves, as soon as it is there: its age is shown."""
        if self._link is not None and (ranks := self._exchange.everybody()) is not None:
            for first in range(0, len(ranks.ranks), _RANKS_A_RECORD):
                part = ranks.ranks[first : first + _RANKS_A_RECORD]
                self._link.record(Ranks(incarnation=ranks.incarnation, ranks=part), now)
            for rows in self._exchange.differing_ranges():
                self._link.record(rows, now)
            for gap in self._exchange.ranges.gaps:
                self._core.complain("data", str(gap), severity="info")
            self._exchange.ranges.gaps.clear()
            if self._exchange.ranges.passed_over:
                text = (
                    f"more than {RANKS_TOLD} ranks read other data than rank 0: those of further ranks are not recorded"
                )
                self._core.complain("data", text, severity="info")

    def _tell_agents(self) -> None:
        assert self._link is not None
        agents = self._exchange.agents
        if self._link.connected and (agents != self._told_agents or self._link.connects != self._told_connects):
            self._told_agents, self._told_connects = agents, self._link.connects
            self._link.tell(LinkAgents(agents=agents))

    def _tell_state(self) -> None:
        for told in self._drop_watch.observe(self._tell_progress(), time.monotonic()):
            self._core.lost_telemetry(told)

    def _tell_progress(self) -> dict[str, int]:
        """Tell what is true of the run now; return what was dropped so far."""
        assert self._link is not None
        run = self._progress()
        self._link.tell(LinkProgress(run=run))
        return run.dropped

    def _progress(self) -> RunState:
        state = self._core.state()
        if state != self._state_since[0]:
            self._state_since = (state, time.time())
        return run_state(
            self._core,
            self._pace,
            self._tally,
            since=self._state_since[1],
            step_time=self._step_time,
            dropped=self._dropped(),
        )

    def _undo_what_is_due(self) -> None:
        """Changes on trial whose time is over: undone, unless their condition holds at that boundary."""
        core = self._core
        assert self._leader is not None
        for revert, asked in core.reverts.due(core.boundary.completed, held=core.boundary.held_at is not None):
            actor = f"{revert.actor} (undone after {revert.command.revert_after} steps)"
            self._leader.undo(revert.command, actor, due=revert.due, asked=asked)

    def _auto_resume(self) -> None:
        hold = self._core.hold
        if hold is None or hold.resumes_at is None or time.time() < hold.resumes_at or self._leader is None:
            return
        hold.resumes_at = time.time() + _RESUME_AGAIN_S  # should the ranks find no step for it this time
        if self._leader.holds(hold.resuming):
            return  # the job's store is silent: it comes through as soon as that answers
        hold.resuming = f"{AUTO_RESUME}{int(time.time() * 1000)}"
        command = Command(id=hold.resuming, action=Resume())
        self._leader.submit(LinkCommand(command=command, actor=f"{hold.by} (pause --for)", accepted=time.time()))

    def _warn_no_step(self) -> None:
        core = self._core
        if self._warned_no_step or core.boundary.completed != core.first_step:
            return
        if time.time() - core.started > _NO_STEP_S:
            self._warned_no_step = True
            self._core.complain(
                "no-step",
                f"no step was completed in {_NO_STEP_S:.0f} s: unless the first takes that long, the script does not "
                "call run.step_done(). Call it once after each optimizer step; until then every command waits, because "
                "commands take effect there",
            )

    def _settle_saves(self, now: float) -> None:
        for save in [save for save in self._core.saves if save.pending.done()]:
            self._core.saves.remove(save)
            if self._pruner is not None and save.pending.result().error is None:
                self._pruner.saved()
            if self._link is not None:
                self._saved.append(Saved(self._core, save))
        while self._saved and self._saved[0].settled:
            self._tell_events(self._saved.popleft().events(), now)

    def _goodbye(self) -> None:
        if self._pruner is not None:
            self._pruner.finish(_DELETED_S)
        if self._link is None:
            return
        link, patience = self._link, Patience(time.monotonic())
        self._settle_saves(time.monotonic())
        self._steering.finish(_KEPT_S)
        assert self._bye is not None
        said = -1  # the connection on which goodbye was said: a hub that comes back, or comes late, hears it too
        taken = False
        while not (taken and link.drained() and said == link.connects):
            now = time.monotonic()
            if not taken:
                taken = self._take_the_rest(now, wait=patience.with_device(now, len(self._core.buffer)))
            if taken and link.connected and said != link.connects:
                said = link.connects
                self._tell_progress()
                link.tell(self._bye)
            link.tick(now)
            # One that has all there is, while a device still computes, owes nothing.
            if not patience.with_hub(now, link.packets, asked=link.connects > 0 and (taken or not link.drained())):
                break
            wait_readable(link, 0.02)
        if not taken:
            self._take_the_rest(time.monotonic(), wait=False)
        if said != link.connects or not link.drained():
            leave_behind(link, self._core.identity.directory, run=self._progress(), bye=self._bye)
        link.close()

    def _take_the_rest(self, now: float, *, wait: bool) -> bool:
        """Record what the training thread left; say whether that was all. Without `wait`, what a device still owes is
        given up, counted."""
        core, buffer = self._core, self._core.buffer
        not_read = buffer.not_read
        buffer.waits_for_devices = wait
        try:
            self._drain(now)
            if len(buffer) == 0:
                begun = core.ranges.begun
                self._record(self._rows.finish(core.boundary.completed, begun=begun), now)
        except Exception as error:
            log.exception("trainctl: a part of the last telemetry is lost")
            core.complain("telemetry", f"a part of the last telemetry is lost: {type(error).__name__}: {error}")
        if not wait and buffer.not_read > not_read:
            core.complain(
                "dropped",
                f"{buffer.not_read - not_read} values of the last steps are missing: the device had not computed them "
                f"{SILENT_S:.0f} s after training ended. Wait for it before run.close(): torch.cuda.synchronize()",
            )
        self._record_events(now)
        return len(buffer) == 0
