"""A hub that is there and says nothing: no other run is taken for its run, and a healthy run is not called lost."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from client.scripted_hub import hub
from jobs import job, trainctl, trainctl_json
from trainctl.wire.cards import card_file, read_cards
from waiting import until

pytestmark = pytest.mark.ranks


@pytest.mark.thorough
def test_a_stopped_hub_is_told_from_a_dead_one_and_its_run_is_not_passed_over(tmp_path: Path) -> None:
    with job("steered.py", 1, tmp_path, ["--sleep", "0.05"]) as running:
        running.until_step(3)
        card = next(card for card in read_cards() if card.kind == "hub")
        os.kill(card.pid, signal.SIGSTOP)
        try:
            for words in (["status"], ["pause"]):
                told = trainctl(*words, "-r", card.source, check=False)
                assert told.returncode == 3
                assert f"its hub (pid {card.pid}) is alive and silent" in told.stderr
                assert "lost" not in told.stdout.lower()
            listed = next(found for found in trainctl_json("ls")["runs"] if found["id"] == card.source)
            assert (listed["state"], listed["silent"]) == (None, True)
            with hub("run-2", "other") as other:
                told = trainctl("pause", "--json", check=False)
                assert told.returncode == 2, "the other run is not taken for it"
                error = json.loads(told.stdout)["error"]
                assert error["code"] == "ambiguous_run"
                assert card.source in error["message"]
                assert "run-2" in error["message"]
                assert other.script.commands == []
        finally:
            os.kill(card.pid, signal.SIGCONT)
        before = running.step()
        until(lambda: running.step() > before, 20, what="training, which never heard of it")
        until(lambda: trainctl("status", check=False).returncode == 0, 20, what="the hub's answer")


def test_a_run_that_is_kept_elsewhere_is_listed_and_found_by_name_when_all_its_processes_are_gone(
    tmp_path: Path, own_home: Path
) -> None:
    with job("steered.py", 1, tmp_path, ["--steps", "5"]) as running:
        assert running.wait(60) == 0, running.log()
        card = until(lambda: next((card for card in read_cards() if card.kind == "hub"), None), 10)
        assert card is not None
    card_file(card).unlink(missing_ok=True)  # as when the hub leaves, a minute later
    (listed,) = trainctl_json("ls", "-a")["runs"]
    assert (listed["id"], listed["state"], listed["dir"]) == (card.source, "finished", str(running.directory))
    assert trainctl_json("status", "steered")["state"] == "finished"
    again = trainctl("demo", "--headless", "--steps", "1", "--dir", str(running.directory), check=False)
    assert again.returncode == 2
    assert f"holds the run {card.source} already; nothing was started" in again.stderr
    shutil.rmtree(running.directory)
    assert trainctl_json("ls", "-a")["runs"] == [], "a link to nothing is no run"
