"""The main job: `trainctl demo` in a real terminal, steered with real keys, each seen to happen in training."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import TRAINCTL, trainctl, trainctl_json
from terminals import Tmux, tmux
from trainctl.wire.cards import read_cards
from trainctl.wire.places import read_places
from waiting import until

pytestmark = [pytest.mark.ranks, pytest.mark.terminal]


@pytest.fixture
def ended() -> Iterator[None]:
    """Whatever a test leaves running is ended by its id."""
    yield
    for pid in [place.pid for place in read_places()] + [card.pid for card in read_cards()]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def steps_per_rank() -> set[int]:
    return {rank["step"] for rank in trainctl_json("status")["ranks"]}


def logged(metric: str) -> list[list[Any]]:
    """What rank 0 logged, as the journal has it: [step, time, value, incarnation]."""
    return list(trainctl_json("history", metric)[metric])


def test_the_demo_is_steered_from_its_cockpit(tmp_path: Path, ended: None) -> None:
    run = tmp_path / "run"
    with tmux([*TRAINCTL, "demo", "--steps", "4000", "--dir", str(run)]) as cockpit:
        cockpit.wait(r"● RUNNING .*gpt-stdlib", 90)
        screen = cockpit.wait(r"step (1[2-9]|[2-9]\d) / 4,000", 60)
        for words in ("loss", "learning rate", "gradient norm", "tokens/s", "P pause"):
            assert words in screen
        cockpit.wait(r"ranks +0 .*1 ")
        cockpit.wait("no GPU", 30)
        assert re.search("[⠁-⣿]", screen), "charts are drawn"
        until(lambda: len(trainctl_json("status")["ranks"]) == 2, 20)

        _pause(cockpit)
        _halve_the_learning_rate(cockpit)
        checkpoint = _checkpoint(cockpit, run)
        cockpit.keys("P")
        cockpit.wait(r"● RUNNING")
        until(lambda: trainctl_json("status")["step"] >= checkpoint + 5, 30)
        rates = trainctl_json("history", "lr", "lr_scheduled")
        assert rates["lr"][-1][2] == pytest.approx(rates["lr_scheduled"][-1][2] / 2), "in the optimizer's step"
        _roll_back(cockpit, checkpoint)
        _stop(cockpit)
    status = trainctl_json("status", str(run))
    assert status["state"] == "stopped"
    states = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    applied = [line["command"] for line in states if line.get("state") == "applied"]
    assert applied == ["pause", "lr scale", "checkpoint save", "resume", "rollback", "stop"]
    assert trainctl("audit", "--verify", "-r", str(run)).returncode == 0


def _pause(cockpit: Tmux) -> None:
    cockpit.keys("P")
    cockpit.wait(r"▮▮ PAUSED")
    held = trainctl_json("status")["step"]
    started = time.monotonic()

    def five_seconds_of_heartbeats() -> bool:
        beat = trainctl_json("status")
        assert (beat["state"], beat["step"]) == ("paused", held)
        assert beat["age_s"] < 3
        assert all(rank["age_s"] < 3 for rank in beat["ranks"]), "every rank's heartbeat goes on"
        return time.monotonic() - started >= 5

    until(five_seconds_of_heartbeats, 30)
    assert steps_per_rank() == {held}
    assert logged("loss")[-1][0] == held
    cockpit.wait(r"PAUSED \d+s by")


def _halve_the_learning_rate(cockpit: Tmux) -> None:
    before = trainctl_json("status")["lr"]
    assert before["effective"] == before["scheduled"]
    cockpit.keys("L")
    cockpit.wait("scale the schedule by")
    cockpit.keys("C-y")
    cockpit.wait(r"✓ .*lr scale")
    after = trainctl_json("status")["lr"]
    assert after["scheduled"] == pytest.approx(before["scheduled"])
    assert after["effective"] == pytest.approx(before["effective"] / 2)


def _checkpoint(cockpit: Tmux, run: Path) -> int:
    cockpit.keys("C")
    cockpit.wait("(?i)note")
    cockpit.keys("Enter")

    def on_disk() -> list[dict[str, Any]]:
        # The ranks have it in memory before it is written.
        return [found for found in trainctl_json("checkpoint", "ls")["checkpoints"] if found["where"] != "memory"]

    listed = until(on_disk, 20)
    assert (run / "checkpoints" / listed[-1]["id"] / "MANIFEST.json").is_file()
    cockpit.wait(r"✓ .*checkpoint")
    return int(listed[-1]["step"])


def _roll_back(cockpit: Tmux, checkpoint: int) -> None:
    before = trainctl_json("status")
    cockpit.keys("R")
    cockpit.wait("steps are lost")
    cockpit.keys("Enter")  # never the dangerous answer
    assert trainctl_json("status")["incarnation"] == before["incarnation"]
    cockpit.keys("y")
    cockpit.wait(r"✓ .*rollback")
    after = until(lambda: (found := trainctl_json("status"))["incarnation"] == 2 and found, 20)
    assert after["step"] < before["step"] + 20
    again = until(lambda: [row for row in logged("loss") if row[3] == 2], 30)
    assert again[0][0] == checkpoint + 1, "training went on from the checkpoint"


def _stop(cockpit: Tmux) -> None:
    cockpit.keys("S")
    cockpit.wait("Stop the training")
    cockpit.keys("y")
    cockpit.wait(r"STOPPED", 40)
    until(lambda: not read_places(), 40, what="the ranks left")
    cockpit.keys("q")
    cockpit.wait(r"ended with 0", 40)


@pytest.mark.thorough
def test_training_steps_on_when_the_cockpit_is_killed_and_a_new_one_shows_it_all(tmp_path: Path, ended: None) -> None:
    run = tmp_path / "run"
    with tmux([*TRAINCTL, "demo", "--steps", "4000", "--dir", str(run)], size=(80, 24)) as cockpit:
        cockpit.wait(r"step [5-9] / 4,000|step \d\d / 4,000", 90)
        shell = psutil.Process(cockpit.pid())
        victim = next(child for child in shell.children() if "demo" in child.cmdline())
        before = trainctl_json("status")["step"]
        victim.kill()
        until(lambda: trainctl_json("status")["step"] >= before + 10, 30, what="training steps on")
    with tmux([*TRAINCTL, "tui"], size=(80, 24)) as cockpit:
        cockpit.wait(r"● RUNNING .*gpt-stdlib", 30)
        cockpit.keys("q")
        cockpit.wait("ended with 0")
    assert trainctl_json("status")["state"] == "running", "leaving a cockpit does not end training"
    assert [row[0] for row in logged("loss")][: before + 10] == list(range(1, before + 11)), "no hole"


def test_a_tiny_terminal_still_answers(tmp_path: Path, ended: None) -> None:
    with tmux([*TRAINCTL, "demo", "--steps", "4000", "--dir", str(tmp_path / "run")], size=(40, 12)) as cockpit:
        screen = cockpit.wait(r"step\s+\d+", 90)
        cockpit.wait(r"loss\s+\d", 60)
        assert "RUNNING" in screen or cockpit.wait("RUNNING")
        cockpit.keys("q")
        cockpit.wait("(?i)goes on")
        cockpit.keys("s")
        cockpit.wait("ended with 0", 60)


def test_a_demo_of_one_step_ends_well(tmp_path: Path, ended: None) -> None:
    done = trainctl("demo", "--headless", "--steps", "1", "--dir", str(tmp_path / "run"), timeout_s=90)
    assert "finished at step 1" in done.stdout


def test_headless_the_demo_prints_the_log_and_learns(tmp_path: Path, ended: None) -> None:
    done = trainctl("demo", "--headless", "--steps", "60", "--dir", str(tmp_path / "run"), timeout_s=150)
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    form = r"step \d+/60 \| loss \d\.\d+ \| lr [\d.e-]+ \| grad [\d.]+ \| [\d.]+[kM]? tok/s \| [\d.]+ s/step"
    trained = [line for line in lines if re.match(form, line)]
    assert len(trained) >= 6, done.stdout
    loss = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in trained]  # type: ignore[index]
    assert loss[-1] < loss[0]
