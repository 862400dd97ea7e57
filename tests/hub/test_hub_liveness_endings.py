"""`abort --now` and `restart` at a real hub, with a real agent and real processes that pose as ranks."""

import asyncio
import errno
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import hub_double
import msgspec
import pytest
from hub_double import RUN, following, hub_running, peer_of, rank_linked, request, snapshot, snapshot_when

from trainctl.wire import launcher as launcher_module
from trainctl.wire.cards import read_cards
from trainctl.wire.commands import FINAL_COMMAND_STATES, Abort, Action, EndRanks, Restart
from trainctl.wire.endings import is_ended
from trainctl.wire.launcher import (
    EndRequest,
    announce,
    drop_request,
    find_launchers,
    request_ending,
    take_request,
    wait_until_taken,
    withdraw,
)
from trainctl.wire.messages import CommandReply, CommandUpdate, LinkAgents, Note, RankPlace, SourceAddress
from trainctl.wire.peer import Peer
from trainctl.wire.places import Place, place_file, process_started, read_places, write_place
from waiting import until


@contextmanager
def two_ranks(monkeypatch: pytest.MonkeyPatch, *, known: int = 2) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that the run names as its ranks, of which the agent can know the first `known`."""
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    node = subprocess.check_output(["uname", "-n"], text=True).strip()
    for rank, process in enumerate(processes[:known]):
        began = process_started(process.pid)
        write_place(
            Place(run_id=RUN, run="demo", rank=rank, local_rank=rank, pid=process.pid, started=began, attempt=1)
        )
    places = [RankPlace(rank=rank, node=node, pid=process.pid) for rank, process in enumerate(processes)]
    unplaced = hub_double.info
    monkeypatch.setattr(
        hub_double, "info", lambda *given, **more: msgspec.structs.replace(unplaced(*given, **more), ranks=places)
    )
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait(10)


@contextmanager
def node_agent() -> Iterator[SourceAddress]:
    command = [sys.executable, "-P", "-m", "trainctl.agent", "--job", RUN, "--interval", "0.2", "--no-gpus"]
    process = subprocess.Popen([*command, "--bind", "127.0.0.1"], stderr=subprocess.DEVNULL)
    try:
        card = until(lambda: next((card for card in read_cards() if card.pid == process.pid), None), 15)
        assert card is not None
        yield SourceAddress(node=card.host, addresses=card.addresses, server_key=card.server_key, source=card.source)
    finally:
        process.terminate()
        process.wait(10)


@asynccontextmanager
async def hub_with(tmp_path: Path, agent: SourceAddress | None) -> AsyncIterator[Peer]:
    run_dir = tmp_path / "run"
    with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
        rank.step(7)
        if agent is not None:
            rank.say(LinkAgents(agents=[agent]))
        async with peer_of(hub.card()) as peer:
            if agent is not None:
                await snapshot_when(peer, lambda found: found.nodes and found.state.state == "running")
            yield peer


async def outcome(peer: Peer, action: Action, **more: object) -> CommandUpdate:
    async for reply in peer.replies(request(action, "c-1", **more), timeout_s=30.0):
        assert isinstance(reply, CommandReply)
        if reply.update.state in FINAL_COMMAND_STATES:
            return reply.update
    raise AssertionError("no outcome")


def test_every_rank_is_ended_and_the_run_is_stopped_by_who_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(agent: SourceAddress, ranks: list[subprocess.Popen[bytes]]) -> None:
        async with hub_with(tmp_path, agent) as peer:
            update = await outcome(peer, Abort(now=True))
            assert (update.state, update.ranks, update.after) == ("applied", 2, f"2 ranks on {agent.node}")
            assert [rank.wait(5) for rank in ranks] == [-15, -15]
            state = (await snapshot(peer)).state
            assert (state.state, state.reason) == ("stopped", f"aborted by {update.actor}")
            again = await outcome(peer, Abort(now=True))
            assert again == update, "the same id is the same command"

    with two_ranks(monkeypatch) as ranks, node_agent() as agent:
        asyncio.run(scenario(agent, ranks))


@pytest.mark.parametrize(
    ("last", "at", "state"),
    [
        ("preempted", 7, "stopped"),
        ("failed", 7, "stopped"),
        ("finished", 7, "stopped"),
        ("finished", 500, "finished"),
    ],
)
def test_the_last_word_of_a_rank_0_that_knows_of_no_operator_does_not_count(
    last: str, at: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A paused rank takes SIGTERM for the machine's end, and a script's own handler may raise, or exit with 0."""
    run_dir = tmp_path / "run"

    async def scenario(agent: SourceAddress) -> None:
        with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
            rank.step(7, "paused")
            rank.say(LinkAgents(agents=[agent]))
            async with peer_of(hub.card()) as peer, following(peer) as heard:
                await snapshot_when(peer, lambda found: found.nodes and found.state.state == "paused")
                assert not is_ended(run_dir, 1)
                update = await outcome(peer, Abort(now=True))
                assert (update.state, is_ended(run_dir, 1)) == ("applied", True)
                rank.bye(last, at)
                rank.record(Note(time=0.0, step=at, incarnation=1, actor="", text="behind the last word"))
                await heard.until(lambda item: isinstance(getattr(item, "body", None), Note))
                assert (await snapshot(peer)).state.state == state

    with two_ranks(monkeypatch), node_agent() as agent:
        asyncio.run(scenario(agent))


def test_a_rank_that_the_agent_does_not_know_is_left_alone_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(agent: SourceAddress, ranks: list[subprocess.Popen[bytes]]) -> None:
        async with hub_with(tmp_path, agent) as peer:
            update = await outcome(peer, Abort(now=True))
            assert (update.state, update.ranks) == ("failed", 1)
            assert update.reason is not None
            assert f"rank 1 (pid {ranks[1].pid}) is not known to the agent" in update.reason
            assert ranks[0].wait(5) == -15
            assert ranks[1].poll() is None

    with two_ranks(monkeypatch, known=1) as ranks, node_agent() as agent:
        asyncio.run(scenario(agent, ranks))


def test_a_rank_that_left_by_itself_before_the_agent_was_asked_is_ended_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two `trainctl run` one ends its ranks first, and scripts of the other's may close their run for that."""

    async def scenario(agent: SourceAddress, ranks: list[subprocess.Popen[bytes]]) -> None:
        async with hub_with(tmp_path, agent) as peer:
            await snapshot_when(peer, lambda found: len(found.nodes[0].processes) == 2)
            (goodbye,) = (place_file(place) for place in read_places() if place.rank == 1)
            goodbye.unlink()
            ranks[1].kill()
            ranks[1].wait(10)
            update = await outcome(peer, Abort(now=True))
            assert (update.state, update.ranks, update.after) == ("applied", 2, f"2 ranks on {agent.node}")

    with two_ranks(monkeypatch) as ranks, node_agent() as agent:
        asyncio.run(scenario(agent, ranks))


def test_without_an_agent_nothing_is_ended_though_the_ranks_are_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(ranks: list[subprocess.Popen[bytes]]) -> None:
        async with hub_with(tmp_path, None) as peer:
            update = await outcome(peer, Abort(now=True))
            assert update.state == "failed"
            assert update.reason is not None
            assert "its agent does not answer" in update.reason
            assert "nothing was changed" in update.reason
            assert [rank.poll() for rank in ranks] == [None, None]
            assert (await snapshot(peer)).state.state != "stopped"

    with two_ranks(monkeypatch) as ranks:
        asyncio.run(scenario(ranks))


def test_a_restart_tells_the_launcher_first_and_waits_for_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    async def scenario(agent: SourceAddress, ranks: list[subprocess.Popen[bytes]]) -> None:
        async with hub_with(tmp_path, agent) as peer:
            refused = await peer.ask(request(Restart(), "c-0"), CommandReply)
            assert refused.update.state == "rejected"
            assert "nothing would start the next attempt" in (refused.update.reason or "")
            launcher = announce(run_dir)
            assert find_launchers(run_dir) == [launcher]
            asking = asyncio.create_task(outcome(peer, Restart()))
            taken = await asyncio.to_thread(until, lambda: take_request(run_dir), 10)
            assert taken is not None
            assert (taken.what, taken.target, taken.command, taken.attempt) == ("restart", "last", "c-1", 1)
            update = await asking
            assert (update.state, update.ranks) == ("applied", 2)
            state = (await snapshot(peer)).state
            assert (state.state, state.reason) == ("starting", f"restarting from last by {update.actor}")
            with rank_linked(run_dir, attempt=2) as second:
                second.step(1, attempt=2)
                found = await snapshot_when(peer, lambda found: found.state.state == "running")
                assert (found.state.attempt, found.info.id) == (2, RUN)
            withdraw(run_dir, launcher)
            assert find_launchers(run_dir) == []

    with two_ranks(monkeypatch) as ranks, node_agent() as agent:
        asyncio.run(scenario(agent, ranks))


def test_a_launcher_that_does_not_take_the_request_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    async def scenario(agent: SourceAddress, ranks: list[subprocess.Popen[bytes]]) -> None:
        async with hub_with(tmp_path, agent) as peer:
            announce(run_dir)
            update = await outcome(peer, Restart())
            assert update.state == "failed"
            assert "did not take the request" in (update.reason or "")
            assert [rank.poll() for rank in ranks] == [None, None]
            assert take_request(run_dir) is None
            assert not is_ended(run_dir, 1), "the ranks' next SIGTERM is not an operator's"
            assert (await snapshot(peer)).state.state == "running"

    with two_ranks(monkeypatch) as ranks, node_agent() as agent:
        asyncio.run(scenario(agent, ranks))


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_abort_now_ends_the_ranks_where_the_runs_directory_takes_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "audit.jsonl").mkdir(parents=True)  # these refuse writing to root too, as no mode does
    announce(run_dir)
    if not told:
        (wish,) = (folder / "ending.json" for folder in (run_dir / "launchers").iterdir())
        wish.mkdir()

    async def scenario(agent: SourceAddress, ranks: list[subprocess.Popen[bytes]]) -> None:
        async with hub_with(tmp_path, agent) as peer:
            update = await outcome(peer, Abort(now=True))
            assert (update.state, update.ranks) == ("applied", 2)
            assert ("trainctl run cannot be told" in str(update.after)) is not told, "then it may start them again"
            assert [rank.wait(5) for rank in ranks] == [-15, -15]
            assert (await snapshot(peer)).state.state == "stopped"
            assert (take_request(run_dir) is not None) is told

    with two_ranks(monkeypatch) as ranks, node_agent() as agent:
        asyncio.run(scenario(agent, ranks))


@contextmanager
def another_launcher(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that starts attempts of the run, as on another node; it prints the wish it took."""
    script = """
import pathlib, sys, time
from trainctl.wire.launcher import announce, take_request
directory = pathlib.Path(sys.argv[1])
announce(directory)
print("ready", flush=True)
while (wish := take_request(directory)) is None:
    time.sleep(0.02)
print(wish.what, wish.target, flush=True)
sys.stdin.readline()
"""
    command = [sys.executable, "-P", "-c", script, str(run_dir)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_every_nodes_launcher_hears_of_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    async def scenario(agent: SourceAddress, other: subprocess.Popen[str]) -> None:
        async with hub_with(tmp_path, agent) as peer:
            asking = asyncio.create_task(outcome(peer, Restart()))
            taken = await asyncio.to_thread(until, lambda: take_request(run_dir), 10)
            assert (taken.what, taken.target) == ("restart", "last")
            assert other.stdout is not None
            assert await asyncio.to_thread(other.stdout.readline) == "restart last\n"
            assert (await asking).state == "applied"

    announce(run_dir)
    with two_ranks(monkeypatch), node_agent() as agent, another_launcher(run_dir) as other:
        assert len(find_launchers(run_dir)) == 2
        asyncio.run(scenario(agent, other))


def test_a_wish_is_taken_back_from_all_or_from_none(tmp_path: Path) -> None:
    ours = announce(tmp_path)
    wish = EndRequest(what="restart", command="c1", actor="mk", attempt=2)
    with another_launcher(tmp_path) as other:
        told = request_ending(tmp_path, wish)
        assert len(told) == 2
        assert other.stdout is not None
        assert other.stdout.readline() == "restart last\n"
        assert not wait_until_taken(told, 0.0)
        assert not drop_request(told)
        assert take_request(tmp_path) == wish, "the slower one must not be left behind"
        assert wait_until_taken(told, 0.0)
        other.kill()
        other.wait(10)
        assert find_launchers(tmp_path) == [ours], "one that is dead would start nothing"
        assert drop_request(request_ending(tmp_path, wish))
        assert take_request(tmp_path) is None


def test_of_a_node_that_was_lost_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "lost")
    announce(tmp_path)
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    ours = announce(tmp_path)
    assert {launcher.host for launcher in find_launchers(tmp_path)} == {"lost", "here"}, "who could tell from here"
    wish = EndRequest(what="restart", command="c1", actor="mk", attempt=2)
    assert len(request_ending(tmp_path, wish, {"here"})) == 1
    assert take_request(tmp_path) == wish
    assert len(request_ending(tmp_path, wish, {"n0"})) == 2, "nodes by other names: rather one too many"
    withdraw(tmp_path, ours)
    assert [launcher.host for launcher in find_launchers(tmp_path)] == ["lost"]


def test_a_disk_that_has_filled_up_still_takes_a_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wish = EndRequest(what="abort", command="c1", actor="mk", attempt=2)
    alone = announce(tmp_path)
    monkeypatch.setattr(launcher_module, "write_atomic", full)
    request_ending(tmp_path, wish)
    assert take_request(tmp_path) == wish
    with pytest.raises(OSError, match="No space left"):
        request_ending(tmp_path, wish)
    assert take_request(tmp_path) is None
    withdraw(tmp_path, alone)
    assert list(tmp_path.iterdir()) == []


def full(_path: Path, _data: bytes) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("action", "more", "why"),
    [
        (Abort(now=True), {"condition": "step > 5"}, "a condition is decided by rank 0 at a boundary"),
        (EndRanks(run=RUN, attempt=1, grace_s=1.0), {}, "use abort --now or restart"),
        (Restart(target="12"), {}, "there is no checkpoint 12"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Action, more: dict[str, object], why: str
) -> None:
    async def scenario(ranks: list[subprocess.Popen[bytes]]) -> None:
        async with hub_with(tmp_path, None) as peer:
            announce(tmp_path / "run")
            update = await outcome(peer, action, **more)
            assert update.state == "rejected"
            assert why in (update.reason or "")
            assert [rank.poll() for rank in ranks] == [None, None]

    with two_ranks(monkeypatch) as ranks:
        asyncio.run(scenario(ranks))
