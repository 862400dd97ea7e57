"""The command line against a real server: answers, JSON shapes and exit codes of docs/cli.md."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from client.scripted_hub import Script, hub, make_checkpoint, rows, write_journal
from trainctl.cli.main import cli
from trainctl.wire.commands import (
    CheckpointPin,
    CheckpointSave,
    Command,
    LrScale,
    LrSet,
    Pause,
    Rollback,
    SetTunable,
    Stop,
)
from trainctl.wire.messages import LrState, Note, RolledBack, StateChanged

ANSWER = {"schema", "id", "command", "run", "state", "step", "incarnation", "before", "after", "ranks", "reason"}


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


def answer(*words: str, code: int = 0) -> Any:
    result = invoke(*words, "--json")
    assert result.exit_code == code, result.output
    found = json.loads(result.stdout)
    assert found["schema"] == 1
    return found


def error(*words: str, code: int) -> dict[str, str]:
    """The error object; words on stderr say the same."""
    result = invoke(*words, "--json")
    assert result.exit_code == code, result.output
    found = json.loads(result.stdout)
    assert found["schema"] == 1
    assert set(found["error"]) == {"code", "message", "hint"}
    assert found["error"]["message"] in result.stderr
    assert "Traceback" not in result.output
    problem: dict[str, str] = found["error"]
    return problem


# --- looking


def test_status_and_ls_give_the_promised_fields() -> None:
    with hub() as running:
        running.publish(rows(1, 5))
        picture = answer("status")
        assert (picture["run"], picture["state"], picture["step"], picture["total_steps"]) == ("gpt", "running", 5, 100)
        assert picture["lr"] == {"scheduled": 1e-3, "effective": 5e-4}
        assert picture["phases"] == {"forward": 0.6, "backward": 0.4}
        assert picture["eta_s"] == pytest.approx(47.5)
        assert answer("status", "run-1")["id"] == "run-1"
        (listed,) = answer("ls")["runs"]
        assert {"run", "id", "job_id", "state", "step", "total_steps", "host", "dir", "age_s"} <= listed.keys()
        assert (listed["run"], listed["step"], listed["job_id"]) == ("gpt", 5, None)
        words = invoke("status").stdout
        assert "gpt  RUNNING  step 5/100" in words
        assert "lr 5e-4 (scheduled 1e-3)" in words
        assert "gpt" in invoke("ls").stdout
        assert (listed["address"], listed["server_key"]) == (running.card.addresses[0], running.card.server_key)
        assert f"hub  {running.card.addresses[0]}" in words


def test_history_gives_rows_and_rollups() -> None:
    with hub() as running:
        running.publish(rows(1, 50, loss=1.0))
        found = answer("history", "loss", "--from-step", "10", "--to-step", "12")
        assert [row[0] for row in found["loss"]] == [10, 11, 12]
        assert [len(row) for row in found["loss"]] == [4, 4, 4]
        assert found["loss"][0][2:] == [pytest.approx(1.01), 1]
        rollup = answer("history", "loss", "--points", "5")["loss"]
        assert {len(row) for row in rollup} == {8}
        assert sum(row[6] for row in rollup) == 50
        assert "no metric 'x'" in error("history", "x", code=2)["message"]
        assert invoke("history", "loss", "--csv").stdout.splitlines()[0] == "metric,step,time,value,incarnation"
        assert len(invoke("history", "loss", "--csv").stdout.splitlines()) == 51
        assert invoke("history", "loss", "--csv", "--json").exit_code == 2


def test_history_of_a_directory_lists_the_metrics_of_a_run_that_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub() as running:
        running.publish(rows(1, 5, loss=1.0))
        running.publish(rows(2, 3, **{"val/loss": 2.0, "worst": float("nan")}))
        running.publish(RolledBack(time=9.0, step=3, incarnation=2, from_step=5, from_incarnation=1, checkpoint="c"))
        running.publish(rows(4, 5, incarnation=2, loss=7.0))
        live = answer("history")
        write_journal(running)
    directory = running.info.dir
    listed = answer("history", directory)
    assert listed == live
    assert (listed["run"], [one["metric"] for one in listed["metrics"]]) == ("gpt", ["loss", "val/loss", "worst"])
    loss, val, worst = listed["metrics"]
    assert loss == {"metric": "loss", "count": 5, "step": 5, "time": loss["time"], "value": 7.005, "incarnation": 2}
    assert (val["count"], val["step"], val["value"], worst["value"]) == (2, 3, 2.003, "nan")
    assert [one["count"] for one in answer("history", directory, "--from-step", "4")["metrics"]] == [2]

    lines = invoke("history", directory).stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["metric", "count", "step", "last", "incarnation"],
        ["loss", "5", "5", "7.005", "2"],
        ["val/loss", "2", "3", "2.003", "1"],
        ["worst", "2", "3", "nan", "1"],
    ]
    assert invoke("history", directory, "--csv").stdout.startswith(
        "metric,count,step,time,value,incarnation\nloss,5,5,"
    )
    assert len(answer("history", directory, "val/loss")["val/loss"]) == 2
    monkeypatch.chdir(Path(directory).parent)
    assert len(answer("history", Path(directory).name, "loss")["loss"]) == 5, "a run's directory by its name"

    assert invoke("history", directory, "--points", "5").exit_code == 2
    assert invoke("history", directory, "-r", "another").exit_code == 2
    assert "run.json" in error("history", str(tmp_path), code=3)["message"]
    assert "/no/such is no directory" in error("history", "/no/such", code=3)["message"]


def test_a_metric_that_looks_like_a_path_stays_a_metric() -> None:
    with hub() as running:
        running.publish(rows(1, 2, **{"/loss": 1.0, "train/loss": 2.0}))
        assert len(answer("history", "/loss")["/loss"]) == 2
        assert len(answer("history", "train/loss", "/loss")["train/loss"]) == 2


def test_nan_in_a_history_is_a_word() -> None:
    with hub() as running:
        running.publish(rows(1, 1, loss=float("nan")))
        assert answer("history", "loss")["loss"][0][2] == "nan"
        assert answer("status")["metrics"]["loss"]["value"] == "nan"


def test_log_prints_a_line_an_event_in_both_forms() -> None:
    with hub() as running:
        running.publish(rows(1, 3, loss=2.0))
        running.publish(Note(time=5.0, step=2, incarnation=1, actor="ann", text="look \x1b[2J"))
        lines = [json.loads(line) for line in invoke("log", "--json").stdout.splitlines()]
        assert [line["kind"] for line in lines] == ["note", "metrics", "metrics", "metrics"]
        for line in lines:
            assert {"schema", "time", "kind", "step", "incarnation"} <= line.keys()
        assert lines[1]["metrics"] == {"loss": 2.001}
        text = invoke("log").stdout
        assert "step 3/100 | loss 2.003" in text
        assert "ann: look [2J" in text
        assert invoke("log", "-n", "1").stdout == "step 3/100 | loss 2.003\n"
        assert invoke("log", "--kind", "note").stdout.count("\n") == 1
        assert invoke("log", "--from-step", "3", "--kind", "metrics").stdout == "step 3/100 | loss 2.003\n"
        assert invoke("log", "--rank", "1").stdout == ""
        assert invoke("log", "--kind", "nonsense").exit_code == 2


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("stopped", 0), ("failed", 1), ("lost", 1)])
def test_following_the_log_ends_with_the_run(state: Any, code: int) -> None:
    with hub() as running:
        running.publish(rows(1, 2))
        running.publish(StateChanged(time=9.0, step=2, incarnation=1, state=state))
        running.set_state(state=state)
        result = invoke("log", "gpt", "-f")
        assert result.exit_code == code
        assert f"{state} at step 2" in result.stdout


def test_a_recorded_run_is_looked_at_with_the_same_commands() -> None:
    with hub() as running:
        running.publish(rows(1, 5))
        write_journal(running)
    directory = running.info.dir
    assert answer("status", directory)["state"] == "lost"
    assert len(answer("history", "-r", directory, "loss")["loss"]) == 5
    assert "step 5/100" in invoke("log", directory).stdout
    assert answer("wait", directory, "--for", "step >= 5")["holds"] is True
    assert error("pause", "-r", directory, code=3)["code"] == "not_reachable"
    (listed,) = answer("ls", "-a")["runs"]
    assert (listed["state"], listed["step"]) == ("lost", 5)
    assert (listed["address"], listed["server_key"]) == (None, None)
    assert answer("ls")["runs"] == []
    assert "--server-key" not in invoke("status", directory).stdout


def test_what_matches_nothing_says_so() -> None:
    with hub() as running:
        running.publish(rows(1, 9, loss=1.0))
        for words in (("history", "loss", "--from-step", "5", "--to-step", "1"), ("log", "--rank", "9")):
            result = invoke(*words)
            assert (result.exit_code, result.stdout) == (0, "")
            assert "nothing matched" in result.stderr


def test_wait_ends_when_it_is_true_when_time_is_over_and_when_the_run_ends() -> None:
    with hub() as running:
        running.publish(rows(1, 5, loss=2.0))
        found = answer("wait", "--for", "loss < 3 and step >= 5")
        assert (found["holds"], found["step"]) == (True, 5)
        late = answer("wait", "--for", "step >= 90", "--timeout", "0.2s", code=5)
        assert (late["holds"], late["reason"]) == (False, "not within 0.2 s")
        assert error("wait", "--for", "loss <", code=2)["code"] == "bad_request"
        running.set_state(state="finished")
        assert answer("wait", "gpt", "--for", "step >= 90", code=1)["reason"] == "the run is finished"


# --- acting


def test_a_command_prints_who_what_where_before_and_after() -> None:
    applied = ("applied", {"before": 1e-3, "after": 5e-4, "step": 7})
    script = Script(answers=lambda _: [("accepted", {}), ("scheduled", {"step": 7}), applied])
    with hub(script=script):
        found = answer("lr", "scale", "0.5", "--command-id", "c1", "--if", "loss < 9", "--revert-after", "20")
        assert found.keys() >= ANSWER
        assert (found["id"], found["command"], found["run"], found["state"]) == ("c1", "lr scale", "gpt", "applied")
        assert (found["step"], found["ranks"], found["before"], found["after"]) == (7, 2, 1e-3, 5e-4)
        result = invoke("lr", "set", "1e-4", "--group", "1", "--expires", "1m30s")
        assert "gpt: lr set 0.0001 group 1 by" in result.stdout
        assert "applied at step 7 on 2 ranks, 0.001 → 0.0005" in result.stdout
        assert "scheduled for step 7" in result.stderr
    scale, pinned = script.commands
    assert scale.action == LrScale(factor=0.5)
    assert (scale.condition, scale.revert_after) == ("loss < 9", 20)
    assert (pinned.action, pinned.expires_s) == (LrSet(value=1e-4, group=1), 90)


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("applied", 0),
        ("failed", 1),
        ("rejected", 4),
        ("conflict", 4),
        ("superseded", 4),
        ("expired", 5),
        ("unknown", 6),
    ],
)
def test_every_outcome_has_its_exit_code(state: str, code: int) -> None:
    with hub(script=Script(answers=lambda _: [("accepted", {}), (state, {"reason": "so it is"})])):
        found = answer("pause", "--for", "30m", code=code)
        assert (found["state"], found["reason"]) == (state, "so it is")


def test_no_outcome_in_time_is_unknown() -> None:
    with hub(script=Script(answers=lambda _: [("accepted", {})])):
        assert answer("pause", "--timeout", "0.3s", code=6)["state"] == "unknown"


def test_actions_are_what_was_typed() -> None:
    script = Script()
    with hub(script=script) as running:
        make_checkpoint(running.info, "step-10", 10, loss=2.0)
        for words in (
            ("pause", "--for", "1h30m"),
            ("set", "clip", "2"),
            ("checkpoint", "save", "--note", "keep", "--pin"),
            ("checkpoint", "pin", "last"),
            ("rollback", "10", "--skip-batches", "4", "--lr-scale", "0.5", "--yes"),
            ("stop", "--yes"),
        ):
            assert invoke(*words).exit_code == 0, words
    assert [command.action for command in script.commands] == [
        Pause(for_s=5400),
        SetTunable(name="clip", value=2.0),
        CheckpointSave(note="keep", pin=True),
        CheckpointPin(checkpoint="step-10"),
        Rollback(target="10", skip_batches=4, lr_scale=0.5),
        Stop(),
    ]
    assert isinstance(script.commands[1].action, SetTunable)
    assert type(script.commands[1].action.value) is float, "typed as the tunable is"


def test_what_ends_or_undoes_training_asks_first_and_without_a_terminal_is_refused() -> None:
    script = Script()
    with hub(script=script) as running:
        make_checkpoint(running.info, "step-10", 10)
        for words in (("stop",), ("abort",), ("rollback", "last")):
            assert "add --yes" in error(*words, code=2)["hint"]
    assert script.commands == []


def test_tunables_are_listed_and_read() -> None:
    with hub():
        assert answer("tunables")["tunables"][0]["name"] == "clip"
        assert answer("get", "clip")["value"] == 1.0
        assert invoke("get", "clip").stdout == "1\n"
        assert "it has: clip" in error("get", "nope", code=2)["hint"]
        assert "0.1 to 100" in invoke("tunables").stdout


def test_a_refusal_is_passed_on_with_its_reason() -> None:
    def refuse(_: Command) -> list[tuple[str, dict[str, Any]]]:
        return [("rejected", {"reason": "clip = 1000 is out of range: it is at most 100"})]

    with hub(script=Script(answers=refuse)):
        assert "out of range" in answer("set", "clip", "1000", code=4)["reason"]


# --- checkpoints


def test_a_checkpoint_that_the_disk_does_not_give_is_not_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> tuple[int, str]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with hub() as running:
        make_checkpoint(running.info, "step-10", 10, when=10.0, loss=2.0)
        with monkeypatch.context() as disk:
            disk.setattr("trainctl.wire.manifest._hash", fails)
            (found,) = answer("checkpoint", "verify", code=1)["checkpoints"]
            assert (found["ok"], found["readable"]) == (False, False)
            assert "could not be read: Input/output error. It may be whole: try again" in found["text"]
            assert "UNREAD   step-10" in invoke("checkpoint", "verify").stdout
        assert answer("checkpoint", "ls")["checkpoints"][0]["verified"] is None
        assert answer("checkpoint", "verify")["checkpoints"][0]["ok"] is True


def test_checkpoints_are_listed_verified_and_the_damaged_one_is_named() -> None:
    with hub() as running:
        make_checkpoint(running.info, "step-10", 10, when=10.0, loss=2.0)
        damaged = make_checkpoint(running.info, "step-20", 20, when=20.0, loss=1.0) / "data.bin"
        listed = answer("checkpoint", "ls")
        fields = {"id", "step", "time", "bytes", "metrics", "incarnation", "pinned", "verified", "where", "note"}
        assert all(fields <= info.keys() for info in listed["checkpoints"])
        assert listed["checkpoints"][0]["verified"] is None
        assert "step-20" in invoke("checkpoint", "ls").stdout
        assert answer("checkpoint", "verify")["checkpoints"][1]["ok"] is True
        damaged.write_bytes(b"x" * damaged.stat().st_size)
        found = answer("checkpoint", "verify", "20", code=1)["checkpoints"]
        assert [(one["id"], one["ok"]) for one in found] == [("step-20", False)]
        assert "DAMAGED  step-20" in invoke("checkpoint", "verify").stdout
        assert "no checkpoint" in error("checkpoint", "verify", "99", code=4)["message"]


def test_a_loss_has_the_name_of_the_metric_that_it_is() -> None:
    with hub() as running:
        make_checkpoint(running.info, "step-10", 10, loss=2.0, val_loss=2.5)
        assert "(step-10, val_loss 2.500)" in invoke("rollback", "last", "--dry-run").stdout
        assert "val_loss 2.500" in invoke("checkpoint", "ls").stdout


def test_a_rollback_is_shown_as_a_plan_first() -> None:
    script = Script()
    with hub(script=script) as running:
        running.publish(rows(1, 30))
        make_checkpoint(running.info, "step-10", 10, loss=2.0)
        plan = answer("rollback", "last", "--skip-batches", "3", "--lr-scale", "0.5", "--dry-run")
        assert (plan["dry_run"], plan["checkpoint"], plan["from_step"], plan["to_step"]) == (True, "step-10", 30, 10)
        assert (plan["steps_lost"], plan["skip_batches"], plan["lr_now"]) == (20, 3, 5e-4)
        assert plan["lr_after"] == pytest.approx((1e-3 + 0.011) * 0.5)
        took = sum(0.5 + step / 1000 for step in range(11, 31))
        assert plan["time_lost_s"] == pytest.approx(took)
        assert plan["gpu_hours_lost"] == pytest.approx(took * 2 / 3600), "two ranks spent that time"
        assert (
            "20 steps are left behind (10s of training, under 0.01 GPU-hours)"
            in invoke("rollback", "last", "--dry-run").stdout
        )
        assert "from step 30 back to 10 (step-10, loss 2.000)" in invoke("rollback", "best", "--dry-run").stdout
        problem = error("rollback", "99", "--yes", code=4)
        assert "'99' is no checkpoint" in problem["message"]
        assert "step-10" in problem["hint"]
        assert error("rollback", "last", "--lr-scale", "-1", "--dry-run", code=2)["code"] == "bad_request"
    assert script.commands == []


def test_the_plan_tells_the_rate_that_will_be_in_force_or_that_it_is_not_known() -> None:
    with hub() as running:
        running.publish(rows(1, 30, lr=0.02, lr_scheduled=0.1))
        make_checkpoint(running.info, "step-10", 10)
        pinned = LrState(scheduled=0.1, effective=0.05, rule="pin", value=0.05)
        running.set_state(lr=pinned, overrides={"lr": "= 0.05"})
        assert answer("rollback", "last", "--dry-run")["lr_after"] == 0.05
        assert (
            "lr 0.05 → 0.05; what operators have set stays: lr = 0.05" in invoke("rollback", "last", "--dry-run").stdout
        )
        there = answer("rollback", "last", "--restore-overrides", "--dry-run")
        assert there["lr_after"] == pytest.approx(0.02 + 0.011), "what that step was made with"
        running.set_state(lr=LrState(scheduled=0.1, effective=0.05))
        assert answer("rollback", "last", "--dry-run")["lr_after"] is None
        assert "lr 0.05 → n/a" in invoke("rollback", "last", "--dry-run").stdout


# --- bad input


def test_a_command_id_that_stands_for_something_else_is_a_conflict() -> None:
    with hub():
        assert answer("pause", "--command-id", "c1")["state"] == "applied"
        assert answer("pause", "--command-id", "c1")["state"] == "applied", "a repeat gives the first result"
        for words in (("resume",), ("pause", "--for", "3s")):
            found = answer(*words, "--command-id", "c1", code=4)
            assert (found["state"], found["command"], found["after"]) == ("conflict", words[0], None)
            assert "command id c1 stands for `pause` (applied)" in found["reason"]


def test_with_another_key_a_healthy_run_is_not_called_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub("run-1", "b") as one, hub("run-2", "c"):
        one.publish(rows(1, 3))
        write_journal(one)
        monkeypatch.setenv("TRAINCTL_CONFIG", str(tmp_path / "other"))
        for listed in answer("ls")["runs"]:
            assert (listed["state"], listed["problem_code"], listed["address"]) == (None, "not_allowed", None)
            assert listed["problem"].startswith("the source does not know this key")
        assert "lost" not in invoke("ls").stdout
        named = error("pause", "-r", "run-1", code=4)
        unnamed = error("pause", code=4)
        assert named["code"] == unnamed["code"] == "not_allowed"
        for run in ("b (run-1): the source", "c (run-2): the source"):
            assert unnamed["message"].count(run) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("note", "x" * 2001), "the text has 2001 characters: at most 2000"),
        (("note", " "), "the note is empty"),
        (("pause", "--command-id", ""), "'' is no command id: use at most 100 letters"),
        (("pause", "--command-id", "no spaces"), "'no spaces' is no command id"),
        (("rollback", "a/b", "--yes"), "'a/b' is no target"),
        (("lr", "scale", "0.5", "--group", "-1"), "group is -1, which is out of range"),
        (("rollback", "last", "--skip-batches", "1" + "0" * 30, "--yes"), "a number is too large"),
        (("status", "-r", "tcp://foo"), "tcp://foo is no address"),
        (("status", "-r", "tcp://foo:99999"), "is no address"),
        (("top", "tcp://foo"), "is no address"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_plain_words(words: tuple[str, ...], said: str) -> None:
    with hub():
        message = error(*words, code=2)["message"]
        assert said in message
        assert not {"Expected", "regex", "$."} & set(message.replace("`", " ").split())


@pytest.mark.parametrize("option", [("-r", "gpt"), ("--run", "gpt"), ("--json",)])
def test_an_option_before_the_subcommand_says_where_it_goes(option: tuple[str, ...]) -> None:
    result = invoke(*option, "status")
    assert result.exit_code == 2
    assert f"{option[0]} goes after the subcommand" in result.stderr
    assert f"trainctl status {option[0]}" in result.stderr
    assert "after the subcommand" in invoke("--help").stdout


def test_each_bad_input_is_one_clear_line_with_what_to_do() -> None:
    assert error("status", code=3)["code"] == "run_not_found"
    with hub("run-1", "gpt") as running:
        assert "no run 'nope'" in error("status", "nope", code=3)["message"]
        assert "negative" in error("lr", "set", "-1", code=2)["message"]
        assert "finite" in error("lr", "set", "nan", code=2)["message"]
        assert "finite" in error("lr", "scale", "inf", code=2)["message"]
        assert error("lr", "scale", "half", code=2)["code"] == "usage"
        assert error("status", "one", "-r", "two", code=2)["code"] == "usage"
        assert error("pause", "--for", "soon", code=2)["code"] == "usage"
        assert error("nonsense", code=2)["code"] == "usage"
        with hub("run-2", "gpt"):
            problem = error("pause", code=2)
            assert problem["code"] == "ambiguous_run"
            assert "run-1" in problem["message"]
            assert "run-2" in problem["message"]
        address = running.card.addresses[0]
        assert error("status", "-r", address, "--server-key", "short", code=2)["code"] == "bad_request"
    assert error("tui", "somewhere", code=3)["code"] == "run_not_found"


def test_the_audit_log_is_listed_and_its_chain_checked() -> None:
    from trainctl.store.audit import AuditLog

    with hub() as running:
        path = Path(running.info.dir) / "audit.jsonl"
        log = AuditLog(path)
        log.append({"time": 1.0, "command": "pause", "actor": "ann", "state": "accepted"})
        log.append({"time": 2.0, "command": "pause", "actor": "ann", "state": "applied"})
        running.script.audit = path.read_text().splitlines()
        assert [entry["state"] for entry in answer("audit")["audit"]] == ["accepted", "applied"]
        assert "command=pause" in invoke("audit").stdout
        assert answer("audit", "--verify")["ok"] is True
        path.write_text(path.read_text().replace("ann", "bob", 1))
        assert answer("audit", "--verify", code=1)["ok"] is False
