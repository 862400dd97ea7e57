"""Commands from request to outcome: asked, written down, handed on, watched, answered."""

import asyncio
import logging
import time
from dataclasses import dataclass

import msgspec

from trainctl.hub.audit_writer import AuditWriter
from trainctl.hub.endings import Endings, Outcome
from trainctl.hub.link import RankLine
from trainctl.hub.recorder import Recorder
from trainctl.hub.removing import Removed, remove, targets_of
from trainctl.hub.rules import Situation, rejection
from trainctl.hub.standing import FINAL, Do, Event, StandingError, Stands, step
from trainctl.store.audit import AuditLog
from trainctl.wire.commands import (
    AddNote,
    Cancel,
    CheckpointPin,
    CheckpointRemove,
    CheckpointUnpin,
    Command,
    args_of,
    carrier_of,
    spec_of,
)
from trainctl.wire.held_states import list_with_memory
from trainctl.wire.manifest import list_checkpoints, pick, pin
from trainctl.wire.messages import (
    FINAL_STATES,
    CheckpointInfo,
    CommandReply,
    CommandUpdate,
    LinkCancel,
    LinkCommand,
    Note,
    Scalar,
)
from trainctl.wire.own_ids import is_own_id
from trainctl.wire.precedence import UnderWay, conflict_reason, outcome
from trainctl.wire.rundir import RunDir
from trainctl.wire.server import Caller, Refusal, Server

log = logging.getLogger(__name__)

_ASKED_AGAIN_S = 90.0  # longer than a client keeps asking
_LINES_READ = 20_000  # more than the commands that a record keeps have


@dataclass(kw_only=True)
class _Open:
    """An accepted command without an outcome."""

    command: Command
    actor: str
    accepted: float
    cancel_sent: bool = False


class CommandDesk:
    """Accepts commands, follows them to their outcome and tells everybody who asked."""

    def __init__(
        self,
        *,
        recorder: Recorder,
        server: Server,
        audit: AuditLog,
        run_dir: RunDir,
        line: RankLine,
        endings: Endings,
    ) -> None:
        self._recorder = recorder
        self._record = recorder.record
        self._server = server
        self._audit = audit
        self._run_dir = run_dir
        self._line = line
        self._endings = endings
        self._ending: dict[str, asyncio.Task[None]] = {}  # commands that the agents carry out, by id
        self._removing: dict[str, asyncio.Task[None]] = {}  # deletions of checkpoints, by the command's id
        self._open_endings: dict[str, _Open] = {}
        self._one_at_a_time = asyncio.Lock()
        self._open: dict[str, _Open] = {}
        self._orphans: dict[str, _Open] = {}  # accepted in the audit log, and unknown to the journal
        self._orphans_until = 0.0
        self._watchers: dict[str, list[Caller]] = {}
        self._cancels: dict[str, list[_Open]] = {}
        self._writer = AuditWriter(audit=audit, recorder=recorder, run_dir=run_dir, turn=self._one_at_a_time)

    # --- asked

    async def do(self, command: Command, caller: Caller) -> None:
        """Take a command and answer with every state it passes through; a repeated id gets the first one's."""
        async with self._one_at_a_time:
            known = self.watch(command.id, caller)
            if known is not None:
                self._server.reply(caller, CommandReply(req=caller.req, update=known))
                return
            _refuse_own(command.id)
            await self._refuse_used(command.id)
            self._watchers[command.id] = [caller]
            await self._accept(command, caller.actor.name)

    async def _refuse_used(self, command_id: str) -> None:
        """Raises `Refusal` for an id that was used so long ago that its outcome is in the audit log only."""
        if not self._record.forgets:
            return
        try:
            used = await asyncio.to_thread(self._audit.mentions, command_id)
        except (OSError, ValueError):
            return  # then nothing can be written down either, and what changes training is refused for that
        if used:
            raise Refusal(
                "used_id",
                f"the command id {command_id} was used before, for one of long ago: nothing was done",
                "trainctl audit shows its outcome; send yours with another --command-id",
            )

    def watch(self, command_id: str, caller: Caller) -> CommandUpdate | None:
        """Where a command stands; whoever asked also hears how it goes on."""
        known = self._record.commands.get(command_id)
        if known is not None and self._on(command_id, Event.AGAIN)[1] is Do.WATCH:
            self._watchers.setdefault(command_id, []).append(caller)
        return known

    async def _accept(self, command: Command, actor: str) -> None:
        record = self._record
        checkpoints = await asyncio.to_thread(list_with_memory, self._run_dir.checkpoints, record.in_memory)
        situation = Situation(
            info=record.info,
            state=record.state.state,
            linked=self._line.linked,
            checkpoints=checkpoints,
            commands=record.commands,
            targets=self._targets(checkpoints),
            no_restart=self._endings.refusal(command.action),
        )
        opened = _Open(command=command, actor=actor, accepted=time.time())
        reason = rejection(command, situation)
        conflict, superseded = outcome(command.action, actor, self._under_way())
        if reason is None and conflict is not None:
            self._say(opened, Event.CLASH, reason=conflict_reason(command.action, conflict))
            return
        if reason is None:
            reason = await self._writer.accept(command, actor, opened.accepted)
        if reason is not None:
            self._say(opened, Event.REFUSE, reason=reason)
            return
        if not self._say(opened, Event.ACCEPT):
            return
        match carrier_of(command.action):
            case "hub":
                await self._carry_out(opened)
                return
            case "agents":
                # Apart, because it takes as long as the ranks' grace, and other commands are not to wait for that.
                self._open_endings[command.id] = opened
                self._ending[command.id] = asyncio.create_task(self._end_ranks(opened))
                return
            case "ranks":
                self._open[command.id] = opened
        for older in superseded:
            if self._on(older.command.id, Event.REPLACE)[1] is not Do.GIVE_WAY:
                continue  # it was scheduled, or ended, while the audit line was being written
            self._line.send(LinkCancel(id=older.command.id, actor=actor, superseded_by=command.id))
        sent = self._line.send(LinkCommand(command=command, actor=actor, accepted=opened.accepted))
        if record.state.state in FINAL_STATES and command.id in self._open:
            # It ended while the audit line was being written: no later end will settle this one.
            del self._open[command.id]
            reason = f"the run is {record.state.state}" + ("" if sent else ", and rank 0 has left")
            self._say(opened, Event.ENDED, reason=reason)

    def _under_way(self) -> list[UnderWay]:
        """Commands that were accepted and have no outcome yet, oldest first."""
        return [
            UnderWay(
                command=opened.command,
                actor=opened.actor,
                scheduled=(known := self._record.commands.get(opened.command.id)) is not None
                and known.state == "scheduled",
            )
            for opened in (*self._open.values(), *self._open_endings.values())
        ]

    def _targets(self, checkpoints: list[CheckpointInfo]) -> frozenset[str]:
        """The checkpoints that commands under way, or the attempt that is about to start, go back to."""
        actions = [under_way.command.action for under_way in self._under_way()]
        found = targets_of(actions, checkpoints, self._record.info.best_by)
        ending = self._endings.of(self._record.state.attempt)
        return found | {ending.target} if ending is not None else found

    # --- carried out here

    async def _carry_out(self, opened: _Open) -> None:
        state = self._record.state
        match opened.command.action:
            case AddNote(text=text):
                note = Note(
                    time=time.time(), step=state.step, incarnation=state.incarnation, actor=opened.actor, text=text
                )
                self._recorder.take(note)
                self._say(opened, Event.APPLIED, after=text)
            case CheckpointPin(checkpoint=target):
                await self._pin(opened, target, pinned=True)
            case CheckpointUnpin(checkpoint=target):
                await self._pin(opened, target, pinned=False)
            case CheckpointRemove(checkpoint=target):
                # Apart, because the last good one is verified first, and that takes as long as reading it.
                self._removing[opened.command.id] = asyncio.create_task(self._remove(opened, target))
            case Cancel(command=target):
                self._take_back(opened, target)
            case _:
                raise AssertionError("the registry names a command for the hub that it cannot carry out")

    def _take_back(self, cancel: _Open, target: str) -> None:
        if self._on(target, Event.TAKE_BACK)[1] is not Do.WITHDRAW:
            self._say_cancelled(cancel, self._record.commands[target])  # settled while the audit line was being written
        elif self._line.send(LinkCancel(id=target, actor=cancel.actor)):
            self._cancels.setdefault(target, []).append(cancel)
        else:
            self._say(cancel, Event.REJECTED, reason="rank 0 is not connected: nothing can be withdrawn from it")

    async def _end_ranks(self, opened: _Open) -> None:
        try:
            outcome = await self._endings.carry_out(opened.command, opened.actor)
        except Exception as error:  # the operator must hear that it is not known, and why
            log.exception("the ranks could not be ended")
            outcome = Outcome(state="unknown", reason=f"the hub failed while it ended the ranks: {error}")
        finally:
            self._ending.pop(opened.command.id, None)
        self._say(opened, Event(outcome.state), after=outcome.after, ranks=outcome.ranks, reason=outcome.reason)

    async def _remove(self, opened: _Open, target: str) -> None:
        try:
            done = await remove(self._recorder, self._run_dir, target, opened.actor, self._targets)
        except Exception as error:  # the operator must hear that it is not known, and why
            log.exception("a checkpoint could not be removed")
            done = Removed(state="unknown", reason=f"the hub failed while it removed {target}: {error}")
        finally:
            self._removing.pop(opened.command.id, None)
        self._say(opened, Event(done.state), reason=done.reason)

    async def _pin(self, opened: _Open, target: str, *, pinned: bool) -> None:
        found = pick(await asyncio.to_thread(list_checkpoints, self._run_dir.checkpoints), target)
        if found is None:
            self._say(opened, Event.REJECTED, reason=f"checkpoint {target} is gone")
            return
        try:
            await asyncio.to_thread(pin, self._run_dir.checkpoints / found.id, pinned=pinned)
        except OSError as error:
            self._say(opened, Event.FAILED, reason=f"the mark of {found.id} cannot be written: {error.strerror}")
            return
        self._say(opened, Event.APPLIED, before=found.pinned, after=pinned)

    # --- heard of

    def hear(self, update: CommandUpdate, *, attempt: int, link: int) -> None:
        """Rank 0 says, as record `link` of its own, where a command stands."""
        _, do = self._on(update.id, Event(update.state) if update.state != "accepted" else Event.ACCEPT)
        if self._recorder.take(update, attempt=attempt, link=link) is not None and do in {Do.TELL, Do.SETTLE}:
            self._settle(update, do)

    def tick(self, now: float) -> None:
        """Ask rank 0 to withdraw what expired before it was applied, and try again what the audit log did not take;
        `now` is wall clock."""
        self._writer.tick(now)
        if self._orphans and now > self._orphans_until:
            self._give_up_orphans()
        for opened in self._open.values():
            expires_s, name = opened.command.expires_s, opened.command.id
            due = expires_s is not None and not opened.cancel_sent and now > opened.accepted + expires_s
            if due and self._on(name, Event.DUE)[1] is Do.WITHDRAW:
                opened.cancel_sent = self._line.send(LinkCancel(id=name, actor="hub"))

    def rank_came(self, *, new_attempt: bool) -> None:
        """Rank 0 is linked. The same one is handed again what may not have reached it; it knows what it has seen."""
        if new_attempt:
            self.rank_gone("the run was started again before its outcome was known", ended=False)
            return
        for opened in self._open.values():
            if self._on(opened.command.id, Event.RELINK)[1] is not Do.HAND_ON:
                continue
            opened.cancel_sent = False
            self._line.send(LinkCommand(command=opened.command, actor=opened.actor, accepted=opened.accepted))
            for cancel in self._cancels.get(opened.command.id, [])[:1]:
                self._line.send(LinkCancel(id=opened.command.id, actor=cancel.actor))

    def rank_gone(self, reason: str, *, ended: bool) -> None:
        """Nobody will say any more what became of pending commands. After an orderly end, what was never
        scheduled was not applied."""
        for pending in self._record.pending:
            if pending.id in self._ending or pending.id in self._removing:
                continue  # others say how it went: the agents, for whom rank 0 is gone, and whoever deletes
            state, do = self._on(pending.id, Event.ENDED if ended else Event.LOST)
            if do is not Do.SETTLE:
                continue  # settled by the one before: a cancel goes with what it cancels
            current = self._record.state
            update = msgspec.structs.replace(
                pending,
                time=time.time(),
                step=current.step,
                incarnation=current.incarnation,
                state=state.value,
                reason=reason,
            )
            self._take(update, do)

    def restore(self) -> None:
        """After a restart of the hub: take up the commands that the journal shows without an outcome."""
        pending = {update.id for update in self._record.pending}
        try:
            lines = self._audit.lines(_LINES_READ)
        except OSError as error:
            log.warning("the audit log cannot be read: %s", error)
            return
        if len(lines) < _LINES_READ:  # else what is not among them may be further back
            self._writer.take_up(self._record.commands.values(), lines)
        for line in lines:
            opened = _from_audit(line)
            if opened is not None and opened.command.id in pending:
                self._open[opened.command.id] = opened
            elif opened is not None and opened.command.id not in self._record.commands:
                self._orphans[opened.command.id] = opened
            elif opened is None:
                self._orphans.pop(_id_in(line), None)  # it has an outcome, from long ago
        self._orphans_until = time.time() + _ASKED_AGAIN_S
        for opened in list(self._open.values()):
            if carrier_of(opened.command.action) != "ranks":
                del self._open[opened.command.id]
                self._say(opened, Event.RESTARTED, reason="the hub was restarted while it carried this out")

    def _give_up_orphans(self) -> None:
        """The hub died between an audit line and the journal: whoever asked has asked again by now, or never will."""
        for command_id, opened in self._orphans.items():
            if command_id not in self._record.commands:
                reason = "the hub died when it had just accepted this, and nobody asked for it again"
                self._say(opened, Event.GIVE_UP, reason=reason)
        self._orphans = {}

    async def close(self) -> None:
        """Wait until what was settled is in the audit log, or cannot be."""
        for task in (tasks := [*self._ending.values(), *self._removing.values()]):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._writer.close()

    # --- said

    def _say(
        self,
        opened: _Open,
        event: Event,
        *,
        before: Scalar = None,
        after: Scalar = None,
        ranks: int | None = None,
        reason: str | None = None,
    ) -> bool:
        """Go on by the table, and tell where it stands; false where nothing is to be told, or a newer hub tells it."""
        state, do = self._on(opened.command.id, event)
        if do not in {Do.TELL, Do.SETTLE}:
            return False
        current = self._record.state
        return self._take(
            CommandUpdate(
                time=time.time(),
                step=current.step,
                incarnation=current.incarnation,
                id=opened.command.id,
                command=spec_of(opened.command.action).name,
                args=args_of(opened.command.action),
                actor=opened.actor,
                state=state.value,  # type: ignore[arg-type]  # only states that operators see are told
                before=before,
                after=after,
                ranks=ranks,
                reason=reason,
            ),
            do,
        )

    def _on(self, command_id: str, event: Event) -> tuple[Stands, Do]:
        """Go on by the table of `standing`; an error of ours is told in the log, and changes nothing."""
        known = self._record.commands.get(command_id)
        new = Stands.ORPHAN if command_id in self._orphans else Stands.NEW
        stands = new if known is None else Stands(known.state)
        try:
            return step(stands, event)
        except StandingError as error:
            log.error("command %s: %s", command_id, error)
            return stands, Do.NOTHING

    def _take(self, update: CommandUpdate, do: Do) -> bool:
        if self._recorder.take(update) is None:
            return False  # a newer hub took over; its answer counts
        self._settle(update, do)
        return True

    def _settle(self, update: CommandUpdate, do: Do) -> None:
        self._answer(update)
        if do is not Do.SETTLE:
            return
        self._open.pop(update.id, None)
        self._open_endings.pop(update.id, None)
        self._writer.settle(update)
        for cancel in self._cancels.pop(update.id, []):
            self._say_cancelled(cancel, update)

    def _say_cancelled(self, cancel: _Open, settled: CommandUpdate) -> None:
        """What became of a cancel, by the outcome of what it was to withdraw."""
        withdrawn = settled.state not in {"applied", "failed", "unknown"}
        reason = None if withdrawn else f"{settled.command} is {settled.state} (step {settled.step})"
        self._say(cancel, Event.APPLIED if withdrawn else Event.CONFLICT, reason=reason)

    def _answer(self, update: CommandUpdate) -> None:
        final = Stands(update.state) in FINAL
        callers = self._watchers.pop(update.id, []) if final else self._watchers.get(update.id, [])
        for caller in callers:
            self._server.reply(caller, CommandReply(req=caller.req, update=update))


def _refuse_own(command_id: str) -> None:
    """Raises `Refusal`, and records nothing under an id that rank 0 may give to a command of its own."""
    if is_own_id(command_id):
        raise Refusal(
            "own_id",
            f"the command id {command_id} is one of those that the run gives itself, when it undoes a change on trial, "
            "ends a pause or is preempted: nothing was done",
            "send it with another --command-id",
        )


def _id_in(line: str) -> str:
    try:
        return str(msgspec.json.decode(line, type=dict[str, Scalar]).get("id"))
    except msgspec.MsgspecError:
        return ""


def _from_audit(line: str) -> _Open | None:
    try:
        entry = msgspec.json.decode(line, type=dict[str, Scalar])
        if entry.get("state") != "accepted":
            return None
        command = msgspec.json.decode(str(entry["request"]), type=Command)
        return _Open(command=command, actor=str(entry["actor"]), accepted=float(str(entry["time"])))
    except (msgspec.MsgspecError, KeyError, ValueError):
        return None
