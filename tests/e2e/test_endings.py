"""`abort --now` and `restart` need no boundary: shown with a rank stopped, and with ranks stuck in a collective."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs import job, trainctl, trainctl_json
from launched import alive, launched, states
from trainctl.wire.cards import read_cards
from waiting import until

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]


def stuck_ranks(run: list[str]) -> dict[int, dict[str, Any]]:
    lines = trainctl("log", *run, "-n", "1000", "--kind", "rank", "--json", check=False).stdout.splitlines()
    return {line["rank"]: line for line in map(json.loads, lines) if line["state"] == "stuck"}


def test_abort_now_ends_a_run_with_a_stopped_rank_and_nothing_restarts_it(tmp_path: Path) -> None:
    with launched(tmp_path, "--max-restarts", "3") as running:
        running.until_step(6)
        running.until_agent()
        pids = running.pids()
        os.kill(pids[1], signal.SIGSTOP)
        done = trainctl_json("abort", "--now", "--yes", *running.run)
        assert (done["state"], done["ranks"]) == ("applied", 2)
        assert done["after"] == f"2 ranks on {os.uname().nodename}"
        assert not any(map(alive, pids))
        assert running.process.wait(60) == 1
        assert "was aborted by" in running.log()
        status = running.status()
        assert (status["state"], status["attempt"]) == ("stopped", 1)
        assert status["reason"].startswith("aborted by")
        assert [state for state, _ in states(running.run)][-1] == "stopped"
        assert running.lines(attempt=2) == []
        assert trainctl("audit", "--verify", *running.run).returncode == 0
        again = trainctl("abort", "--now", "--yes", *running.run, check=False)
        assert again.returncode in {3, 4}, again.stdout + again.stderr


@pytest.mark.parametrize(("words", "state"), [(("abort", "--now"), "stopped"), (("restart",), "running")])
def test_a_paused_run_is_ended_by_its_operator_and_not_taken_for_one_whose_machine_goes(
    words: tuple[str, ...], state: str, tmp_path: Path
) -> None:
    with launched(tmp_path) as running:
        running.until_step(6)
        running.until_agent()
        trainctl_json("pause", *running.run)
        held = [info["id"] for info in trainctl_json("checkpoint", "ls", *running.run)["checkpoints"]]
        assert trainctl_json(*words, "--yes", *running.run)["state"] == "applied"
        status = until(lambda: (found := running.status())["state"] == state and found, 60, what=state)
        told = [found for found, _ in states(running.run)]
        assert not {"preempted", "lost", "failed"} & set(told), told
        assert status["attempt"] == (1 if state == "stopped" else 2)
        assert not (running.directory / "preempted.json").exists()
        if state == "stopped":
            now = [info["id"] for info in trainctl_json("checkpoint", "ls", *running.run)["checkpoints"]]
            assert now == held, "nothing is saved"
        assert "preemption" not in trainctl("audit", *running.run).stdout


@pytest.mark.parametrize("code", ["0", "1"])
@pytest.mark.parametrize(("words", "state"), [(("abort", "--now"), "stopped"), (("restart",), "running")])
def test_ranks_that_end_themselves_when_they_are_told_to_are_counted_and_ended_as_was_wanted(
    words: tuple[str, ...], state: str, code: str, tmp_path: Path
) -> None:
    with launched(tmp_path, script=("--term", code)) as running:
        running.until_step(6)
        running.until_agent()
        done = trainctl_json(*words, "--yes", *running.run)
        assert (done["state"], done["ranks"]) == ("applied", 2), done
        status = until(lambda: (found := running.status())["state"] == state and found, 60, what=state)
        assert status["attempt"] == (1 if state == "stopped" else 2)
        told = [found for found, _ in states(running.run)]
        assert not {"finished", "failed", "lost"} & set(told), told


def test_an_abort_that_comes_to_no_boundary_stands_in_nobodys_way(tmp_path: Path) -> None:
    with launched(tmp_path) as running:
        running.until_step(6)
        running.until_agent()
        (tmp_path / "alone").touch()  # rank 1 waits in a collective, and no boundary comes
        until(lambda: len(stuck_ranks(running.run)) == 2, 30, what="both are found stuck")
        trainctl("abort", "--yes", "--timeout", "1s", *running.run, check=False)
        assert trainctl_json("abort", "--now", "--yes", *running.run)["state"] == "applied"
        assert running.process.wait(60) == 1
        assert running.status()["state"] == "stopped"


def test_a_rank_in_a_collective_that_the_others_left_is_named_and_restart_gets_the_run_out_of_it(
    tmp_path: Path,
) -> None:
    with launched(tmp_path) as running:
        running.until_step(12)
        running.until_agent()
        pids, run_id = running.pids(), running.status()["id"]
        (tmp_path / "alone").touch()
        before = running.lines(1)[-1]["step"]
        stuck = until(lambda: len(found := stuck_ranks(running.run)) == 2 and found, 30, what="both are found stuck")
        assert f"in communication for {stuck[1]['text'].split()[3]} s after step {stuck[1]['step']}" in stuck[1]["text"]
        assert "in backward for" in stuck[0]["text"]
        assert [rank["state"] for rank in running.status()["ranks"]] == ["stuck", "stuck"]
        checkpoints = trainctl_json("checkpoint", "ls", *running.run)["checkpoints"]
        target = next(info for info in checkpoints if info["step"] == 10)
        (tmp_path / "alone").unlink()
        done = trainctl_json("restart", "--from", "10", "--yes", *running.run)
        assert (done["state"], done["ranks"]) == ("applied", 2), running.log()
        assert not any(map(alive, pids))
        running.until_step(before, attempt=2)
        assert running.lines(2)[0]["step"] == target["step"] + 1
        status = until(lambda: (found := running.status())["state"] == "running" and found, 20)
        assert (status["id"], status["attempt"]) == (run_id, 2)
        told = states(running.run)
        assert any(state == "starting" and f"restarting from {target['id']}" in reason for state, reason in told)
        assert "lost" not in [state for state, _ in told]
        assert list(running.directory.rglob("ending.json")) == []


def test_without_anybody_to_start_it_again_a_restart_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    with job("collectives.py", 2, tmp_path / "out") as running:
        running.until_step(6)
        run = ["-r", str(running.directory)]
        refused = trainctl("restart", "--yes", *run, "--json", check=False)
        assert refused.returncode == 4, refused.stderr
        reason = json.loads(refused.stdout)["reason"]
        assert "torchrun has no restart left" in reason
        assert "trainctl run --resume" in reason
        assert trainctl_json("status", *run)["capabilities"]["restart"] == reason, "and is said beforehand"
        before = running.step()
        until(lambda: running.step() > before, 20, what="training goes on")


def test_both_ask_first(tmp_path: Path) -> None:
    for words in (["abort", "--now"], ["restart"]):
        done = trainctl(*words, "-r", str(tmp_path), check=False)
        assert done.returncode == 2
        assert "--yes" in done.stderr


def test_an_agent_that_does_not_answer_is_named_and_nothing_is_guessed(tmp_path: Path) -> None:
    with job("collectives.py", 2, tmp_path / "out") as running:
        running.until_step(6)
        run = ["-r", str(running.directory)]
        until(lambda: (nodes := trainctl_json("status", *run)["nodes"]) and len(nodes[0]["processes"]) == 2, 30)
        agent = next(card for card in read_cards() if card.kind == "agent")
        os.kill(agent.pid, signal.SIGSTOP)
        try:
            done = trainctl("abort", "--now", "--yes", *run, "--json", check=False)
            told = json.loads(done.stdout)
            assert (done.returncode, told["state"]) == (1, "failed")
            assert f"2 ranks on {agent.host} cannot be ended: its agent does not answer" in told["reason"]
            assert "nothing was changed" in told["reason"]
            before = running.step()
            until(lambda: running.step() > before, 20, what="training goes on")
        finally:
            os.kill(agent.pid, signal.SIGCONT)
        assert trainctl_json("abort", "--now", "--yes", *run)["state"] == "applied"
