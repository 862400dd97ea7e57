"""An unattended start takes the newest checkpoint of the live branch that is whole, on every rank alike, and tells."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint_vouched import flip

from jobs import job, trainctl, trainctl_json
from waiting import until

WORKER = Path(__file__).with_name("resume_ranks.py")
pytestmark = [pytest.mark.ranks, pytest.mark.thorough]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, str], dict[str, list[Any]], str]:
    """The ids by step, what came of two starts under each damage, and what rank 0 wrote into its log."""
    directory = tmp_path_factory.mktemp("resumed")
    paths = [str(WORKER.parent), str(WORKER.parents[1])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(paths)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(directory), str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], told
    one, other = (json.loads((directory / f"outcomes-{rank}").read_text()) for rank in range(2))
    for name, outcomes in one["outcomes"].items():
        for mine, theirs in zip(outcomes, other["outcomes"][name], strict=True):
            assert mine == theirs | ({"told": mine["told"]} if "told" in mine else {}), "every rank alike"
            assert not theirs.get("told"), "one rank speaks for the run"
    return {int(step): name for step, name in one["ids"].items()}, one["outcomes"], (directory / "log-0").read_text()


def test_the_newest_of_the_live_branch_is_taken_and_nothing_told(resumed: Any) -> None:
    ids, outcomes, _log = resumed
    for start in outcomes["whole"]:
        assert (start["step"], start["from"], start["told"]) == (6, ids[6], [])


@pytest.mark.parametrize("name", ["newest flipped", "newest flipped, last asked for"])
def test_a_damaged_one_is_passed_over_and_named_with_the_reason_and_the_one_taken(resumed: Any, name: str) -> None:
    ids, outcomes, log = resumed
    first, second = outcomes[name]
    assert (first["step"], first["from"]) == (second["step"], second["from"]) == (4, ids[4])
    assert first["weight"] != outcomes["whole"][0]["weight"]
    reason = "is damaged: its hash differs from the manifest's"
    (told,) = first["told"]
    assert told.startswith(f"checkpoint {ids[6]} cannot be resumed from: rank ")
    assert told.endswith(f": {ids[6]}/rank-00001.pt {reason}. Resumed from {ids[4]} instead, at step 4")
    assert first["told"][0] in log
    assert second["told"] == [], "it is on a branch that was left by now"


def test_one_without_a_manifest_is_named_too(resumed: Any) -> None:
    ids, outcomes, _log = resumed
    first = outcomes["newest without manifest"][0]
    assert first["from"] == ids[4]
    assert f"{ids[6]} has no manifest: it was never completed. Resumed from {ids[4]}" in first["told"][0]


def test_of_several_damaged_ones_each_is_named(resumed: Any) -> None:
    ids, outcomes, _log = resumed
    first = outcomes["newest known, next flipped"][0]
    assert (first["step"], first["from"]) == (2, ids[2])
    assert sorted(text.split()[1] for text in first["told"]) == [ids[4], ids[6]]
    assert any(f"{ids[6]} did not verify earlier" in text for text in first["told"])


def test_what_did_not_verify_once_is_tried_again_before_nothing_is_left(resumed: Any) -> None:
    ids, outcomes, _log = resumed
    assert outcomes["only the newest mended"][0]["from"] == ids[6]


def test_when_none_is_left_the_run_does_not_begin_anew_by_itself(resumed: Any) -> None:
    ids, outcomes, _log = resumed
    for start in outcomes["all flipped"]:
        assert start["error"].startswith("no checkpoint of this run can be resumed from ("), start
        assert all(f"{ids[step]}/rank-00001.pt is damaged" in start["error"] for step in (2, 4, 6)), start
        assert "TRAINCTL_RESUME=ID" in start["error"], start


def test_one_that_was_asked_for_by_name_is_not_replaced_by_another(resumed: Any) -> None:
    ids, outcomes, _log = resumed
    for start in outcomes["step named and flipped"]:
        assert f"{ids[6]}/rank-00001.pt is damaged" in start["error"]
        assert f"the next older one is {ids[4]} (step 4)" in start["error"]


def test_a_run_without_checkpoints_begins_anew(resumed: Any) -> None:
    assert [start["step"] for start in resumed[1]["none yet"]] == [None, None]


def test_torchruns_restart_passes_a_damaged_one_over_and_the_operator_is_told(tmp_path: Path) -> None:
    restarted_once = {
        "PET_MAX_RESTARTS": "1",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "127.0.0.1:0",
        "PET_LOCAL_ADDR": "127.0.0.1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with job("collectives.py", 2, tmp_path / "out", **restarted_once) as running:
        running.until_step(12)
        pids = [running.lines(rank)[-1]["pid"] for rank in range(2)]
        for pid in pids:  # so that no newer one comes
            os.kill(pid, signal.SIGSTOP)
        run = ["-r", str(running.directory)]
        listed = sorted((running.directory / "checkpoints").glob("step-*/MANIFEST.json"))
        taken, damaged = (path.parent for path in listed[-2:])
        flip(damaged / "__0_0.distcp")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        second = until(lambda: [line for line in running.lines(1) if line["attempt"] == 2], 60, what=running.log())
        assert second[0]["step"] == int(taken.name.split("-")[1]) + 1
        assert f"Resumed from {taken.name} instead" in running.log()
        words = ["log", *run, "-n", "2000", "--kind", "anomaly", "--json"]
        told = until(lambda: [line for line in trainctl(*words, check=False).stdout.splitlines() if taken.name in line])
        event = json.loads(told[0])
        assert (event["what"], event["severity"]) == ("resume", "warning")
        assert f"{damaged.name}/__0_0.distcp is damaged" in event["text"]
        assert trainctl_json("status", *run)["attempt"] == 2
