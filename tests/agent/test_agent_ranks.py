"""How an agent watches the ranks of its node: real processes, announced as ranks announce themselves."""

import time
from pathlib import Path

from agent_process import Rank, agent, ranks

from trainctl.wire.messages import NodeReading
from trainctl.wire.places import place_file, write_place
from waiting import until


def alive(reading: NodeReading) -> dict[int, bool]:
    return {process.rank: process.alive for process in reading.processes}


def test_every_local_rank_is_measured(tmp_path: Path) -> None:
    with ranks(2) as started, agent(tmp_path, "--interval", "0.2", "--no-gpus") as running:
        reading = running.reads(lambda reading: reading.processes and reading.processes[0].cpu is not None)
    assert alive(reading) == {0: True, 1: True}
    for process, rank in zip(sorted(reading.processes, key=lambda process: process.rank), started, strict=True):
        assert (process.pid, process.run_id) == (rank.process.pid, "job-1")
        assert process.cpu == 0.0  # it sleeps
        assert process.memory_bytes
        assert process.memory_bytes > 100_000


def test_a_killed_rank_is_reported_at_once_and_not_at_the_next_tick(tmp_path: Path) -> None:
    with ranks(2) as started, agent(tmp_path, "--interval", "30", "--no-gpus") as running:
        running.reads(lambda reading: alive(reading) == {0: True, 1: True})
        killed: list[float] = []

        def kill() -> None:
            started[1].kill()
            killed.append(time.monotonic())

        reading = running.publishes(lambda reading: alive(reading).get(1) is False, after=kill, timeout_s=20)
        assert time.monotonic() - killed[0] < 20.0, "and the next tick is 30 s away"
        assert alive(reading) == {0: True, 1: False}


def test_a_rank_that_ends_well_just_goes(tmp_path: Path) -> None:
    with ranks(2) as started, agent(tmp_path, "--interval", "0.2", "--no-gpus") as running:
        running.reads(lambda reading: len(reading.processes) == 2)
        started[1].end_well()
        assert alive(running.reads(lambda reading: len(reading.processes) == 1)) == {0: True}


def test_a_death_is_kept_in_view_after_others_came_and_went(tmp_path: Path) -> None:
    with ranks(1) as (first,), agent(tmp_path, "--interval", "0.2", "--no-gpus") as running:
        running.reads(lambda reading: alive(reading) == {0: True})
        first.kill()
        with ranks(2) as (_, later):
            running.reads(lambda reading: len(reading.processes) == 3)
            later.end_well()
            reading = running.reads(lambda reading: len(reading.processes) == 2)
        assert {process.pid: process.alive for process in reading.processes}[first.process.pid] is False
        assert first.file.exists()


def test_a_rank_that_died_before_the_agent_came_is_reported(tmp_path: Path) -> None:
    with ranks(1) as (rank,):
        rank.reap()
        with agent(tmp_path, "--no-gpus") as running:
            assert alive(running.reads()) == {0: False}


def test_a_recycled_pid_is_not_taken_for_the_rank(tmp_path: Path) -> None:
    with ranks(1) as (rank,):
        rank.file.unlink()
        earlier = type(rank.place)(
            run_id="job-1", run="test", rank=0, local_rank=0, pid=rank.process.pid, started=1.0, attempt=1
        )
        write_place(earlier)
        with agent(tmp_path, "--no-gpus") as running:
            assert alive(running.reads()) == {0: False}
        place_file(earlier).unlink()


def test_an_agent_watches_the_ranks_of_its_job_only(tmp_path: Path) -> None:
    other = Rank(job="another-run")
    clustered = Rank(job="a-run-in-the-job", rank=7, environment={"SLURM_JOB_ID": "4711"})
    try:
        with ranks(1, job="job-1"), agent(tmp_path, "--no-gpus") as running:
            assert alive(running.reads()) == {0: True}
        with agent(tmp_path, "--no-gpus", job="4711") as running:
            assert alive(running.reads()) == {7: True}
    finally:
        for rank in (other, clustered):
            rank.end_well()


def test_with_while_ranks_an_agent_ends_after_the_last_rank(tmp_path: Path) -> None:
    options = ("--while-ranks", "--linger", "0.5", "--interval", "0.2", "--no-gpus")
    with ranks(2) as (well, killed), agent(tmp_path, *options) as running:
        running.reads(lambda reading: len(reading.processes) == 2)
        well.end_well()
        running.reads(lambda reading: alive(reading) == {1: True})
        assert running.process.poll() is None
        killed.kill()
        assert running.wait() == 0
        until(lambda: not killed.file.exists(), what="the file of the dead rank, which was reported, is removed")
