"""What the audit log does not take is kept and written down late, behind a line that says so."""

import asyncio
import json
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_double import first_reply, hub_running, info, peer_of, rank_linked, request, snapshot_when

from trainctl.hub import audit_trail as module
from trainctl.hub.audit_trail import AuditTrail, Entry
from trainctl.hub.desk import CommandDesk
from trainctl.store.audit import AuditLog, verify_audit
from trainctl.store.record import RunRecord
from trainctl.wire.commands import Abort, AddNote, CommandState, Pause
from trainctl.wire.messages import Anomaly, CommandUpdate, Envelope, LinkCommand, Snapshot
from trainctl.wire.rundir import RunDir


def entry(name: str, state: str = "applied", at: float = 1.0) -> Entry:
    return {"time": at, "id": name, "state": state}


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path: Path) -> list[str]:
    return [line["id"] or line["state"] for line in written(path)]


class Trail:
    """A trail over a log that takes nothing while it is `shut`."""

    def __init__(self, path: Path) -> None:
        self.path = path / "audit.jsonl"
        self.trail = AuditTrail(AuditLog(self.path))
        self.aside = path / "aside"

    def shut(self) -> None:
        if self.path.exists():
            self.path.rename(self.aside)
        self.path.mkdir()  # refuses writing to root too, as no mode does

    def open(self) -> None:
        self.path.rmdir()
        if self.aside.exists():
            self.aside.rename(self.path)

    def refuses(self, *entries: Entry, keep: bool = True) -> None:
        for one in entries:
            with pytest.raises(OSError, match="directory"):
                self.trail.write(one, keep=keep)


def test_what_waits_goes_before_what_comes_next_and_a_line_tells_of_the_gap(tmp_path: Path) -> None:
    log = Trail(tmp_path)
    log.trail.write(entry("before"), keep=True)
    log.shut()
    log.refuses(entry("a", at=5.0), entry("b", at=6.0))
    log.refuses(entry("accepted of what was refused for that"), keep=False)
    log.open()
    log.trail.write(entry("next"), keep=False)
    assert ids(log.path) == ["before", "gap", "a", "b", "next"]
    gap = written(log.path)[1]
    assert (gap["since"], gap["late"], gap["lost"], gap["actor"]) == (5.0, 2, 0, "hub")
    assert "could not be written (Is a directory): the next 2 lines are from then, and none are lost" in gap["reason"]
    assert verify_audit(log.path) is None
    assert not log.trail.waiting


def test_of_what_waits_too_long_refusals_are_lost_first_and_all_that_is_lost_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", 3)
    log = Trail(tmp_path)
    log.shut()
    refused = [entry(f"r{number}", "rejected") for number in range(4)]
    log.refuses(entry("a"), *refused, entry("b"), entry("c"), entry("d"))
    log.open()
    log.trail.write_late()
    assert ids(log.path) == ["gap", "b", "c", "d"], "what was carried out, the newest of it"
    assert (written(log.path)[0]["late"], written(log.path)[0]["lost"]) == (3, 5)
    log.shut()
    log.refuses(entry("e"))
    log.open()
    log.trail.write_late()
    assert (written(log.path)[4]["late"], written(log.path)[4]["lost"]) == (1, 0), "each gap tells of its own"
    assert log.trail.lost == 5


def test_of_entries_that_do_not_all_fit_none_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append(entry("a"))
    before, write = log.path.read_bytes(), os.write

    def only_some(handle: int, data: memoryview) -> int:
        if len(data) < 300:
            raise OSError(28, "No space left on device")
        return write(handle, data[:200])

    with monkeypatch.context() as patched:
        patched.setattr("trainctl.store.audit.os.write", only_some)
        with pytest.raises(OSError, match="No space left"):
            log.append(entry("b"), entry("c"), entry("d"))
    assert log.path.read_bytes() == before
    log.append(entry("b"), entry("c"))
    assert ids(log.path) == ["a", "b", "c"]
    assert verify_audit(log.path) is None


def test_a_hub_whose_log_cannot_be_written_writes_down_later_what_it_did_meanwhile(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    async def scenario() -> None:
        with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
            (run_dir / "audit.jsonl").mkdir()
            rank.step(5)
            async with peer_of(hub.card()) as peer:
                assert (await first_reply(peer, request(Pause(), "refused"))).state == "rejected"
                assert (await first_reply(peer, request(Abort(), "end"))).state == "accepted"
                given = await asyncio.to_thread(rank.hear, LinkCommand)
                rank.answer(given, "failed", reason="it does not fit")
                await snapshot_when(peer, lambda now: "failed" in [getattr(event, "state", "") for event in now.events])
                (run_dir / "audit.jsonl").rmdir()
                assert (await first_reply(peer, request(AddNote(text="room again"), "n"))).state == "accepted"
                told = of_the_log(await snapshot_when(peer, lambda now: len(of_the_log(now)) == 2))
                assert [event.severity for event in told] == ["error", "good"]
                assert "is written again; no entries are missing" in told[1].text

    asyncio.run(scenario())
    found = [(line["id"], line["state"]) for line in written(run_dir / "audit.jsonl")]
    late = [("", "gap"), ("refused", "rejected"), ("end", "accepted"), ("end", "failed")]
    assert found[:5] == [*late, ("n", "accepted")]
    assert verify_audit(run_dir / "audit.jsonl") is None


def of_the_log(now: Snapshot) -> list[Anomaly]:
    return [event for event in now.events if isinstance(event, Anomaly) and event.what == "audit"]


class Desk:
    """A desk of a hub that finds these outcomes in the journal."""

    def __init__(self, path: Path, *outcomes: CommandUpdate) -> None:
        record = RunRecord(info(path))
        for seq, update in enumerate(outcomes, start=1):
            record.apply(Envelope(source="t", epoch=1, stream="events", seq=seq, time=1.0, body=update))
        self.told: list[Anomaly] = []
        self.log = AuditLog(path / "audit.jsonl")
        self.desk = CommandDesk(
            recorder=SimpleNamespace(record=record, take=self.told.append),  # type: ignore[arg-type]
            server=SimpleNamespace(reply=lambda *_: None),  # type: ignore[arg-type]
            audit=self.log,
            run_dir=RunDir(path),
            line=SimpleNamespace(linked=False, send=lambda _: False),  # type: ignore[arg-type]
            endings=SimpleNamespace(),  # type: ignore[arg-type]
        )


def outcome(name: str, state: CommandState, at: float = 1.0) -> CommandUpdate:
    return CommandUpdate(
        time=at, step=3, incarnation=1, id=name, command="pause", args={}, actor="mk", state=state, reason="so"
    )


def test_what_a_hub_could_not_write_before_it_ended_the_next_one_finds_in_the_journal(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit.jsonl").append(entry("known"))

    async def scenario() -> None:
        hub = Desk(tmp_path, outcome("late", "failed", 3.0), outcome("known", "applied"), outcome("early", "rejected"))
        hub.desk.restore()
        hub.desk.tick(time.time())
        await hub.desk.close()

    asyncio.run(scenario())
    assert ids(tmp_path / "audit.jsonl") == ["known", "gap", "early", "late"]
    assert written(tmp_path / "audit.jsonl")[3]["reason"] == "so"
    assert "the hub before this one ended first" in written(tmp_path / "audit.jsonl")[1]["reason"]
    asyncio.run(scenario())
    assert len(ids(tmp_path / "audit.jsonl")) == 4, "and once"


def test_a_hub_that_ends_before_the_log_takes_lines_again_says_what_it_could_not_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> Desk:
        hub = Desk(tmp_path, outcome("never", "applied"))
        hub.desk.restore()
        (tmp_path / "audit.jsonl").mkdir()
        await hub.desk.close()
        return hub

    with caplog.at_level(logging.ERROR):
        hub = asyncio.run(scenario())
    assert '"id": "never"' in caplog.text
    assert [told.severity for told in hub.told] == ["error"]
