"""What leaves a rank: figures that are right, bad values that cost nothing, and workers that keep nothing alive."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import Job, end_tree, job, trainctl, trainctl_json
from trainctl.store.replay import load_record
from trainctl.wire.cards import read_cards
from trainctl.wire.messages import StateChanged
from trainctl.wire.paths import link_socket
from waiting import until

pytestmark = pytest.mark.ranks
# From here on its silence would tell that a rank is gone.
SILENCE_S = 9.0
PHASES = {"data", "forward", "backward", "optimizer", "communication", "checkpoint", "eval"}


def events(run: list[str], kind: str) -> list[dict[str, Any]]:
    lines = trainctl("log", *run, "-n", "100000", "--json", check=False).stdout.splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def logged(running: Job, rank: int, loss: float) -> bool:
    return loss in {line["loss"] for line in running.lines(rank)}


def test_every_rank_and_every_step_has_its_figures(tmp_path: Path) -> None:
    with job("telemetry.py", 2, tmp_path, ["--steps", "100000", "--sleep", "0.02"]) as running:
        running.until_step(45)
        run = ["-r", str(running.directory)]

        def told() -> dict[str, Any] | None:
            found: dict[str, Any] = trainctl_json("status", *run)
            ranks, shown = found["ranks"], found["phases"].keys()
            complete = len(ranks) == 2 and all(rank["loss"] is not None for rank in ranks) and shown >= PHASES
            return found if complete else None

        status = until(told, 20, what="the losses of both ranks, and every phase")
        assert status is not None
        for rank in status["ranks"]:
            number, loss = rank["rank"], rank["loss"]
            until(partial(logged, running, number, loss), 20, what=f"the loss of rank {number}, as it logged it")
            assert not logged(running, 1 - number, loss), "each rank's own, not rank 0's"
            assert rank["step_time_s"] >= 0.02
            assert rank["data_wait_s"] is not None
            assert rank["memory_bytes"] > 1e6
            assert rank["data_last"] == rank["data_first"] + 1, "two micro-batches a step"
        throughput = status["throughput"]
        assert status["samples_per_s"] == pytest.approx(64 * throughput["steps_per_s"])
        assert 0 < throughput["mfu"] < 1
        assert status["clipped"] == 1.0, "the limit is far below every norm"
        assert status["dropped"] == 0

        history = trainctl_json("history", "data_first", "data_last", "mfu", *run)
        steps = [point[0] for point in history["data_first"]]
        assert [point[2] for point in history["data_first"]] == [2.0 * (step - 1) for step in steps]
        assert [point[2] for point in history["data_last"]] == [2.0 * step - 1 for step in steps]
        assert all(0 < point[2] < 1 for point in history["mfu"])
        assert all(line["data"] == [2 * line["step"] - 2, 2 * line["step"] - 1] for line in running.lines(1))

        rolled = trainctl_json("rollback", "20", "--skip-batches", "7", "--yes", *run)
        assert (rolled["state"], rolled["after"]) == ("applied", 20)
        again = until(lambda: [line for line in running.lines() if line["data"][0] == 47], 20)
        assert again[-1] == again[-1] | {"step": 21, "data": [47, 48]}, "40 batches were seen, seven passed over"


def test_the_data_of_a_rank_that_reads_others_than_rank_0_are_in_the_history(tmp_path: Path) -> None:
    with job("telemetry.py", 2, tmp_path, ["--steps", "100000", "--sleep", "0.02", "--uneven"]) as running:
        running.until_step(45)
        run = ["-r", str(running.directory)]

        def told() -> list[list[float]]:
            asked = trainctl("history", "data_first.1", "data_last.1", *run, "--json", check=False)
            if asked.returncode != 0:
                return []  # no report of rank 1 has come yet
            found: list[list[float]] = json.loads(asked.stdout)["data_first.1"]
            return found if len(found) > 40 else []

        first = until(told, 20, what="rank 1's data")
        steps = [point[0] for point in first]
        assert steps == list(range(1, steps[-1] + 1)), "every step once"
        assert [point[2] for point in first] == [3.0 * (step - 1) for step in steps]


def test_what_a_rank_read_in_the_last_second_is_in_the_history_too(tmp_path: Path) -> None:
    with job("telemetry.py", 2, tmp_path, ["--steps", "30", "--sleep", "0.005", "--uneven"]) as running:
        assert running.wait(90) == 0, running.log()
        record = load_record(running.directory)
        assert [int(step) for step in record.metrics.query("data_first.1")["step"]] == list(range(1, 31))
        assert {rank.step for rank in record.ranks.values()} == {30}


def test_bad_values_are_said_once_by_name_and_stop_nothing(tmp_path: Path) -> None:
    with job("telemetry.py", 1, tmp_path, ["--steps", "60", "--bad"]) as running:
        assert running.wait(90) == 0, running.log()
        run = ["-r", str(running.directory)]
        status = until(lambda: (found := trainctl_json("status", *run))["state"] == "finished" and found, 20)
        assert status["step"] == 60
        assert [point[0] for point in trainctl_json("history", "loss", *run)["loss"]] == list(range(1, 61))

        assert len(status["metrics"]) <= 2100
        assert status["metrics"]["col[31mour"]["value"] == 0.5
        assert status["metrics"]["step"]["value"] == 40, "a metric like any other: the run's own step is counted"
        assert status["nonfinite"]["hole"] == {"nan": 60, "inf": 0}
        assert status["nonfinite"]["over"] == {"nan": 0, "inf": 60}
        by_reason = status["dropped_by_reason"]
        assert by_reason["value"] == 4 * 60, "text, many, nothing, huge"
        assert by_reason["names"] >= 250 * 60 - 2000
        assert status["dropped"] == sum(by_reason.values())

        texts = [event["text"] for event in events(run, "anomaly")]
        odd = ("'text'", "'many'", "'nothing'", "'huge'", "'col\\x1b[31mour'", "'step' went back", "more than 2000")
        for name in odd:
            assert len([text for text in texts if name in text]) == 1, (name, texts)
        assert len(texts) < 20
        assert "not a number" in running.log()


def loss_steps(run: list[str]) -> list[int]:
    return [point[0] for point in trainctl_json("history", "loss", *run)["loss"]]


def steps_on(running: Job, more: int) -> None:
    before = running.step()
    until(lambda: running.step() >= before + more, 30, what=f"{more} more steps after {before}\n{running.log()}")


def test_a_hub_that_is_frozen_and_one_whose_disk_is_full_cost_training_and_history_nothing(tmp_path: Path) -> None:
    with job("telemetry.py", 2, tmp_path, ["--steps", "100000", "--sleep", "0.01"]) as running:
        running.until_step(10)
        run = ["-r", str(running.directory)]
        (hub,) = [card.pid for card in read_cards() if card.kind == "hub"]

        os.kill(hub, signal.SIGSTOP)
        steps_on(running, 100)
        os.kill(hub, signal.SIGCONT)

        soft, hard = resource.prlimit(hub, resource.RLIMIT_FSIZE)
        resource.prlimit(hub, resource.RLIMIT_FSIZE, (1, hard))
        until(lambda: any("cannot be written" in event["text"] for event in events(run, "anomaly")), 20)
        steps_on(running, 100)
        resource.prlimit(hub, resource.RLIMIT_FSIZE, (soft, hard))
        until(lambda: any("written again" in event["text"] for event in events(run, "anomaly")), 30)

        stopped = trainctl_json("stop", "--yes", *run)
        assert running.wait(60) == 0, running.log()
        assert loss_steps(run) == list(range(1, stopped["step"] + 1)), "every step once"
        assert trainctl_json("status", *run)["dropped"] == 0
        os.kill(hub, signal.SIGKILL)
        assert loss_steps([*run]) == list(range(1, stopped["step"] + 1)), "and so says the journal"


@pytest.mark.thorough
def test_a_hub_that_is_frozen_when_training_ends_holds_the_exit_up_for_seconds_and_the_run_is_whole(
    tmp_path: Path,
) -> None:
    """Cheap, and with each of its turns: tests/hub/test_hub_left_behind.py."""
    with job("telemetry.py", 1, tmp_path, ["--steps", "150", "--sleep", "0.02"]) as running:
        running.until_step(10)
        (hub,) = [card.pid for card in read_cards() if card.kind == "hub"]
        with frozen([hub]):
            assert running.wait(90) == 0, running.log()
            took = json.loads((running.output / "closing-0.json").read_text())
        assert 3.0 <= took < 20.0, "three, and some for a busy machine"
        assert "the hub did not take the last" in running.log()
        run = ["-r", str(running.directory)]
        status = until(lambda: (found := trainctl_json("status", *run))["state"] == "finished" and found, 20)
        assert (status["step"], status["dropped"]) == (150, 0)
        assert loss_steps(run) == list(range(1, 151)), "though the hub was killed, and read none of the last"


@contextlib.contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    """Processes that cannot notice anything, and that die when the test is over."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def sockets(pid: int) -> set[str]:
    found: set[str] = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            target = str(entry.readlink())
            if target.startswith("socket:"):
                found.add(target)
    return found


def workers_of(running: Job, rank: int) -> list[int]:
    """The rank's data workers, once they are there, and what else it started that is no process of trainctl's."""
    until(lambda: len(list(running.output.glob("worker-0-*.json"))) == 2, 30, what="two workers")
    return not_trainctls(rank)


def not_trainctls(rank: int) -> list[int]:
    """What a rank started, and they, that is no process of trainctl's."""
    ours = ("trainctl.hub", "trainctl.agent")
    found = []
    for child in psutil.Process(rank).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie: one that came and went
            if child.status() != psutil.STATUS_ZOMBIE and not any(word in ours for word in child.cmdline()):
                found.append(child.pid)
    return found


@pytest.mark.parametrize(
    ("method", "ranks"),
    [
        ("fork", 2),
        pytest.param("forkserver", 2, marks=pytest.mark.thorough),
        pytest.param("spawn", 1, marks=pytest.mark.thorough),
    ],
)
def test_a_killed_rank_is_noticed_although_its_workers_live_and_they_hold_nothing(
    tmp_path: Path, method: str, ranks: int
) -> None:
    arguments = ["--steps", "100000", "--sleep", "0.02", "--workers", method]
    with job("telemetry.py", ranks, tmp_path, arguments) as running:
        running.until_step(5, timeout_s=90)
        run = ["-r", str(running.directory)]
        status = trainctl_json("status", *run)
        rank = status["ranks"][0]["pid"]
        workers = workers_of(running, rank)
        told = [json.loads(path.read_text()) for path in running.output.glob("worker-0-*.json")]
        opened = json.loads((running.output / "sockets-0.json").read_text())
        assert len(opened["ports"]) == ranks - 1, "our own group listens where there are several ranks"
        assert len(opened["attach"]) >= 4 * (ranks - 1), "and the store is connected to"
        assert {worker["pid"] for worker in told} <= set(workers)
        assert not [name for worker in told for name in worker["threads"] if "trainctl" in name]
        shared = {pid: sockets(pid) & sockets(rank) for pid in workers}
        assert all(held <= set(opened["script"]) for held in shared.values()), "no worker holds a socket of ours"

        os.kill(running.process.pid, signal.SIGSTOP)  # torchrun would end everything in an orderly way
        with frozen(workers):
            killed = time.time()
            os.kill(rank, signal.SIGKILL)
            until(lambda: trainctl_json("status", *run)["state"] == "lost", 20, what="lost")
            (lost,) = [event for event in events(run, "state") if event["state"] == "lost"]
            assert "died without a word" in lost["reason"]
            assert lost["time"] - killed < SILENCE_S, "by its end, not by its silence; bench/rank_death.py has the time"

            nothing_stays_taken({*opened["ports"]})
            assert all(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in workers), "they lived through"
        os.kill(running.process.pid, signal.SIGCONT)


def nothing_stays_taken(ports: set[int]) -> None:
    """Where trainctl's processes end, their path and their ports can be had again, with those of a rank's."""
    (hub,) = [card for card in read_cards() if card.kind == "hub"]
    ports |= {int(address.rsplit(":", 1)[1]) for address in hub.addresses} | {hub.publish_port}
    os.kill(hub.pid, signal.SIGTERM)
    until(lambda: not psutil.pid_exists(hub.pid) or _zombie(hub.pid), 20, what="the hub's end")
    assert not link_socket(hub.source).exists()
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


METHODS = ["fork", "forkserver", "spawn"]


@pytest.fixture
def rank_with_workers(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of one rank that is linked to its hub, with a worker of each kind."""
    script = Path(__file__).parents[1] / "scripts" / "idle_workers.py"
    rank = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), *METHODS],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRAINCTL_RUN_DIR": str(tmp_path / "run")},
    )
    try:
        until(lambda: len(list(tmp_path.glob("worker-*.json"))) == len(METHODS), 60, what="a worker of each kind")
        yield rank
    finally:
        end_tree(rank)


def test_a_killed_ranks_workers_of_every_kind_hold_nothing_and_nothing_stays_taken(
    tmp_path: Path, rank_with_workers: subprocess.Popen[bytes]
) -> None:
    """With DataLoaders and two ranks: above."""
    rank = rank_with_workers
    told = [json.loads(path.read_text()) for path in tmp_path.glob("worker-*.json")]
    workers = not_trainctls(rank.pid)
    assert {worker["pid"] for worker in told} <= set(workers)
    assert len(workers) > len(METHODS), "and the server that forks some of them"
    assert not [name for worker in told for name in worker["threads"] if "trainctl" in name]
    assert sockets(rank.pid), "the link at least"
    assert not [pid for pid in workers if sockets(pid) & sockets(rank.pid)], "no worker holds a socket of ours"
    with frozen(workers):
        killed = time.time()
        rank.kill()
        rank.wait(10)

        def lost() -> list[StateChanged]:
            record = load_record(tmp_path / "run")
            return [event for event in record.events if isinstance(event, StateChanged) and event.state == "lost"]

        (event,) = until(lost, 20, what="lost")
        assert "died without a word" in str(event.reason)
        assert event.time - killed < SILENCE_S, "by its end, not by its silence; bench/rank_death.py has the time"
        nothing_stays_taken(set())
        assert all(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in workers), "they lived through"


def _zombie(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True
