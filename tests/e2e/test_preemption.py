"""The machine is taken away as SLURM does it: a warning signal, then SIGTERM; and a node lost from an elastic job."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import end_tree, free_port, job, trainctl, trainctl_json
from launched import Launched, alive, launched, states
from trainctl.wire.cards import read_cards
from trainctl.wire.manifest import list_checkpoints
from trainctl.wire.preemption import Warned, forget, read_heard, read_left, read_preempted, write_note
from waiting import until

pytestmark = pytest.mark.ranks
RARELY = ("--checkpoint-every", "100000")
SCRIPT = Path(__file__).parents[1] / "scripts" / "collectives.py"


def everybody(running: Launched) -> list[psutil.Process]:
    """`trainctl run`, torchrun and the ranks: a scheduler signals all processes of a job."""
    launcher = psutil.Process(running.process.pid)
    (torchrun,) = launcher.children()
    return [launcher, torchrun, *torchrun.children()]


def test_a_warning_becomes_one_checkpoint_and_a_stop_and_the_same_command_again_goes_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with launched(tmp_path, script=RARELY) as running:
        running.until_step(6)
        for process in everybody(running):
            process.send_signal(signal.SIGUSR1)
        running.process.send_signal(signal.SIGUSR1)
        assert running.process.wait(60) == 75, running.log()
        (checkpoint,) = list_checkpoints(running.directory / "checkpoints")
        last = running.lines(1)[-1]["step"]
        assert checkpoint.step == last == running.lines(1, rank=1)[-1]["step"]
        status = running.status()
        assert (status["state"], status["job_id"], status["step"]) == ("preempted", "4711", last)
        node = os.uname().nodename
        assert status["reason"] == f"SIGUSR1 on {node}; checkpoint {checkpoint.id}"
        assert trainctl("log", "-f", *running.run, check=False).returncode == 1
        assert trainctl("wait", *running.run, "--for", "state == preempted").returncode == 0
        run_id = status["id"]

    with launched(tmp_path, script=RARELY) as again:
        again.until_step(last + 3, attempt=2)
        assert again.lines(2)[0]["step"] == last + 1
        assert f"attempt 1 was preempted (SIGUSR1 on {node}; checkpoint {checkpoint.id})" in again.log()
        assert (again.status()["id"], again.status()["attempt"]) == (run_id, 2)
        hub = next(card.pid for card in read_cards() if card.kind == "hub")
        os.kill(hub, signal.SIGSTOP)  # nothing of this needs the hub
        again.process.send_signal(signal.SIGTERM)
        until(lambda: read_preempted(again.directory, attempt=2), 40, what="the ranks leave")
        os.kill(hub, signal.SIGCONT)
        assert again.process.wait(60) == 75, again.log()
        assert [info.step for info in list_checkpoints(again.directory / "checkpoints")] == [
            last,
            again.lines(2)[-1]["step"],
        ]
        told = states(again.run)[-1]
        assert told[0] == "preempted"
        assert told[1].startswith(f"SIGTERM on {node}; checkpoint step-")


def test_what_reaches_no_boundary_in_the_grace_is_ended_and_what_was_good_stands(tmp_path: Path) -> None:
    with launched(tmp_path, "--preempt-grace", "2s") as running:
        running.until_step(7)
        good = until(lambda: list_checkpoints(running.directory / "checkpoints"), 30, what="a checkpoint")[0]
        stopped = psutil.Process(running.pids()[1])
        stopped.suspend()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 75, running.log()
        assert not alive(stopped.pid), "a rank leads a session of its own, and must not be left behind"
        state, reason = until(lambda: (told := states(running.run)[-1])[0] != "running" and told, 20)
        assert state == "preempted"
        assert "the ranks reached no boundary within 2 s of SIGTERM; step-" in reason
        assert good.step >= 5
        assert reason.endswith("stands")


def test_without_torchrun_the_signal_on_any_one_rank_stops_all_of_them(tmp_path: Path) -> None:
    """As srun starts them: each rank by itself, with the usual variables."""
    port, ranks = str(free_port()), []
    try:
        for rank in range(2):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            given |= {"TRAINCTL_PREEMPT_SIGNAL": "SIGUSR1", "TRAINCTL_RUN_DIR": str(tmp_path / "run")}
            command = [sys.executable, str(SCRIPT), str(tmp_path), "--exit-75", *RARELY]
            ranks.append(subprocess.Popen(command, env=os.environ | place | given))
        until(lambda: (tmp_path / "rank-1.jsonl").exists() and (tmp_path / "rank-1.jsonl").read_text(), 60)
        ranks[1].send_signal(signal.SIGUSR1)
        ranks[1].send_signal(signal.SIGUSR1)
        assert [process.wait(60) for process in ranks] == [75, 75]
        (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
        told = read_preempted(tmp_path / "run")
        assert told is not None
        words = f"SIGUSR1 on {os.uname().nodename}; checkpoint {checkpoint.id}"
        assert (told.step, told.reason) == (checkpoint.step, words)
    finally:
        for process in ranks:
            end_tree(process)


def test_bare_torchrun_leaves_thirty_seconds_after_sigterm_and_that_is_enough_for_a_checkpoint(tmp_path: Path) -> None:
    with job("collectives.py", 1, tmp_path, RARELY, TRAINCTL_PREEMPT_SIGNAL="TERM") as running:
        running.until_step(5)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(60) == 1, "torchrun's own: whatever the ranks end with"
        (checkpoint,) = list_checkpoints(running.directory / "checkpoints")
        assert checkpoint.step == running.step()
        assert trainctl_json("status", "-r", str(running.directory))["state"] == "preempted"


def test_a_warning_before_the_first_step_and_one_in_an_evaluation_wait_for_the_next_boundary(tmp_path: Path) -> None:
    warning, checkpoints = tmp_path / "warning", tmp_path / "run" / "checkpoints"
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    place |= {"TRAINCTL_RUN_DIR": str(tmp_path / "run"), "TRAINCTL_PREEMPT_FILE": str(warning)}
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--exit-75", *RARELY, "--eval-every"]

    started_ones: list[subprocess.Popen[bytes]] = []

    def started(every: int) -> "subprocess.Popen[bytes]":
        env = os.environ | place | {"MASTER_PORT": str(free_port())}
        started_ones.append(made := subprocess.Popen([*command, str(every)], env=env))
        return made

    try:
        write_note(warning, Warned(reason="a signal", time=0.0))
        with started(1000) as early:
            assert early.wait(60) == 75
        (first,) = list_checkpoints(checkpoints)
        assert first.step >= 1
        forget(warning)

        (tmp_path / "long").touch()
        with started(first.step + 3) as evaluating:
            until((tmp_path / "evaluating").exists, 60, what="an evaluation")
            write_note(warning, Warned(reason="a signal", time=0.0))
            until(lambda: read_heard(warning), 30, what="it is heard meanwhile")
            assert evaluating.poll() is None
            (tmp_path / "long").unlink()
            assert evaluating.wait(60) == 75
        (_, second) = list_checkpoints(checkpoints)
        left = read_left(warning)
        assert left is not None
        assert (left.step, left.reason) == (second.step, f"a signal; checkpoint {second.id}")
        assert second.step > first.step + 3
    finally:
        for process in started_ones:
            end_tree(process)


# --- a node is lost


class Node:
    """One torchrun of an elastic job of one to two nodes, on the loopback."""

    def __init__(self, output: Path, port: int, *, first: bool) -> None:
        self.log = output / f"node-{first}.log"
        rendezvous = [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic", "--rdzv-backend=c10d"]
        rendezvous += [f"--rdzv-conf=is_host={int(first)},last_call_timeout=2", "--local-addr=127.0.0.1"]
        script = [str(SCRIPT.with_name("regression.py")), str(output), "--steps", "100000", "--sleep", "0.05"]
        torchrun = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", *rendezvous]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *torchrun, *script, "--checkpoint-every", "10"],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "TRAINCTL_RUN_DIR": str(output / "run"), "TRAINCTL_RUN_ID": "elastic"}
                | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            )

    def lost(self) -> None:
        """As when the power goes: nobody says goodbye."""
        torchrun = psutil.Process(self.process.pid)
        for process in [torchrun, *torchrun.children()]:
            process.kill()


def steps(output: Path) -> list[int]:
    path = output / "rank-0.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def noted(run: list[str], actor: str) -> list[str]:
    lines = trainctl("log", *run, "-n", "1000", "--kind", "note", "--json").stdout.splitlines()
    return [line["text"] for line in map(json.loads, lines) if line["actor"] == actor]


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint_and_the_rest_goes_on_with_fewer_ranks(
    tmp_path: Path,
) -> None:
    port = free_port()
    nodes = [Node(tmp_path, port, first=True)]
    run = ["-r", str(tmp_path / "run")]
    try:
        nodes.append(Node(tmp_path, port, first=False))
        until(lambda: steps(tmp_path)[-1:] > [25], 90, what="step 25 on two nodes")
        until((tmp_path / "run" / "run.json").exists, 30, what="the hub")
        assert trainctl_json("status", *run)["world_size"] == 2
        nodes[1].lost()

        def goes_on() -> Any:
            found = trainctl_json("status", *run)
            return found["attempt"] == 2 and found["state"] == "running" and found

        status = until(goes_on, 90, what=f"the next attempt\n{nodes[0].log.read_text()[-2000:]}")
        assert (status["id"], status["world_size"], len(status["ranks"])) == ("elastic", 1, 1)
        resumed = steps(tmp_path)[0] - 1
        assert resumed % 10 == 0
        assert resumed >= 20
        assert until(lambda: trainctl_json("status", *run)["ranks"][0]["data_first"], 20) >= 2 * resumed
        notes = noted(run, "resume")
        assert any("written by 2 ranks and read by 1: random numbers are not restored" in text for text in notes), notes
        place = f"the data goes on at micro-batch {2 * resumed} of each of 1 rank, after {resumed} of each of 2 ranks"
        assert any(place in text for text in notes), notes
        assert place in nodes[0].log.read_text()
        plan = trainctl("rollback", str(resumed), "--dry-run", *run).stdout
        assert "written by 2 ranks and read by 1" in plan
        assert trainctl_json("rollback", str(resumed), "--yes", *run)["after"] == resumed
        assert noted(run, "rollback") == [text.partition(": ")[2] for text in notes]
    finally:
        for node in nodes:
            end_tree(node.process)
