"""Who is woken by what, how often, and how the command is run."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainctl.hub.alerts import alert_json
from trainctl.hub.alerts_command import run_command
from trainctl.hub.alerts_gate import HeldBack
from trainctl.hub.alerts_rules import wakes
from trainctl.wire.messages import (
    Anomaly,
    CommandUpdate,
    Event,
    NodeChanged,
    Note,
    RankChanged,
    RunInfo,
    StateChanged,
)
from waiting import until

AT = {"time": 1000.0, "step": 50, "incarnation": 1}
INFO = RunInfo(run="demo", id="demo-1", dir="/runs/demo-1", host="a", created=1.0, started=1.0, world_size=2)


def state(name: str, attempt: int = 1) -> StateChanged:
    return StateChanged(**AT, state=name, before="running", attempt=attempt)  # type: ignore[arg-type]


def anomaly(what: str, severity: str = "warning", metric: str | None = None) -> Anomaly:
    return Anomaly(**AT, what=what, text="t", severity=severity, metric=metric)  # type: ignore[arg-type]


# --- which events wake


@pytest.mark.parametrize("name", ["stalled", "lost", "failed"])
def test_a_run_that_stalls_fails_or_is_lost_wakes_whatever_the_least_severity(name: str) -> None:
    assert wakes(state(name), "error")


@pytest.mark.parametrize("name", ["starting", "running", "paused", "stopped", "finished", "preempted", "evaluating"])
def test_what_an_operator_or_the_run_itself_meant_to_do_wakes_nobody(name: str) -> None:
    assert not wakes(state(name), "info")


@pytest.mark.parametrize(
    ("severity", "least", "expected"),
    [
        ("error", "error", True),
        ("warning", "error", False),
        ("warning", "warning", True),
        ("info", "warning", False),
        ("info", "info", True),
        ("good", "info", False),
    ],
)
def test_anomalies_ranks_and_nodes_wake_by_their_severity(severity: str, least: str, expected: bool) -> None:
    found: list[Event] = [
        anomaly("nan", severity),
        RankChanged(**AT, rank=1, node="a", state="dead", text="t", severity=severity),  # type: ignore[arg-type]
        NodeChanged(**AT, node="a", state="lost", text="t", severity=severity),  # type: ignore[arg-type]
    ]
    assert [wakes(event, least) for event in found] == [expected] * 3  # type: ignore[arg-type]


def test_an_alert_about_alerts_or_settings_wakes_nobody() -> None:
    assert not wakes(anomaly("alert-failed", "error"), "info")
    assert not wakes(anomaly("settings", "error"), "info")


def test_commands_and_notes_wake_nobody() -> None:
    failed = CommandUpdate(**AT, id="c", command="stop", args={}, actor="ann", state="failed")
    assert not wakes(failed, "info")
    assert not wakes(Note(**AT, actor="ann", text="t"), "info")


# --- what the command reads


def test_the_command_reads_the_line_of_the_log_with_the_run_and_a_sentence() -> None:
    event = Anomaly(
        **AT, what="nan", text="loss is NaN at step 50", severity="error", metric="loss", value=float("nan")
    )
    assert json.loads(alert_json(event, INFO, HeldBack(repeated=2, over_rate=1))) == {
        "schema": 1,
        "time": 1000.0,
        "kind": "anomaly",
        "step": 50,
        "incarnation": 1,
        "what": "nan",
        "text": "loss is NaN at step 50",
        "severity": "error",
        "metric": "loss",
        "value": "nan",
        "subject": None,
        "run": "demo",
        "id": "demo-1",
        "host": "a",
        "dir": "/runs/demo-1",
        "summary": "demo on a: loss is NaN at step 50 (3 alerts were held back before this one)",
        "held_back": {"repeated": 2, "over_rate": 1},
    }


def test_a_state_says_how_bad_it_is() -> None:
    found = json.loads(alert_json(state("lost"), INFO, HeldBack()))
    assert (found["kind"], found["state"], found["severity"]) == ("state", "lost", "error")
    assert found["summary"] == "demo on a: lost at step 50"


def test_an_alert_that_was_held_back_says_how_old_it_is() -> None:
    found = json.loads(alert_json(anomaly("audit"), INFO, HeldBack(), late_s=280.0))
    assert found["summary"] == "demo on a: t (step 50), 4m40s ago"


# --- running it


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ran(arguments: list[str], directory: Path, *, timeout_s: float = 20.0, stdin: bytes = b"{}\n") -> str | None:
    extra = {"TRAINCTL_RUN": "demo-1"}
    return asyncio.run(run_command(arguments, stdin=stdin, extra=extra, directory=directory, timeout_s=timeout_s))


def test_the_command_gets_stdin_environment_and_a_session_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINCTL_RUN_SECRET", "00" * 32)
    code = (
        "import json, os, sys; json.dump({'in': sys.stdin.read(), 'run': os.environ['TRAINCTL_RUN'],"
        "'secret': 'TRAINCTL_RUN_SECRET' in os.environ, 'sid': os.getsid(0), 'pid': os.getpid()}, open('out', 'w'))"
    )
    assert ran(python(code), tmp_path, stdin=b"x" * 200_000) is None
    found = json.loads((tmp_path / "out").read_text())
    assert (found["in"], found["run"], found["secret"]) == ("x" * 200_000, "demo-1", False)
    assert found["sid"] == found["pid"] != os.getsid(0)


def test_no_shell_reads_the_words(tmp_path: Path) -> None:
    assert ran(["/bin/echo", "$(touch made)", ";", "touch", "made"], tmp_path) is None
    assert not (tmp_path / "made").exists()


def test_a_relative_command_is_found_beside_the_settings(tmp_path: Path) -> None:
    script = tmp_path / "page.sh"
    script.write_text("#!/bin/sh\ncat > got\n")
    script.chmod(0o700)
    assert ran(["./page.sh"], tmp_path) is None
    assert (tmp_path / "got").read_text() == "{}\n"


def test_a_command_need_not_read_its_input(tmp_path: Path) -> None:
    assert ran(["/bin/true"], tmp_path, stdin=b"x" * 500_000) is None


def test_a_command_that_does_not_exist_or_may_not_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    assert ran(["./nowhere"], tmp_path) == "./nowhere cannot be started: No such file or directory"
    assert ran(["./plain"], tmp_path) == "./plain cannot be started: Permission denied"


def test_a_command_that_fails_is_named_with_what_it_said_last(tmp_path: Path) -> None:
    problem = ran(["/bin/sh", "-c", "seq 100000; echo no route to pager >&2; exit 3"], tmp_path)
    assert problem is not None
    assert problem.startswith("/bin/sh ended with 3; it said: ")
    assert problem.endswith("100000 no route to pager")
    assert len(problem) < 500
    assert ran(["/bin/sh", "-c", "kill -9 $$"], tmp_path) == "/bin/sh was killed by SIGKILL"


def test_a_command_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    script = "trap '' TERM; sleep 300 & echo $! > child; echo waiting; wait; sleep 300"
    began = time.monotonic()
    problem = ran(["/bin/sh", "-c", script], tmp_path, timeout_s=0.5)
    assert problem == "/bin/sh took longer than 0.5 s and was ended; it said: waiting"
    assert time.monotonic() - began < 60
    child = int((tmp_path / "child").read_text())
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE, 10)


def test_what_a_command_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    assert ran(["/bin/sh", "-c", "sleep 300 & echo $! > child"], tmp_path) is None
    child = psutil.Process(int((tmp_path / "child").read_text()))
    assert child.is_running(), "whoever pages in the background may do so"
    child.kill()


def test_a_command_that_is_cancelled_is_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        running = asyncio.create_task(
            run_command(
                ["/bin/sh", "-c", "echo $$ > pid.new; mv pid.new pid; exec sleep 300"],
                stdin=b"",
                extra={},
                directory=tmp_path,
                timeout_s=300,
            )
        )
        await asyncio.to_thread(until, (tmp_path / "pid").exists, 20)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
