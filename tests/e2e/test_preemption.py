"""The machine is taken away as SLURM does it: a warning signal, then SIGTERM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jobs import end_tree, free_port, job, trainctl, trainctl_json
from launched import Launched, alive, launched, states
from trainctl.wire.cards import read_cards
from trainctl.wire.manifest import list_checkpoints
from trainctl.wire.preemption import Warned, read_left, read_preempted, write_note
from waiting import until

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]
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


def test_bare_torchrun_leaves_thirty_seconds_after_sigterm_and_a_warning_in_an_evaluation_waits_for_its_end(
    tmp_path: Path,
) -> None:
    (tmp_path / "long").touch()
    with job("collectives.py", 1, tmp_path, [*RARELY, "--eval-every", "5"], TRAINCTL_PREEMPT_SIGNAL="TERM") as running:
        until((tmp_path / "evaluating").exists, 60, what="an evaluation")
        running.process.send_signal(signal.SIGTERM)
        until(lambda: "one checkpoint, then the run stops" in running.log(), 25, what="it is heard meanwhile")
        assert list_checkpoints(running.directory / "checkpoints") == []
        (tmp_path / "long").unlink()
        assert running.wait(60) == 1, "torchrun's own: whatever the ranks end with"
        (checkpoint,) = list_checkpoints(running.directory / "checkpoints")
        assert checkpoint.step == running.step() > 5
        assert trainctl_json("status", "-r", str(running.directory))["state"] == "preempted"


def test_sigterm_while_paused_saves_what_the_pause_holds_without_having_been_asked_for(tmp_path: Path) -> None:
    with job("steered.py", 2, tmp_path, ["--sleep", "0.02"]) as running:
        running.until_step(5)
        run = ["-r", str(running.directory)]
        held = trainctl_json("pause", *run)["step"]
        trainctl_json("set", "x", "7", *run)
        running.process.send_signal(signal.SIGTERM)  # torchrun passes it on to its ranks
        assert running.wait(60) == 1, "torchrun's own: whatever the ranks end with"
        (checkpoint,) = list_checkpoints(running.directory / "checkpoints")
        assert checkpoint.step == held
        status = trainctl_json("status", *run)
        assert (status["state"], status["step"]) == ("preempted", held)
        assert "SIGTERM" in status["reason"]


def test_a_warning_before_the_first_step_is_acted_on_at_the_first_boundaries(tmp_path: Path) -> None:
    warning = tmp_path / "warning"
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    place |= {"TRAINCTL_RUN_DIR": str(tmp_path / "run"), "TRAINCTL_PREEMPT_FILE": str(warning)}
    write_note(warning, Warned(reason="a signal", time=0.0))
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--exit-75", *RARELY]
    process = subprocess.Popen(command, env=os.environ | place | {"MASTER_PORT": str(free_port())})
    try:
        assert process.wait(60) == 75
        (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
        left = read_left(warning)
        assert left is not None
        assert (left.step, left.reason) == (checkpoint.step, f"a signal; checkpoint {checkpoint.id}")
        assert left.step >= 1
    finally:
        end_tree(process)
