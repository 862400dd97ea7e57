"""Commands through a real hub: one outcome each, written down before it is accepted."""

import asyncio
import json
import os
import shutil
import time
from pathlib import Path

import msgspec
import pytest
from hub_double import Rank, first_reply, following, hub_running, peer_of, rank_linked, request, snapshot, snapshot_when

from trainctl.store.audit import AuditLog, verify_audit
from trainctl.store.replay import load_record
from trainctl.wire.commands import (
    Abort,
    AddNote,
    Cancel,
    CheckpointPin,
    CheckpointSave,
    Evaluate,
    LrScale,
    LrSet,
    Pause,
    Resume,
    Rollback,
    SetTunable,
    Stop,
)
from trainctl.wire.keys import new_keys
from trainctl.wire.manifest import Manifest, ManifestFile, hash_file, write_manifest
from trainctl.wire.messages import (
    Anomaly,
    AuditLines,
    AuditRequest,
    CommandQuery,
    CommandReply,
    CommandRequest,
    CommandUpdate,
    Envelope,
    LinkCancel,
    LinkCommand,
    Note,
    Reply,
    Snapshot,
    SnapshotRequest,
    Verified,
    VerifyRequest,
)
from trainctl.wire.paths import config_home
from trainctl.wire.peer import Peer, Refused
from waiting import until


async def ask(peer: Peer, asked: CommandRequest, into: "asyncio.Queue[CommandUpdate]") -> None:
    async for reply in peer.replies(asked, timeout_s=10.0):
        assert isinstance(reply, CommandReply)
        into.put_nowait(reply.update)


async def heard_by(rank: Rank, wanted: type) -> object:
    return await asyncio.to_thread(rank.hear, wanted)


def checkpoint(run_dir: Path, step: int, audit_head: str | None = None) -> str:
    name = f"step-{step:08d}-1"
    directory = run_dir / "checkpoints" / name
    directory.mkdir(parents=True)
    (directory / "model.bin").write_bytes(os.urandom(1000))
    size, digest = hash_file(directory / "model.bin")
    file = ManifestFile(name="model.bin", bytes=size, sha256=digest)
    made = Manifest(
        id=name,
        run="demo",
        step=step,
        incarnation=1,
        attempt=1,
        world_size=2,
        time=float(step),
        files=[file],
        audit_head=audit_head,
    )
    write_manifest(directory, made)
    return name


def updates_in(told: Snapshot) -> list[CommandUpdate]:
    return [event for event in told.events if isinstance(event, CommandUpdate)]


def audited(run_dir: Path) -> list[tuple[str, str]]:
    lines = (run_dir / "audit.jsonl").read_text().splitlines()
    return [(entry["id"], entry["state"]) for entry in map(json.loads, lines)]


def test_a_command_goes_to_rank_0_and_its_outcome_to_whoever_asked(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            rank.step(5)
            async with peer_of(hub.card()) as peer, following(peer) as heard:
                said: asyncio.Queue[CommandUpdate] = asyncio.Queue()
                asking = asyncio.create_task(ask(peer, request(LrScale(factor=0.5), "c1"), said))
                given = await heard_by(rank, LinkCommand)
                assert isinstance(given, LinkCommand)
                assert given.command.action == LrScale(factor=0.5)
                assert audited(tmp_path / "run") == [("c1", "accepted")], "written down before rank 0 hears of it"
                rank.answer(given, "scheduled")
                rank.answer(given, "applied", before=1.0, after=0.5, ranks=2)
                states = [(await asyncio.wait_for(said.get(), 10)).state for _ in range(3)]
                assert states == ["accepted", "scheduled", "applied"]
                await heard.until(
                    lambda item: (
                        isinstance(item, Envelope) and isinstance(item.body, CommandUpdate) and item.body.after == 0.5
                    )
                )
                asking.cancel()
                again = await first_reply(peer, request(LrScale(factor=0.5), "c1"))
                assert (again.state, again.after, again.step) == ("applied", 0.5, 7), "a repeat gets the first outcome"
                assert (await peer.ask(CommandQuery(req=0, id="c1"), CommandReply)).update == again
                with pytest.raises(Refused, match="no command has the id"):
                    await peer.ask(CommandQuery(req=0, id="c2"), CommandReply)
            rank.bye()
        assert audited(tmp_path / "run") == [("c1", "accepted"), ("c1", "applied")]
        assert verify_audit(tmp_path / "run" / "audit.jsonl") is None

    asyncio.run(scenario())


def test_what_cannot_be_meant_or_done_is_rejected_with_the_reason(tmp_path: Path) -> None:
    cases = [
        (LrSet(value=float("inf")), {}, "finite"),
        (LrScale(factor=0.5), {"condition": "loss <"}, "condition cannot be read"),
        (SetTunable(name="clip", value=99.0), {}, "out of range: it is at least 0.1 and at most 10"),
        (SetTunable(name="clip", value="high"), {}, "is a float"),
        (SetTunable(name="dropout", value=0.1), {}, "there are: clip"),
        (Evaluate(), {}, "no on_eval was given"),
        (Rollback(target="12"), {}, "there is no checkpoint 12"),
        (CheckpointPin(checkpoint="x"), {}, "there is no checkpoint x"),
        (Cancel(command="nope"), {}, "no command has the id nope"),
        (Pause(), {"revert_after": 5}, "cannot revert"),
        (AddNote(text="low"), {"condition": "step < 0"}, "note is carried out at once, and a condition is decided"),
    ]

    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            rank.step(5)
            async with peer_of(hub.card()) as peer:
                for number, (action, more, words) in enumerate(cases):
                    update = await first_reply(peer, request(action, f"bad-{number}", **more))
                    assert (update.state, words in str(update.reason)) == ("rejected", True), update

    asyncio.run(scenario())


def test_an_id_that_the_run_gives_itself_is_refused_and_stays_free_for_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            rank.step(5)
            async with peer_of(hub.card()) as peer:
                for taken in ("a.undo", "a.undo.2", "auto-resume-1", "preemption-1"):
                    with pytest.raises(Refused, match=f"{taken} is one of those that the run gives itself"):
                        await first_reply(peer, request(AddNote(text="mine"), taken))
                await first_reply(peer, request(LrScale(factor=0.5), "a", revert_after=9))
                given = await heard_by(rank, LinkCommand)
                assert isinstance(given, LinkCommand)
                undoing = msgspec.structs.replace(given.command, id="a.undo")
                rank.answer(msgspec.structs.replace(given, command=undoing), "applied")
                told = await snapshot_when(peer, lambda now: [u for u in updates_in(now) if u.id == "a.undo"])
                assert [u.state for u in updates_in(told) if u.id == "a.undo"] == ["applied"]
                again = await first_reply(peer, request(AddNote(text="mine"), "a.undo"))
                assert (again.command, again.state) == ("lr scale", "applied"), "it stands for the undoing"

    asyncio.run(scenario())


def test_without_rank_0_and_after_the_end_nothing_is_accepted(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub:
            async with peer_of(hub.card()) as peer:
                early = await first_reply(peer, request(Pause(), "early"))
                assert (early.state, "not connected" in str(early.reason)) == ("rejected", True)
                with rank_linked(tmp_path / "run") as rank:
                    rank.bye("finished")
                    update = await first_reply(peer, request(Stop(), "late"))
                    while "not connected" in str(update.reason):  # the goodbye may still be on its way
                        update = await first_reply(peer, request(Stop(), f"late-{time.monotonic_ns()}"))
                    assert (update.state, "the run is finished" in str(update.reason)) == ("rejected", True)

    asyncio.run(scenario())


def test_a_pending_command_of_a_rank_0_that_is_gone_is_unknown(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub:
            async with peer_of(hub.card()) as peer:
                with rank_linked(tmp_path / "run") as rank:
                    rank.step(5)
                    said: asyncio.Queue[CommandUpdate] = asyncio.Queue()
                    asking = asyncio.create_task(ask(peer, request(Pause(), "c1"), said))
                    await heard_by(rank, LinkCommand)
                    assert [update.id for update in (await snapshot(peer)).commands] == ["c1"]
                states = [(await asyncio.wait_for(said.get(), 10)).state for _ in range(2)]
                assert states == ["accepted", "unknown"]
                assert (await snapshot(peer)).commands == []
                asking.cancel()

    asyncio.run(scenario())


def test_what_was_never_scheduled_when_the_run_ended_was_not_applied(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            rank.step(5)
            async with peer_of(hub.card()) as peer:
                said: asyncio.Queue[CommandUpdate] = asyncio.Queue()
                asking = asyncio.create_task(ask(peer, request(Pause(), "c1"), said))
                await heard_by(rank, LinkCommand)
                rank.bye("finished")
                states = [(await asyncio.wait_for(said.get(), 10)).state for _ in range(2)]
                assert states == ["accepted", "expired"]
                asking.cancel()

    asyncio.run(scenario())


def test_an_accepted_command_outlives_the_hub_and_is_handed_over_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            rank.step(5)
            async with peer_of(hub.card()) as peer:
                assert (await first_reply(peer, request(LrScale(factor=0.5), "c1", revert_after=9))).state == "accepted"
            await heard_by(rank, LinkCommand)
            hub.kill()
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            again = await heard_by(rank, LinkCommand)
            assert isinstance(again, LinkCommand)
            assert (again.command.id, again.command.revert_after) == ("c1", 9)
            async with peer_of(hub.card()) as peer:
                said: asyncio.Queue[CommandUpdate] = asyncio.Queue()
                asking = asyncio.create_task(ask(peer, request(LrScale(factor=0.5), "c1"), said))
                assert (await asyncio.wait_for(said.get(), 10)).state == "accepted"
                rank.answer(again, "applied")
                assert (await asyncio.wait_for(said.get(), 10)).state == "applied"
                asking.cancel()

    asyncio.run(scenario())


def test_expiry_and_cancel_ask_rank_0_to_withdraw(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            rank.step(5)
            async with peer_of(hub.card()) as peer:
                await first_reply(peer, request(Pause(), "soon", expires_s=0.1))
                soon = await heard_by(rank, LinkCommand)
                assert isinstance(soon, LinkCommand)
                assert await heard_by(rank, LinkCancel) == LinkCancel(id="soon", actor="hub")
                rank.answer(soon, "expired", reason="not scheduled in time")

                await first_reply(peer, request(Resume(), "later"))
                later = await heard_by(rank, LinkCommand)
                assert isinstance(later, LinkCommand)
                said: asyncio.Queue[CommandUpdate] = asyncio.Queue()
                asking = asyncio.create_task(ask(peer, request(Cancel(command="later"), "take-back"), said))
                cancel = await heard_by(rank, LinkCancel)
                assert isinstance(cancel, LinkCancel)
                assert cancel.id == "later"
                rank.answer(later, "rejected", reason=f"cancelled by {cancel.actor}")
                states = [(await asyncio.wait_for(said.get(), 10)).state for _ in range(2)]
                assert states == ["accepted", "applied"]
                asking.cancel()

    asyncio.run(scenario())


def test_a_cancel_that_was_lost_with_the_link_is_sent_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    async def scenario() -> None:
        with hub_running(run_dir) as hub:
            async with peer_of(hub.card()) as peer:
                with rank_linked(run_dir) as rank:
                    rank.step(5)
                    for name in ("kept", "taken"):
                        assert (
                            await first_reply(
                                peer,
                                request(
                                    LrScale(factor=0.5) if name == "kept" else SetTunable(name="clip", value=2.0), name
                                ),
                            )
                        ).state == "accepted"
                    cancel = request(Cancel(command="taken"), "take-back")
                    assert (await first_reply(peer, cancel)).state == "accepted"
                with rank_linked(run_dir) as rank:
                    given = [await heard_by(rank, LinkCommand) for _ in range(2)]
                    withdrawn = await heard_by(rank, LinkCancel)
                    assert isinstance(withdrawn, LinkCancel)
                    assert (withdrawn.id, withdrawn.superseded_by) == ("taken", None)
                    again = given[1]
                    assert isinstance(again, LinkCommand)
                    rank.answer(again, "rejected", reason=f"cancelled by {withdrawn.actor}")
                    outcome = await snapshot_when(
                        peer, lambda now: [u for u in updates_in(now) if u.state == "applied"]
                    )
                    assert [u.id for u in updates_in(outcome) if u.state == "applied"] == ["take-back"]

    asyncio.run(scenario())


def test_a_newer_setting_supersedes_the_one_that_waits_and_nothing_follows_a_stop(tmp_path: Path) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            rank.step(5)
            async with peer_of(hub.card()) as peer:
                assert (
                    await first_reply(peer, request(SetTunable(name="clip", value=2.0), "first"))
                ).state == "accepted"
                first = await heard_by(rank, LinkCommand)
                assert isinstance(first, LinkCommand)
                assert (
                    await first_reply(peer, request(SetTunable(name="clip", value=3.0), "second"))
                ).state == "accepted"
                cancel = await heard_by(rank, LinkCancel)
                assert isinstance(cancel, LinkCancel)
                assert (cancel.id, cancel.superseded_by) == ("first", "second")
                rank.answer(first, "superseded", reason="second took its place")
                assert (await first_reply(peer, request(Stop(), "stop"))).state == "accepted"
                refused = await first_reply(peer, request(Pause(), "too-late"))
                assert (refused.state, "the run is ending" in str(refused.reason)) == ("conflict", True)

    asyncio.run(scenario())


def test_of_two_operators_who_change_the_same_at_once_one_wins_and_the_other_sees_who_and_what(tmp_path: Path) -> None:
    jo = new_keys()
    config_home().mkdir(mode=0o700, exist_ok=True)
    (config_home() / "grants.json").write_text(json.dumps([{"name": "jo", "key": jo.public, "role": "operator"}]))

    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            rank.step(5)
            async with peer_of(hub.card()) as mine, peer_of(hub.card(), keys=jo) as theirs:
                won = await first_reply(theirs, request(LrScale(factor=0.5), "jos"))
                lost = await first_reply(mine, request(LrSet(value=1e-4), "mine"))
                assert (won.state, lost.state) == ("accepted", "conflict")
                assert str(lost.reason).startswith("jo's lr scale (jos) is accepted and changes the same")
                other = await first_reply(mine, request(SetTunable(name="clip", value=2.0), "other"))
                assert other.state == "accepted", "what they do not both change"
                given = await heard_by(rank, LinkCommand)
                assert isinstance(given, LinkCommand)
                assert (given.command.id, given.actor) == ("jos", "jo")
                rank.answer(given, "applied")
                await snapshot_when(mine, lambda now: [u for u in updates_in(now) if u.state == "applied"])
                assert (await first_reply(mine, request(LrSet(value=1e-4), "again"))).state == "accepted"
        assert audited(tmp_path / "run")[:2] == [("jos", "accepted"), ("mine", "conflict")]

    asyncio.run(scenario())


def test_notes_pins_and_verification_need_no_rank(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    good, bad = checkpoint(run_dir, 10), checkpoint(run_dir, 20)
    data = bytearray((run_dir / "checkpoints" / bad / "model.bin").read_bytes())
    data[500] ^= 1
    (run_dir / "checkpoints" / bad / "model.bin").write_bytes(data)

    async def scenario() -> None:
        with hub_running(run_dir) as hub:
            async with peer_of(hub.card()) as peer, following(peer) as heard:
                assert (await first_reply(peer, request(AddNote(text="hm"), "n1"))).state == "accepted"
                await heard.until(
                    lambda item: isinstance(item, Envelope) and isinstance(item.body, Note) and item.body.text == "hm"
                )
                await first_reply(peer, request(CheckpointPin(checkpoint=good), "p1"))
                assert (await peer.ask(VerifyRequest(req=0, id="10"), Verified)).ok
                damaged = await peer.ask(VerifyRequest(req=0, id=bad), Verified)
                assert (damaged.ok, "is damaged" in damaged.text) == (False, True)
                found = await snapshot(peer)
                assert [(info.step, info.pinned, info.verified) for info in found.checkpoints] == [
                    (10, True, True),
                    (20, False, False),
                ]
                with pytest.raises(Refused, match="no checkpoint"):
                    await peer.ask(VerifyRequest(req=0, id="../../etc"), Verified)
                lines = (await peer.ask(AuditRequest(req=0), AuditLines)).lines
                assert {json.loads(line)["id"] for line in lines} == {"n1", "p1"}

    asyncio.run(scenario())


def test_a_log_that_cannot_be_written_leaves_only_saving_and_ending(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    async def scenario() -> None:
        with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
            (run_dir / "audit.jsonl").mkdir()  # refuses writing to root too, as no mode does
            rank.step(5)
            async with peer_of(hub.card()) as peer:
                refused = await first_reply(peer, request(Pause(), "c1"))
                assert (refused.state, "audit log cannot be written" in str(refused.reason)) == ("rejected", True)
                for name, action in (("c2", CheckpointSave()), ("c3", Abort())):
                    assert (await first_reply(peer, request(action, name))).state == "accepted"
                    heard = await heard_by(rank, LinkCommand)
                    assert isinstance(heard, LinkCommand)
                    assert heard.command.id == name
                told = [event for event in (await snapshot(peer)).events if isinstance(event, Anomaly)]
                assert [event.what for event in told] == ["audit"]

    asyncio.run(scenario())


FAILING_FSYNC = """
import errno, os
honest = os.fsync
def fsync(handle):
    if os.readlink(f"/proc/self/fd/{handle}").endswith("/audit.jsonl"):
        raise OSError(errno.EIO, "the disk does not sync")
    honest(handle)
os.fsync = fsync
"""


def test_nothing_is_accepted_on_the_strength_of_a_line_that_is_not_synced(tmp_path: Path) -> None:
    run_dir, site = tmp_path / "run", tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(FAILING_FSYNC)

    async def scenario() -> None:
        with hub_running(run_dir, env={"PYTHONPATH": str(site)}) as hub, rank_linked(run_dir) as rank:
            rank.step(5)
            async with peer_of(hub.card()) as peer:
                refused = await first_reply(peer, request(Pause(), "c1"))
                assert refused.state == "rejected", "so it is answered after the sync, and on condition of it"
                assert "the audit log cannot be written (the disk does not sync)" in str(refused.reason)
        # That it was rejected may be there, unsynced: the hub is killed at the end, whatever it is at.
        assert '"state":"accepted"' not in (run_dir / "audit.jsonl").read_text(), "and nothing of it is in the log"

    asyncio.run(scenario())


def test_an_id_of_long_ago_is_not_carried_out_again(tmp_path: Path) -> None:
    run_dir, site = tmp_path / "run", tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import trainctl.store.record as record; record.SETTLED_COMMANDS_KEPT = 2")

    async def scenario() -> None:
        with hub_running(run_dir, env={"PYTHONPATH": str(site)}) as hub:
            async with peer_of(hub.card()) as peer, following(peer) as heard:
                for number in range(4):
                    text = f"note {number}"
                    await first_reply(peer, request(AddNote(text=text), f"n{number}"))
                    await heard.until(
                        lambda item, text=text: (
                            isinstance(item, Envelope) and isinstance(item.body, Note) and item.body.text == text
                        )
                    )
                assert (await first_reply(peer, request(AddNote(text="again"), "n3"))).after == "note 3", "as it ended"
                with pytest.raises(Refused, match="n0 was used before"):
                    await first_reply(peer, request(AddNote(text="again"), "n0"))
        assert [name for name, _ in audited(run_dir)].count("n0") == 2, "its own two lines"

    asyncio.run(scenario())


def test_a_cut_log_is_found_by_the_hub_whatever_the_asker_can_see(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    log = AuditLog(run_dir / "audit.jsonl")
    run_dir.mkdir()
    for number in range(5):
        log.append({"time": 1.0, "id": f"c{number}", "state": "accepted"})
    checkpoint(run_dir, 20, audit_head=log.head)

    async def scenario() -> None:
        with hub_running(run_dir) as hub:
            async with peer_of(hub.card()) as peer:
                whole = await peer.ask(AuditRequest(req=0, limit=1, verify=True), AuditLines)
                assert (len(whole.lines), whole.checked, whole.problem) == (1, 5, None)
                lines = log.path.read_text().splitlines(keepends=True)
                log.path.write_text("".join(lines[:3]))
                cut = await peer.ask(AuditRequest(req=0, limit=0, verify=True), AuditLines)
                assert (cut.lines, cut.checked) == ([], 3)
                assert "checkpoint step-00000020-1 keeps the hash of a line that is not here" in str(cut.problem)
                assert (await peer.ask(AuditRequest(req=0), AuditLines)).checked is None, "only when asked for"

    asyncio.run(scenario())


def test_a_line_that_the_hub_itself_wrote_is_missed_at_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    async def scenario() -> None:
        with hub_running(run_dir) as hub:
            async with peer_of(hub.card()) as peer:
                await first_reply(peer, request(AddNote(text="hm"), "n"))
                await asyncio.to_thread(until, lambda: len(audited(run_dir)) == 2)
                ask = AuditRequest(req=0, verify=True)
                assert (await peer.ask(ask, AuditLines)).problem is None
                lines = (run_dir / "audit.jsonl").read_text().splitlines(keepends=True)
                (run_dir / "audit.jsonl").write_text(lines[0])
                cut = await peer.ask(ask, AuditLines)
                assert "line 2 is missing: its hub knows the hash of a line that is not here" in str(cut.problem)

    asyncio.run(scenario())


def test_a_run_directory_that_cannot_be_written_costs_the_record_and_nothing_else(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.write_text("not a directory: refuses root too, as no mode does")

    async def scenario() -> None:
        with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
            rank.step(5)
            async with peer_of(hub.card()) as peer:
                found: Reply = await peer.ask(SnapshotRequest(req=0), Snapshot)
                assert isinstance(found, Snapshot)
                told = [event for event in found.events if isinstance(event, Anomaly)]
                assert [event.what for event in told] == ["journal"]
                assert "training goes on" in told[0].text
                assert (await first_reply(peer, request(Pause(), "c1"))).state == "rejected"
                assert (await first_reply(peer, request(Stop(), "c2"))).state == "accepted"
                run_dir.unlink()  # made writable: everything so far is written after all
                rank.record(update_of_nothing())

                async with following(peer) as heard:
                    await heard.until(
                        lambda item: (
                            isinstance(item, Envelope)
                            and isinstance(item.body, Anomaly)
                            and item.body.severity == "good"
                        ),
                        timeout_s=15,
                    )
            rank.bye()
        record = load_record(run_dir)
        assert any(isinstance(event, Note) and event.text == "kept" for event in record.events)

    asyncio.run(scenario())


def test_a_run_directory_that_is_deleted_is_made_anew_and_the_loss_is_told(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    async def scenario() -> None:
        with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
            rank.step(5)
            async with peer_of(hub.card()) as peer, following(peer) as heard:
                await asyncio.to_thread(shutil.rmtree, run_dir)
                for severity in ("error", "good"):
                    told = await heard.until(
                        lambda item, severity=severity: (
                            isinstance(item, Envelope)
                            and isinstance(item.body, Anomaly)
                            and item.body.severity == severity
                        ),
                        timeout_s=15,
                    )
                assert isinstance(told, Envelope)
                assert "2 messages are missing" in told.body.text  # type: ignore[union-attr]
            rank.record(update_of_nothing())
            await asyncio.to_thread(
                until, lambda: any(isinstance(event, Note) for event in load_record(run_dir).events)
            )

    asyncio.run(scenario())


def update_of_nothing() -> Note:
    return Note(time=1.0, step=5, incarnation=1, actor="ann", text="kept")
