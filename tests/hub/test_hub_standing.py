"""Where a command stands at the hub: every state and every event of the table, and the desk that goes by it."""

import asyncio
import itertools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TypeAlias, get_args

import pytest
from hub_double import info

from trainctl.hub.desk import CommandDesk
from trainctl.hub.standing import FINAL, OUTCOMES, TABLE, Do, Event, StandingError, Stands, step
from trainctl.store.audit import AuditLog
from trainctl.store.record import RunRecord
from trainctl.wire.commands import FINAL_COMMAND_STATES, Action, Cancel, Command, CommandState, SetTunable, args_of
from trainctl.wire.keys import Actor
from trainctl.wire.messages import (
    STREAMS,
    CommandReply,
    CommandUpdate,
    Envelope,
    LinkCancel,
    LinkCommand,
    Note,
    stream_of,
)
from trainctl.wire.rundir import RunDir
from trainctl.wire.server import Caller

# A row for each event, a column for each state: the state that follows, in capitals where the outcome is then written
# down; `=` is the same state, a dot what cannot come about.
EXPECTED = """
              new        orphan     accepted   scheduled  applied rejected conflict expired failed superseded unknown
refuse        REJECTED   REJECTED   .          .          .       .        .        .       .      .          .
clash         CONFLICT   CONFLICT   .          .          .       .        .        .       .      .          .
accept        accepted   accepted   .          .          .       .        .        .       .      .          .
again         .          .          =          =          =       =        =        =       =      =          =
due           .          .          =          =          =       =        =        =       =      =          =
take_back     .          .          =          =          =       =        =        =       =      =          =
replace       .          .          =          =          =       =        =        =       =      =          =
relink        .          .          =          =          .       .        .        .       .      .          .
ended         .          .          EXPIRED    UNKNOWN    =       =        =        =       =      =          =
lost          .          .          UNKNOWN    UNKNOWN    =       =        =        =       =      =          =
restarted     .          .          UNKNOWN    .          .       .        .        .       .      .          .
give_up       .          UNKNOWN    .          .          .       .        .        .       .      .          .
scheduled     scheduled  scheduled  scheduled  .          =       =        =        =       =      =          scheduled
applied       APPLIED    APPLIED    APPLIED    APPLIED    =       =        =        =       =      =          APPLIED
rejected      REJECTED   REJECTED   REJECTED   REJECTED   =       =        =        =       =      =          REJECTED
conflict      CONFLICT   CONFLICT   CONFLICT   .          =       =        =        =       =      =          CONFLICT
expired       EXPIRED    EXPIRED    EXPIRED    EXPIRED    =       =        =        =       =      =          EXPIRED
failed        FAILED     FAILED     FAILED     FAILED     =       =        =        =       =      =          FAILED
superseded    SUPERSEDED SUPERSEDED SUPERSEDED .          =       =        =        =       =      =          SUPERSEDED
unknown       UNKNOWN    UNKNOWN    UNKNOWN    UNKNOWN    =       =        =        =       =      =          =
"""  # fmt: skip
# What is done where nothing changes.
STAYS = {
    (Stands.ACCEPTED, Event.AGAIN): Do.WATCH,
    (Stands.ACCEPTED, Event.DUE): Do.WITHDRAW,
    (Stands.ACCEPTED, Event.TAKE_BACK): Do.WITHDRAW,
    (Stands.ACCEPTED, Event.REPLACE): Do.GIVE_WAY,
    (Stands.ACCEPTED, Event.RELINK): Do.HAND_ON,
    (Stands.SCHEDULED, Event.AGAIN): Do.WATCH,
    (Stands.SCHEDULED, Event.DUE): Do.WITHDRAW,
    (Stands.SCHEDULED, Event.TAKE_BACK): Do.WITHDRAW,
    (Stands.SCHEDULED, Event.RELINK): Do.HAND_ON,
} | {(state, Event.AGAIN): Do.ANSWER for state in FINAL}


def expected() -> dict[tuple[Stands, Event], tuple[Stands, Do]]:
    head, *rows = [line.split() for line in EXPECTED.strip().splitlines()]
    found = {}
    for name, *cells in rows:
        for state, cell in zip(map(Stands, head), cells, strict=True):
            event = Event(name.replace("_", " "))
            if cell == "=":
                found[state, event] = (state, STAYS.get((state, event), Do.NOTHING))
            elif cell != ".":
                found[state, event] = (Stands(cell.lower()), Do.SETTLE if cell.isupper() else Do.TELL)
    return found


@pytest.mark.parametrize("event", Event)
def test_every_state_and_every_event(event: Event) -> None:
    for state in Stands:
        wanted = expected().get((state, event))
        if wanted is None:
            with pytest.raises(StandingError, match=f"{state} cannot meet"):
                step(state, event)
        else:
            assert step(state, event) == wanted


def test_the_states_that_operators_see_are_those_of_the_wire() -> None:
    assert {state.value for state in FINAL} == {event.value for event in OUTCOMES} == FINAL_COMMAND_STATES
    assert {state.value for state in Stands} - {"new", "orphan"} == set(get_args(CommandState))


def test_the_first_outcome_stands_and_every_command_can_come_to_one() -> None:
    for (state, _), (following, do) in TABLE.items():
        assert following == state or state not in FINAL - {Stands.UNKNOWN}
        assert (do is Do.SETTLE) == (following in FINAL and following != state), "written down once"
    for state in (Stands.ACCEPTED, Stands.SCHEDULED):
        assert step(state, Event.LOST) == (Stands.UNKNOWN, Do.SETTLE)


Happening: TypeAlias = Callable[[], None]


class Desk:
    """A real desk, its audit log and record; `before_audit` is called while an audit line is being written."""

    def __init__(self, path: Path) -> None:
        self.sent: list[LinkCommand | LinkCancel] = []
        self.replies: list[CommandUpdate] = []
        self.links = itertools.count(1)
        self.heads = dict.fromkeys(STREAMS, 0)
        self.before_audit: Happening = lambda: None
        self.record = RunRecord(info(path))
        self.audit = AuditLog(path / "audit.jsonl")
        append = self.audit.append

        def appending(entry: dict[str, object]) -> None:
            self.before_audit()
            append(entry)  # type: ignore[arg-type]

        self.audit.append = appending  # type: ignore[method-assign, assignment]
        self.desk = CommandDesk(
            recorder=SimpleNamespace(record=self.record, take=self._take),  # type: ignore[arg-type]
            server=SimpleNamespace(reply=self._reply),  # type: ignore[arg-type]
            audit=self.audit,
            run_dir=RunDir(path),
            line=SimpleNamespace(linked=True, send=self._send),  # type: ignore[arg-type]
            endings=SimpleNamespace(of=lambda _: None, refusal=lambda _: None),  # type: ignore[arg-type]
        )

    def _take(self, body: CommandUpdate | Note, *, attempt: int = 0, link: int = 0) -> Envelope:
        stream = stream_of(body)
        self.heads[stream] += 1
        envelope = Envelope(
            source="t", epoch=1, stream=stream, seq=self.heads[stream], time=1.0, body=body, attempt=attempt, link=link
        )
        self.record.apply(envelope)
        return envelope

    def _reply(self, _caller: Caller, reply: CommandReply) -> None:
        self.replies.append(reply.update)

    def _send(self, message: LinkCommand | LinkCancel) -> bool:
        self.sent.append(message)
        return True

    async def do(self, action: Action, name: str) -> None:
        caller = Caller(route=b"mk", req=1, actor=Actor(name="mk", role="admin"))
        await self.desk.do(Command(id=name, action=action), caller)

    def hear(self, action: Action, name: str, state: CommandState) -> None:
        update = CommandUpdate(
            time=time.time(),
            step=3,
            incarnation=1,
            id=name,
            command="set",
            args=args_of(action),
            actor="mk",
            state=state,
        )
        self.desk.hear(update, attempt=1, link=next(self.links))

    def audited(self, name: str) -> list[str]:
        entries = [json.loads(line) for line in self.audit.lines(100)]
        return [entry["state"] for entry in entries if entry["id"] == name]


SET = SetTunable(name="clip", value=2.0)


def test_what_comes_after_an_outcome_is_neither_told_nor_written_down_a_second_time(tmp_path: Path) -> None:
    async def scenario() -> Desk:
        hub = Desk(tmp_path)
        await hub.do(SET, "a")
        for state in ("scheduled", "applied", "failed", "applied"):
            hub.hear(SET, "a", state)
        await hub.desk.close()
        return hub

    hub = asyncio.run(scenario())
    assert [update.state for update in hub.replies] == ["accepted", "scheduled", "applied"]
    assert hub.audited("a") == ["accepted", "applied"]
    assert hub.record.commands["a"].state == "applied"


def test_what_is_not_in_the_table_is_complained_about_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> Desk:
        hub = Desk(tmp_path)
        await hub.do(SET, "a")
        hub.hear(SET, "a", "scheduled")
        hub.hear(SET, "a", "superseded")
        await hub.desk.close()
        return hub

    with caplog.at_level(logging.ERROR):
        hub = asyncio.run(scenario())
    assert "command a: a command that is scheduled cannot meet" in caplog.text
    assert [update.state for update in hub.replies] == ["accepted", "scheduled"]
    assert hub.audited("a") == ["accepted"]


def test_a_cancel_of_what_was_settled_while_the_audit_line_was_being_written_has_its_outcome(tmp_path: Path) -> None:
    async def scenario() -> Desk:
        hub = Desk(tmp_path)
        await hub.do(SET, "a")
        loop = asyncio.get_running_loop()

        def settle() -> None:
            hub.before_audit = lambda: None
            told = asyncio.run_coroutine_threadsafe(hear(), loop)
            told.result(10)

        async def hear() -> None:
            hub.hear(SET, "a", "applied")

        hub.before_audit = settle
        await hub.do(Cancel(command="a"), "b")
        await hub.desk.close()
        return hub

    hub = asyncio.run(scenario())
    told = hub.record.commands["b"]
    assert (told.state, told.reason) == ("conflict", "set is applied (step 3)")
    assert not [message for message in hub.sent if isinstance(message, LinkCancel)]


def test_what_was_scheduled_while_the_audit_line_of_a_newer_one_was_written_does_not_give_way(tmp_path: Path) -> None:
    async def scenario(scheduled: bool) -> Desk:
        hub = Desk(tmp_path / str(scheduled))
        (tmp_path / str(scheduled)).mkdir()
        await hub.do(SET, "older")
        loop = asyncio.get_running_loop()

        def schedule() -> None:
            hub.before_audit = lambda: None
            asyncio.run_coroutine_threadsafe(hear(), loop).result(10)

        async def hear() -> None:
            hub.hear(SET, "older", "scheduled")

        if scheduled:
            hub.before_audit = schedule
        await hub.do(SetTunable(name="clip", value=3.0), "newer")
        await hub.desk.close()
        return hub

    for scheduled, cancels in ((False, ["older"]), (True, [])):
        hub = asyncio.run(scenario(scheduled))
        assert [message.id for message in hub.sent if isinstance(message, LinkCancel)] == cancels
        assert [message.command.id for message in hub.sent if isinstance(message, LinkCommand)] == ["older", "newer"]
