"""An agent ends the ranks of one attempt when a hub asks: those that are proved to be them, and nothing else."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from agent_process import Agent, Rank, agent, ranks

from trainctl.agent.departed import REMEMBERED, Departed
from trainctl.agent.endings import NotOurs, open_rank
from trainctl.agent.rank_watch import how_it_ended, process_usage
from trainctl.wire.commands import Abort, Act, Command, EndRanks, Stop
from trainctl.wire.keys import new_keys, source_keys
from trainctl.wire.messages import CommandRequest, EndedRank, RanksEnded
from trainctl.wire.peer import KeyRefused, Peer, Refused
from trainctl.wire.places import Place, has_ended, process_started, write_place
from waiting import until

QUICK = ("--interval", "0.2", "--no-gpus")


def ask(running: Agent, action: Act) -> RanksEnded:
    async def asking() -> RanksEnded:
        peer = await running.connect()
        try:
            return await peer.ask(CommandRequest(req=0, command=Command(id="c-1", action=action)), RanksEnded)  # type: ignore[arg-type]
        finally:
            peer.close()

    return asyncio.run(asking())


def end(running: Agent, *, run: str = "job-1", attempt: int = 1, grace_s: float = 5.0) -> dict[int, EndedRank]:
    return {rank.rank: rank for rank in ask(running, EndRanks(run=run, attempt=attempt, grace_s=grace_s)).ranks}


def deaf(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A process that does not heed SIGTERM."""
    ready = tmp_path / "deaf"
    code = "import signal, sys, pathlib; signal.signal(15, signal.SIG_IGN); pathlib.Path(sys.argv[1]).touch()"
    process = subprocess.Popen([sys.executable, "-c", f"{code}; signal.pause()", str(ready)])
    until(ready.exists, what="it is deaf")
    return process


def place_of(pid: int, *, run: str = "job-1", rank: int = 0, started: float | None = None) -> Place:
    began = process_started(pid) if started is None else started
    return Place(run_id=run, run="test", rank=rank, local_rank=rank, pid=pid, started=began, attempt=1)


def test_ranks_end_by_sigterm_a_stopped_one_too(tmp_path: Path) -> None:
    with ranks(2) as started, agent(tmp_path, *QUICK) as running:
        started[1].process.send_signal(signal.SIGSTOP)
        ended = end(running, grace_s=30.0)
        assert {rank: found.how for rank, found in ended.items()} == {0: "SIGTERM", 1: "SIGTERM"}
        assert [rank.process.wait(5) for rank in started] == [-signal.SIGTERM, -signal.SIGTERM]


def test_what_does_not_heed_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    process = deaf(tmp_path)
    try:
        write_place(place_of(process.pid))
        with agent(tmp_path, *QUICK) as running:
            assert end(running, grace_s=0.3)[0].how == "SIGKILL"
            assert process.wait(5) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait(5)


def test_a_process_that_took_over_a_ranks_pid_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as bystander:
        write_place(place_of(bystander.pid, started=1.0))
        with agent(tmp_path, *QUICK) as running:
            assert end(running)[0].how == "gone"
        assert bystander.poll() is None
        bystander.kill()


def test_other_runs_and_other_attempts_on_the_node_are_left_alone(tmp_path: Path) -> None:
    other = Rank(job="other-run", environment={"SLURM_JOB_ID": "4711"})
    mine = Rank(job="my-run", environment={"SLURM_JOB_ID": "4711"})
    try:
        with agent(tmp_path, *QUICK, job="4711") as running:
            assert end(running, run="my-run", attempt=2) == {}
            assert end(running, run="my-run").keys() == {0}
        assert mine.process.wait(5) == -signal.SIGTERM
        assert other.process.poll() is None
    finally:
        other.end_well()
        mine.end_well()


def test_a_process_of_another_user_is_not_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks(1) as (rank,):
        monkeypatch.setattr(os, "getuid", lambda: rank.process.pid)
        with pytest.raises(NotOurs, match="belongs to user"):
            open_rank(rank.place)


def test_a_rank_that_is_gone_needs_no_signal(tmp_path: Path) -> None:
    with ranks(1) as (rank,):
        rank.reap()
        assert open_rank(rank.place) is None
        with agent(tmp_path, *QUICK) as running:
            assert end(running) == {0: EndedRank(rank=0, pid=rank.place.pid, how="gone")}


def test_a_rank_that_left_before_the_agent_was_asked_is_not_unknown(tmp_path: Path) -> None:
    """As one does whose script catches the error of a collective that the ranks of another node have left."""
    with ranks(3) as (gone, leaving, stays), agent(tmp_path, *QUICK) as running:
        running.reads(lambda reading: len(reading.processes) == 3)
        gone.end_well()
        leaving.file.unlink()
        running.reads(lambda reading: len(reading.processes) == 1)
        assert end(running, attempt=2) == {}
        ended = {rank: found.how for rank, found in end(running).items()}
        assert ended == {0: "gone", 1: "SIGTERM", 2: "SIGTERM"}
        assert [rank.process.wait(5) for rank in (leaving, stays)] == [-signal.SIGTERM, -signal.SIGTERM]


@pytest.mark.parametrize(("run", "attempt"), [("second-run", 1), ("first-run", 2)], ids=["run", "attempt"])
def test_a_process_that_is_done_with_a_run_is_a_rank_of_the_next(tmp_path: Path, run: str, attempt: int) -> None:
    rank = Rank(job="first-run", environment={"SLURM_JOB_ID": "4711"})
    try:
        with agent(tmp_path, *QUICK, job="4711") as running:
            running.reads(lambda reading: reading.processes)
            rank.file.unlink()
            rank.file = write_place(msgspec.structs.replace(rank.place, run_id=run, attempt=attempt))
            assert end(running, run="first-run") == {}, "it is no rank of that any more"
            running.reads(lambda reading: [process.run_id for process in reading.processes] == [run])
            assert rank.process.poll() is None
            assert end(running, run=run, attempt=attempt)[0].how == "SIGTERM"
    finally:
        rank.end_well()


def test_the_newest_that_left_are_remembered() -> None:
    left = [place_of(os.getpid(), run=f"run-{number}", started=1.0) for number in range(REMEMBERED + 1)]
    departed = Departed()
    for place in (*left, left[1]):
        departed.add(place)
    assert [len(departed.of(place.run_id, 1)) for place in left] == [0] + REMEMBERED * [1]


@pytest.mark.parametrize("action", [Abort(now=True), Stop()])
def test_an_agent_takes_no_command_that_is_meant_for_a_run(tmp_path: Path, action: Act) -> None:
    with ranks(1) as (rank,), agent(tmp_path, *QUICK) as running:
        with pytest.raises(Refused, match="knows no run"):
            ask(running, action)
        assert rank.process.poll() is None


def test_a_strangers_key_ends_nothing(tmp_path: Path) -> None:
    async def asking(running: Agent) -> None:
        await Peer.connect(running.card.addresses[:1], source_keys().public, new_keys())

    with ranks(1) as (rank,), agent(tmp_path, *QUICK) as running:
        with pytest.raises(KeyRefused):
            asyncio.run(asking(running))
        assert rank.process.poll() is None


def test_the_reading_says_how_a_rank_ended(tmp_path: Path) -> None:
    with ranks(1) as (rank,), agent(tmp_path, *QUICK) as running:
        running.reads(lambda reading: reading.processes)
        rank.kill()
        (process,) = running.reads(lambda reading: reading.processes and not reading.processes[0].alive).processes
        assert process.ended == "killed by SIGKILL"


def test_a_process_whose_name_is_cut_in_the_middle_of_a_character_is_read_like_any_other() -> None:
    """The kernel keeps 15 bytes of a name, and a script may take any (setproctitle)."""
    name = "import sys, time; open('/proc/self/comm', 'wb').write(b'gpt \\xc3'); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", name], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        began = process_started(process.pid)
        place = Place(run_id="r", run="r", rank=0, local_rank=0, pid=process.pid, started=began, attempt=1)
        before = (process_usage(process.pid)[1] > 0, how_it_ended(place), has_ended(process.pid, began))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        after = (how_it_ended(place), has_ended(process.pid, began))
    assert (before, after) == ((True, None, False), ("killed by SIGKILL", True))
