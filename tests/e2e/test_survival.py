"""kill -9 of the hub and of the agent: training steps on, both come back by themselves, history has no hole."""

import json
import os
import signal
from pathlib import Path

import msgspec
import pytest

from jobs import Job, job, trainctl_json
from trainctl.wire.cards import read_cards
from trainctl.wire.messages import Card
from waiting import until

pytestmark = pytest.mark.ranks


def card(kind: str, *, not_pid: int = 0) -> Card:
    def found() -> Card | None:
        return next((card for card in read_cards() if card.kind == kind and card.pid != not_pid), None)

    there = until(found, 30, what=f"a card of the {kind}")
    assert there is not None
    return there


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def steps_on(running: Job, more: int = 10) -> None:
    before = running.step()
    until(lambda: running.step() >= before + more, 20, what=f"{more} more steps after {before}\n{running.log()}")


@pytest.mark.thorough
def test_hub_and_agent_are_killed_and_come_back_and_nothing_is_missing(tmp_path: Path) -> None:
    with job("regression.py", 2, tmp_path, ["--steps", "100000", "--sleep", "0.05"]) as running:
        running.until_step(10)
        run = ["-r", str(running.directory)]
        hub, agent = card("hub"), card("agent")

        kill(hub.pid)
        steps_on(running)
        new_hub = card("hub", not_pid=hub.pid)
        assert new_hub.epoch > hub.epoch
        status = until(lambda: (found := trainctl_json("status", *run))["state"] == "running" and found, 20)
        assert status["run"] == "regression"

        kill(agent.pid)
        steps_on(running)
        card("agent", not_pid=agent.pid)
        node = until(
            lambda: (nodes := trainctl_json("status", *run)["nodes"]) and nodes[0]["state"] == "alive" and nodes[0], 20
        )
        assert node["cpu"] is not None

        scaled = trainctl_json("lr", "scale", "0.5", *run)
        assert (scaled["state"], scaled["ranks"]) == ("applied", 2)
        stopped = trainctl_json("stop", "--yes", *run)
        assert running.wait(60) == 0, running.log()

        history = trainctl_json("history", "loss", *run)["loss"]
        assert [point[0] for point in history] == list(range(1, stopped["step"] + 1)), "every step once, none missing"
        trained = [float.fromhex(line["loss"]) for line in running.lines()]
        assert [point[2] for point in history] == trained, "to the bit: what was float32 stays float32"


def test_a_rank_that_is_killed_makes_the_run_lost_at_once(tmp_path: Path) -> None:
    with job("regression.py", 1, tmp_path, ["--steps", "5000", "--sleep", "0.05"]) as running:
        running.until_step(5)
        run = ["-r", str(running.directory)]
        pid = trainctl_json("status", *run)["ranks"][0]["pid"]
        # torchrun would end the job in an orderly way; this is what a node's out-of-memory killer does to both.
        os.kill(running.process.pid, signal.SIGSTOP)
        kill(pid)
        lost = until(lambda: (found := trainctl_json("status", *run))["state"] == "lost" and found, 20, what="lost")
        assert lost["step"] >= 5
        lines = [json.loads(line) for line in _log(run)]
        (event,) = [line for line in lines if line["kind"] == "state" and line["state"] == "lost"]
        assert event["reason"]
        last = max(line["time"] for line in lines if line["kind"] == "metrics")
        assert event["time"] - last < 9.0, "by its end, not by its silence; bench/rank_death.py has the time"
        os.kill(running.process.pid, signal.SIGCONT)


def _log(run: list[str]) -> list[str]:
    from jobs import trainctl

    return trainctl("log", *run, "-n", "100000", "--json", check=False).stdout.splitlines()


def test_the_journal_alone_tells_the_run_after_everybody_is_gone(tmp_path: Path) -> None:
    with job("regression.py", 2, tmp_path, ["--steps", "40"]) as running:
        assert running.wait(60) == 0, running.log()
        kill(card("hub").pid)
        status = until(
            lambda: (found := trainctl_json("status", str(running.directory)))["state"] == "finished" and found, 20
        )
        assert (status["step"], status["total_steps"], status["checkpoints"]["count"]) == (40, 40, 2)
        history = trainctl_json("history", "loss", "-r", str(running.directory))["loss"]
        assert [point[0] for point in history] == list(range(1, 41))
        rollups = trainctl_json("history", "loss", "--points", "10", "-r", str(running.directory))["loss"]
        assert sum(point[6] for point in rollups) == 40
        assert min(point[2] for point in rollups) == min(point[2] for point in history)


def test_cards_are_json_that_anybody_can_read(tmp_path: Path) -> None:
    with job("regression.py", 1, tmp_path, ["--steps", "40"]) as running:
        running.until_step(1)
        hub = card("hub")
        path = next((Path(os.environ["TRAINCTL_HOME"]) / "cards").glob("hub-*.json"))
        assert path.stat().st_mode & 0o777 == 0o600
        assert msgspec.json.decode(path.read_bytes())["server_key"] == hub.server_key
        assert running.wait(60) == 0
