"""A hub that dies between the audit line and the journal leaves a command that nobody knows: it gets an outcome too."""

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_double import info

from trainctl.hub import desk as desk_module
from trainctl.hub.desk import CommandDesk
from trainctl.store.audit import AuditLog
from trainctl.store.record import RunRecord
from trainctl.wire.messages import CommandUpdate
from trainctl.wire.rundir import RunDir


def desk_over(audit: AuditLog, path: Path, said: list[CommandUpdate]) -> CommandDesk:
    record = RunRecord(info(path))
    recorder = SimpleNamespace(record=record, take=lambda update: said.append(update) or update)
    server = SimpleNamespace(reply=lambda *_: None)
    return CommandDesk(
        recorder=recorder,  # type: ignore[arg-type]
        server=server,  # type: ignore[arg-type]
        audit=audit,
        run_dir=RunDir(path),
        line=SimpleNamespace(linked=False, send=lambda _: False),  # type: ignore[arg-type]
        endings=SimpleNamespace(),  # type: ignore[arg-type]
    )


def accepted(audit: AuditLog, name: str) -> None:
    request = json.dumps({"id": name, "action": {"type": "pause"}})
    audit.append({"time": 1.0, "id": name, "actor": "mk", "state": "accepted", "command": "pause", "request": request})


def test_what_only_the_audit_log_knows_becomes_unknown_once_nobody_can_be_asking_any_more(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    accepted(audit, "settled")
    audit.append({"time": 2.0, "id": "settled", "actor": "mk", "state": "applied", "command": "pause"})
    accepted(audit, "orphan")
    said: list[CommandUpdate] = []

    async def scenario() -> None:
        desk = desk_over(audit, tmp_path, said)
        desk.restore()
        desk.tick(time.time())
        assert not said, "the client may be about to ask again, and then it is carried out"
        desk.tick(time.time() + desk_module._ASKED_AGAIN_S + 1)
        await desk.close()

    asyncio.run(scenario())
    assert [(update.id, update.state) for update in said] == [("orphan", "unknown")]
    assert "nobody asked for it again" in str(said[0].reason)
    outcome = json.loads(audit.lines(1)[0])
    assert (outcome["id"], outcome["state"]) == ("orphan", "unknown"), "and an auditor finds it"


@pytest.mark.parametrize("junk", ["", "no json", "[1]"])
def test_a_line_that_is_none_costs_nothing(junk: str, tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    accepted(audit, "orphan")
    with audit.path.open("a") as file:
        file.write(junk + "\n")
    said: list[CommandUpdate] = []

    async def scenario() -> None:
        desk = desk_over(audit, tmp_path, said)
        desk.restore()
        desk.tick(time.time() + desk_module._ASKED_AGAIN_S + 1)
        await desk.close()

    asyncio.run(scenario())
    assert [(update.id, update.state) for update in said] == [("orphan", "unknown")], "what is before it counts"
