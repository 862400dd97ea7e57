"""Whether a hub may still write, by what the run's directory says, and while it says nothing."""

import asyncio
import contextlib
import errno
import json
from pathlib import Path

import pytest
from hub_double import first_reply, hub_running, peer_of, rank_linked, request

from trainctl.hub.ownership import Ownership
from trainctl.store.audit import AuditLog, verify_audit
from trainctl.wire.commands import AddNote, Pause
from trainctl.wire.messages import LinkCommand
from trainctl.wire.peer import PeerError
from trainctl.wire.rundir import RunDir


def test_while_the_directory_does_not_say_who_owns_it_history_goes_on_and_nothing_is_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    run.create()
    ours = Ownership(run)

    def silent(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(RunDir, "newest", silent)
    assert not ours.held(look=True), "a newer hub may have packed what we would pack"
    assert ours.held(), "what is appended goes into a segment of our own"
    monkeypatch.undo()
    assert ours.held(look=True)
    run.allocate("epoch")
    assert not ours.held(look=True)
    assert not ours.held(), "for good"


def test_a_hub_that_was_superseded_writes_nothing_into_the_audit_log(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")

    async def scenario() -> None:
        with hub_running(run.path) as old, rank_linked(run.path) as rank:
            rank.step(5)
            async with peer_of(old.card()) as peer:
                assert (await first_reply(peer, request(Pause(), "before"))).state == "accepted"
                given = await asyncio.to_thread(rank.hear, LinkCommand)
                # A hub on another machine, before this one has looked.
                run.allocate("epoch")
                AuditLog(run.audit_file).append({"id": "of the newer", "state": "accepted"})
                with contextlib.suppress(OSError):  # on a busy machine it has left already
                    rank.answer(given, "applied")
                asking = asyncio.create_task(first_reply(peer, request(AddNote(text="too late"), "after")))
                assert await asyncio.to_thread(old.process.wait, 15) == 0
                asking.cancel()
                (answer,) = await asyncio.gather(asking, return_exceptions=True)
                assert isinstance(answer, asyncio.CancelledError | PeerError), "whoever asked asks the newer one"

    asyncio.run(scenario())
    lines = [json.loads(line) for line in run.audit_file.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["before", "of the newer"]
    assert verify_audit(run.audit_file) is None
