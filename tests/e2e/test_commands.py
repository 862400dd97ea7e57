"""Each command happens in the training process, at one step on all ranks, and is told truthfully."""

import time
from pathlib import Path
from typing import Any

import pytest

from jobs import Job, job, trainctl, trainctl_json
from waiting import until

pytestmark = pytest.mark.ranks

COMMAND_FIELDS = {"id", "command", "run", "state", "step", "incarnation", "before", "after", "ranks", "reason"}
STATUS_FIELDS = {
    "schema", "run", "id", "job_id", "state", "step", "total_steps", "incarnation", "attempt", "world_size", "age_s",
    "eta_s", "lr", "metrics", "throughput", "phases", "ranks", "nodes", "checkpoints", "capabilities", "dropped",
}  # fmt: skip


def at(running: Job, rank: int, step: int) -> dict[str, Any]:
    """What a rank wrote of one step, once it has."""
    found = until(lambda: [line for line in running.lines(rank) if line["step"] == step], 20, what=f"step {step}")
    return found[-1]


def test_the_operators_day(tmp_path: Path) -> None:
    with job("regression.py", 2, tmp_path, ["--steps", "100000", "--sleep", "0.03"]) as running:
        running.until_step(25)
        run = ["-r", str(running.directory)]

        def act(*words: str) -> dict[str, Any]:
            done: dict[str, Any] = trainctl_json(*words, *run)
            assert done.keys() >= COMMAND_FIELDS
            assert (done["schema"], done["run"], done["ranks"]) == (1, "regression", 2)
            assert done["state"] == "applied"
            return done

        def at_work() -> dict[str, Any] | None:
            status: dict[str, Any] = trainctl_json("status", *run)
            # A rank that was in a checkpoint when it last reported says so, truthfully, for up to a second.
            states = {status["state"], *(rank["state"] for rank in status["ranks"])}
            measured = {"data", "forward", "backward"} <= status["phases"].keys()  # told once a second
            return status if status["nodes"] and states == {"running"} and measured else None

        _check_status(running, until(at_work, 20, what="both ranks at work and the node's agent"))

        held = act("pause")
        assert (held["command"], held["after"]) == ("pause", "paused")
        _stands_still(running, held["step"], run)

        scaled = act("lr", "scale", "0.5")
        assert scaled["step"] == held["step"], "commands work while paused"
        assert scaled["after"] == pytest.approx(scaled["before"] / 2)
        refused = trainctl("pause", *run, check=False)
        assert refused.returncode == 4
        assert "the run is paused already" in refused.stdout

        assert act("resume")["before"] == "paused"
        after = at(running, 1, held["step"] + 5)
        lr = trainctl_json("status", *run)["lr"]
        assert lr["effective"] == pytest.approx(lr["scheduled"] / 2)
        assert after["lr_scheduled"] == pytest.approx(
            trainctl_json("history", "lr_scheduled", *run)["lr_scheduled"][after["step"] - 1][2]
        )  # the schedule itself is untouched: what a scheduler sees is what it set

        changed = act("set", "clip", "0.5")
        assert (changed["before"], changed["after"]) == (1.0, 0.5)
        for rank in (0, 1):
            assert at(running, rank, changed["step"])["clip"] == 0.5
            assert at(running, rank, changed["step"] - 1)["clip"] == 1.0
        assert trainctl_json("get", "clip", *run)["value"] == 0.5

        trial = act("set", "clip", "0.9", "--revert-after", "10")
        kept = act("lr", "set", "1e-3", "--revert-after", "10", "--unless", "loss < 1e9")
        undone = at(running, 1, trial["step"] + 25)
        assert undone["clip"] == 0.5, "on every rank, without the operator"
        assert at(running, 1, trial["step"] + 5)["clip"] == 0.9
        assert trainctl_json("status", *run)["lr"]["effective"] == kept["after"] == 1e-3

        saved = act("checkpoint", "save", "--note", "before the cut", "--pin")
        listed = trainctl_json("checkpoint", "ls", *run)["checkpoints"]
        mine = next(found for found in listed if found["id"] == saved["after"])
        assert (mine["step"], mine["note"], mine["pinned"]) == (saved["step"], "before the cut", True)
        (checked,) = trainctl_json("checkpoint", "verify", saved["after"], *run)["checkpoints"]
        assert checked["ok"] is True

        plan = trainctl_json("rollback", "20", "--dry-run", *run)
        assert (plan["to_step"], plan["skip_batches"], plan["steps_lost"]) == (20, 0, plan["from_step"] - 20)
        assert plan["gpu_hours_lost"] == pytest.approx(plan["time_lost_s"] * 2 / 3600)
        assert plan["time_lost_s"] >= 0.02 * plan["steps_lost"], "each step sleeps longer than that"
        assert plan["hours_lost"].endswith("-hours"), plan["hours_lost"]
        back = act("rollback", "20", "--yes")
        assert (back["after"], back["incarnation"]) == (20, 2)
        assert at(running, 1, 21)["incarnation"] == 2

        evaluated = act("eval")
        value = until(lambda: trainctl_json("status", *run)["metrics"].get("val_loss"), 10)
        assert value["step"] == evaluated["step"]

        stopped = act("stop", "--yes")
        assert running.wait(60) == 0, running.log()
        assert running.step() == stopped["step"]
        assert trainctl_json("status", *run)["state"] == "stopped"
        assert trainctl("audit", "--verify", *run).returncode == 0


def test_a_rollback_on_a_false_condition_touches_nothing_and_last_is_on_the_live_branch(
    tmp_path: Path,
) -> None:
    with job("regression.py", 2, tmp_path, ["--steps", "100000", "--sleep", "0.03"]) as running:
        running.until_step(45)
        run = ["-r", str(running.directory)]
        refused = trainctl("rollback", "20", "--if", "loss < -1", "--yes", *run, check=False)
        assert (refused.returncode, "does not hold" in refused.stdout) == (4, True)
        before = running.step()
        until(lambda: running.step() >= before + 10, 20, what="training goes on")
        back = trainctl_json("rollback", "20", "--if", "loss > -1", "--yes", *run)
        assert (back["state"], back["after"]) == ("applied", 20)
        plan = trainctl_json("rollback", "last", "--dry-run", *run)
        assert plan["to_step"] == 20, "what was left behind at step 40 is not `last`"


def test_a_damaged_checkpoint_is_refused_named_remembered_and_the_next_older_offered(tmp_path: Path) -> None:
    given = ["--steps", "100000", "--sleep", "0.03", "--memory-checkpoints", "0"]
    with job("regression.py", 2, tmp_path, given) as running:
        running.until_step(45)
        run = ["-r", str(running.directory)]
        trainctl_json("pause", *run)
        older, newest = trainctl_json("checkpoint", "ls", *run)["checkpoints"][-2:]
        files = (running.directory / "checkpoints" / newest["id"]).glob("*.distcp")
        data = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        failed = trainctl("rollback", "last", "--yes", *run, check=False)
        assert failed.returncode == 1
        for words in (data.name, "is damaged", f"the next older one is {older['id']}"):
            assert words in failed.stdout
        assert trainctl_json("status", *run)["state"] == "paused", "it stays as it was"
        back = trainctl_json("rollback", "last", "--yes", *run)
        assert (back["state"], back["after"]) == ("applied", older["step"])
        listed = {info["id"]: info["verified"] for info in trainctl_json("checkpoint", "ls", *run)["checkpoints"]}
        assert (listed[newest["id"]], listed[older["id"]]) == (False, True)


def test_a_script_that_never_calls_step_done_is_told_so(tmp_path: Path) -> None:
    with job("forgetful.py", 1, tmp_path) as running:
        running.until_step(210)
        run = ["-r", str(running.directory)]

        def told() -> str:
            return trainctl("log", "--kind", "anomaly", *run, check=False).stdout

        until(lambda: "call run.step_done() once after each optimizer step" in told(), 20)
        waiting = trainctl("lr", "scale", "0.5", "--timeout", "2s", *run, check=False)
        assert waiting.returncode == 4, "there is no optimizer to steer"
        expired = trainctl("pause", "--expires", "1s", "--timeout", "20s", *run, check=False)
        assert expired.returncode == 5
        assert not running.ended()


def _check_status(running: Job, status: dict[str, Any]) -> None:
    assert status.keys() >= STATUS_FIELDS
    assert (status["schema"], status["run"], status["state"], status["world_size"]) == (1, "regression", "running", 2)
    assert 20 <= status["step"] <= running.step() + 5
    assert (status["total_steps"], status["incarnation"], status["attempt"]) == (100000, 1, 1)
    assert 0 <= status["age_s"] < 3
    assert status["eta_s"] > 0
    assert status["metrics"]["loss"]["step"] >= 20
    assert 1 < status["throughput"]["steps_per_s"] < 100
    assert status["throughput"]["tokens_per_s"] == pytest.approx(32 * status["throughput"]["steps_per_s"], rel=0.2)
    assert {"data", "forward", "backward"} <= status["phases"].keys()
    assert [rank["rank"] for rank in status["ranks"]] == [0, 1]
    assert all(rank["state"] == "running" and rank["pid"] > 0 and rank["step_time_s"] > 0 for rank in status["ranks"])
    assert [node["state"] for node in status["nodes"]] == ["alive"]
    assert status["checkpoints"]["count"] >= 1
    assert status["capabilities"]["rollback"] is True
    assert status["dropped"] == 0


def _stands_still(running: Job, step: int, run: list[str]) -> None:
    """For five seconds by the ranks' own heartbeats, which go on, nothing is trained."""

    def heard() -> float:
        status = trainctl_json("status", *run)
        assert (status["state"], status["step"]) == ("paused", step)
        return time.time() - max(float(rank["age_s"]) for rank in status["ranks"])

    first = heard()
    until(lambda: heard() >= first + 5, 15, what="five seconds of heartbeats")
    assert running.step() == step - 1, "the script is inside step_done of that step"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["lr", "scale", "-1"], 2, "above 0"),
        (["lr", "set", "nan"], 2, "finite"),
        (["lr", "set", "-1e-3"], 2, "negative"),
        (["lr", "scale", "0.5", "--group", "7"], 4, "group"),
        (["set", "clip", "99"], 4, "at least 0.1 and at most 10"),
        (["set", "nonsense", "1"], 4, "clip"),
        (["rollback", "7777", "--yes"], 4, "20"),
        (["rollback", "20"], 2, "--yes"),
        (["checkpoint", "verify", "nonsense"], 4, "nonsense"),
        (["pause", "--if", "loss < < 2"], 2, "loss < 2.3"),
        (["pause", "--if", "step < 0"], 4, "does not hold"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_clear_line_and_training_is_not_touched(
    words: list[str], code: int, says: str, patient_run: Job
) -> None:
    before = patient_run.step()
    done = trainctl(*words, "-r", str(patient_run.directory), check=False)
    told = done.stderr + done.stdout
    assert (done.returncode, says in told) == (code, True), told
    assert "Traceback" not in told
    assert len(told.strip().splitlines()) <= 3
    until(lambda: patient_run.step() > before, 10)


@pytest.fixture(scope="module")
def patient_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run that all bad input is tried on; it must survive every one of them."""
    output = tmp_path_factory.mktemp("patient")
    home = {"TRAINCTL_HOME": str(output / "state"), "TRAINCTL_CONFIG": str(output / "config"), "TMPDIR": str(output)}
    with job("regression.py", 1, output, ["--steps", "100000", "--sleep", "0.03"], **home) as running:
        running.until_step(25)
        running.home = home  # type: ignore[attr-defined]
        yield running
        assert not running.ended(), running.log()


@pytest.fixture(autouse=True)
def _home_of_patient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    if "patient_run" in request.fixturenames:
        for name, value in request.getfixturevalue("patient_run").home.items():
            monkeypatch.setenv(name, value)
