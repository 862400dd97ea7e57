"""A real hub wakes somebody: it runs the command of config.toml with what happened on its input."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_double import Rank, hub_running, peer_of, rank_linked, rows, snapshot, snapshot_when

from trainctl.store.replay import load_record
from trainctl.wire.messages import Anomaly
from waiting import until


class Pager:
    """The user's configuration, with a command that writes down what it reads, a line an alert."""

    def __init__(self) -> None:
        self.config = Path(os.environ["TRAINCTL_CONFIG"])
        self.config.mkdir(parents=True, exist_ok=True)
        self.heard = self.config / "heard"
        self.write("cat >> heard")

    def write(self, script: str, **alerts: object) -> None:
        """Install a script as the command."""
        path = self.config / "page.sh"
        path.with_suffix(".new").write_text(f"#!/bin/sh\n{script}\n")
        path.with_suffix(".new").chmod(0o700)
        path.with_suffix(".new").rename(path)
        self.settings(command="./page.sh", **alerts)

    def settings(self, **alerts: object) -> None:
        lines = ["[alerts]", *(f"{name} = {json.dumps(value)}" for name, value in alerts.items())]
        self.replace("\n".join(lines))

    def replace(self, text: str) -> None:
        beside = self.config / "config.new"
        beside.write_text(text)
        beside.rename(self.config / "config.toml")

    def alerts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.heard.read_text().splitlines()] if self.heard.exists() else []

    def until(self, condition: Callable[[dict[str, Any]], object], timeout_s: float = 20.0) -> dict[str, Any]:
        """The first alert for which the condition holds."""
        found = until(lambda: next((alert for alert in self.alerts() if condition(alert)), None), timeout_s)
        assert found is not None
        return found


@pytest.fixture
def pager() -> Pager:
    return Pager()


@pytest.fixture
def training() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait(10)


def losses(count: int, *, seed: int = 1) -> list[float]:
    return np.random.default_rng(seed).normal(2.0, 0.1, count).tolist()


def send(rank: Rank, values: list[float], *, first: int = 1) -> None:
    for at in range(0, len(values), 20):
        part = values[at : at + 20]
        rank.record(rows(*range(first + at, first + at + len(part)), loss=part))


def anomalies(run_dir: Path, what: str) -> list[Anomaly]:
    events = load_record(run_dir).events
    return [event for event in events if isinstance(event, Anomaly) and event.what == what]


def seen(rank: Rank, hub_card: Any, what: str, count: int = 1, severity: str | None = None) -> Anomaly:
    """Wait until the hub has recorded so many anomalies of a kind; return the last."""

    async def scenario() -> Anomaly:
        async with peer_of(hub_card) as peer:
            found = await snapshot_when(peer, lambda found: len(matching(found.events)) >= count, timeout_s=20.0)
            return matching(found.events)[-1]

    def matching(events: list[Any]) -> list[Anomaly]:
        return [
            event
            for event in events
            if isinstance(event, Anomaly) and event.what == what and severity in {None, event.severity}
        ]

    return asyncio.run(scenario())


def test_nan_a_spike_and_the_death_of_rank_0_each_wake_somebody_once(
    tmp_path: Path, pager: Pager, training: subprocess.Popen[bytes]
) -> None:
    run_dir = tmp_path / "run"
    with hub_running(run_dir), rank_linked(run_dir, pid=training.pid) as rank:
        send(rank, losses(100))
        send(rank, [20.0, *losses(30), float("nan"), float("nan")], first=101)
        rank.step(133)
        spike = pager.until(lambda alert: alert["kind"] == "anomaly" and alert["what"] == "loss-spike")
        assert (spike["run"], spike["id"], spike["host"], spike["dir"]) == ("demo", "demo-1", "host-a", str(run_dir))
        assert (spike["step"], spike["severity"], spike["metric"], spike["value"]) == (101, "warning", "loss", 20.0)
        nan = pager.until(lambda alert: alert["kind"] == "anomaly" and alert["what"] == "nan")
        assert (nan["step"], nan["severity"], nan["value"]) == (132, "error", "nan")
        assert nan["summary"] == "demo on host-a: loss is NaN at step 132"
        training.send_signal(signal.SIGKILL)
        lost = pager.until(lambda alert: alert["kind"] == "state")
        assert (lost["state"], lost["severity"]) == ("lost", "error")
        assert "died without a word" in lost["summary"]
    assert [alert.get("what", alert.get("state")) for alert in pager.alerts()] == ["loss-spike", "nan", "lost"]


def test_an_operators_stop_and_an_orderly_end_wake_nobody_and_a_failure_does(tmp_path: Path, pager: Pager) -> None:
    run_dir = tmp_path / "run"
    for attempt, end in enumerate(["stopped", "finished", "failed"], start=1):
        with hub_running(run_dir, linger_s=0.3) as hub:
            with rank_linked(run_dir, attempt=attempt) as rank:
                rank.step(5)
                rank.bye(end, 5)
            assert hub.process.wait(20) == 0
    assert [alert["state"] for alert in pager.alerts()] == ["failed"], "sent before the hub left"


def test_a_restart_of_the_hub_repeats_no_alarm_and_still_notices_the_end_of_an_episode(
    tmp_path: Path, pager: Pager
) -> None:
    run_dir = tmp_path / "run"
    values = [*losses(200), 20.0, 20.0, float("nan")]
    with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
        send(rank, values)
        pager.until(lambda alert: alert["what"] == "nan")
        hub.kill()
    with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
        rank.sent = rank.have
        send(rank, [20.0, float("nan"), *losses(15), 25.0], first=len(values) + 1)
        over = seen(rank, hub.card(), "loss-spike", severity="good")
        assert over.step == len(values) + 2 + 10
        again = pager.until(lambda alert: alert["step"] > len(values))
        assert (again["what"], again["value"]) == ("loss-spike", 25.0), "a spike of its own"
        hub.kill()
    assert [alert["what"] for alert in pager.alerts()] == ["loss-spike", "nan", "loss-spike"]
    assert [event.severity for event in anomalies(run_dir, "nan")] == ["error", "good"]


def test_after_a_rollback_an_alarm_is_a_new_one(tmp_path: Path, pager: Pager) -> None:
    pager.write("cat >> heard", repeat_s=0)
    run_dir = tmp_path / "run"
    with hub_running(run_dir), rank_linked(run_dir) as rank:
        rank.record(rows(1, 2, loss=[1.0, float("nan")]))
        rank.record(rows(2, incarnation=2, loss=[float("nan")]))
        pager.until(lambda alert: alert["incarnation"] == 2)
    assert [alert["incarnation"] for alert in pager.alerts()] == [1, 2]


def test_a_command_that_fails_is_shown_once_and_again_when_it_works(tmp_path: Path, pager: Pager) -> None:
    pager.write("echo no such pager; exit 7", repeat_s=0)
    run_dir = tmp_path / "run"
    with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
        for first in (1, 101, 201):
            rank.record(rows(first, first + 1, **{f"a{first}": [1.0, float("nan")]}))
        shown = seen(rank, hub.card(), "alert-failed")
        assert "nobody was told that a1 is NaN" in shown.text
        assert "page.sh ended with 7; it said: no such pager" in shown.text
        until(lambda: hub.log.read_text().count("the alert command failed") == 3, 20)
        pager.write("cat >> heard", repeat_s=1)
        until(lambda: _takes(rank, pager), 20, what="the corrected command")
        hub.kill()
    told = [event.severity for event in anomalies(run_dir, "alert-failed")]
    assert told[0] == "warning"
    assert told.count("warning") == 1, "three failures, one event, and none about the event itself"


def _takes(rank: Rank, pager: Pager) -> bool:
    rank.sent += 1
    step = 1000 + rank.sent
    rank.record(rows(step, **{f"b{step}": [float("nan")]}), link=rank.sent)
    return bool(pager.alerts())


def test_a_command_that_hangs_is_ended_and_holds_up_nothing(tmp_path: Path, pager: Pager) -> None:
    pager.write("sleep 300", timeout_s=0.5)
    run_dir = tmp_path / "run"
    with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
        rank.record(rows(1, loss=[float("nan")]))

        async def scenario() -> None:
            async with peer_of(hub.card()) as peer:
                for step in range(2, 50):  # the hub answers meanwhile
                    rank.record(rows(step))
                    await snapshot_when(peer, lambda found, step=step: found.state.step == step)  # type: ignore[misc]

        asyncio.run(scenario())
        assert "took longer than 0.5 s and was ended" in seen(rank, hub.card(), "alert-failed").text


def test_more_than_the_rate_is_counted_and_told_later(tmp_path: Path, pager: Pager) -> None:
    pager.write("cat >> heard", per_hour=2)
    run_dir = tmp_path / "run"
    with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
        rank.record(rows(1, **{f"m{number}": [float("nan")] for number in range(6)}))
        until(lambda: len(pager.alerts()) == 2, 20)
        pager.write("cat >> heard", per_hour=3)
        until(lambda: len(_one_more(rank, pager)) == 3, 20, what="the new rate")
        third = pager.alerts()[2]
        assert third["held_back"]["over_rate"] >= 3, "the third itself was held back, and is not counted"
        assert "were held back before this one" in third["summary"]
        assert hub.process.poll() is None


def test_what_was_held_back_and_lasts_is_sent_without_another_event(tmp_path: Path, pager: Pager) -> None:
    pager.write("cat >> heard", per_hour=1)
    run_dir = tmp_path / "run"
    with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
        rank.record(rows(1, a=[float("nan")], b=[float("nan")], c=[float("nan")]))
        rank.record(rows(*range(2, 12), b=[1.0] * 10))
        assert seen(rank, hub.card(), "nan", severity="good").metric == "b"
        pager.until(lambda alert: alert["metric"] == "a")
        pager.write("cat >> heard", per_hour=20)
        pager.until(lambda alert: alert["metric"] == "c")
    assert [alert["metric"] for alert in pager.alerts()] == ["a", "c"]


def _one_more(rank: Rank, pager: Pager) -> list[dict[str, Any]]:
    rank.sent += 1
    rank.record(rows(rank.sent, **{f"n{rank.sent}": [float("inf")]}), link=rank.sent)
    return pager.alerts()


def test_alerts_can_be_switched_on_while_it_runs_and_a_broken_file_changes_nothing(
    tmp_path: Path, pager: Pager
) -> None:
    (pager.config / "config.toml").unlink()
    run_dir = tmp_path / "run"
    with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
        rank.record(rows(1, nobody=[float("nan")]))
        seen(rank, hub.card(), "nan")
        pager.write("cat >> heard")
        until(lambda: _one_more(rank, pager), 20, what="the command that was switched on")
        pager.replace("[alerts\ncommand =")
        broken = seen(rank, hub.card(), "settings")
        assert "cannot be read" in broken.text
        assert broken.text.endswith("the old settings stay")
        before = len(pager.alerts())
        _one_more(rank, pager)
        until(lambda: len(pager.alerts()) > before, 20)
        pager.replace('[alerts]\ncommand = "./page.sh"\ncomand = "x"\n')
        assert "there is no setting alerts.comand" in seen(rank, hub.card(), "settings", 2).text
        hub.kill()
    assert all(alert["kind"] == "anomaly" and alert["what"] == "inf" for alert in pager.alerts())
    assert len(anomalies(run_dir, "settings")) == 2


def test_a_hub_that_leaves_gives_a_running_alert_a_moment_and_ends_one_that_hangs(tmp_path: Path, pager: Pager) -> None:
    pager.write("sleep 1; cat >> heard", timeout_s=60)
    run_dir = tmp_path / "run"
    with hub_running(run_dir, linger_s=0.1) as hub:
        with rank_linked(run_dir) as rank:
            rank.bye("failed", 5)
        assert hub.process.wait(30) == 0
    assert [alert["state"] for alert in pager.alerts()] == ["failed"]

    pager.write("echo $$ > pid; exec sleep 300", timeout_s=60)
    with hub_running(run_dir, linger_s=0.1) as hub:
        with rank_linked(run_dir, attempt=2) as rank:
            rank.bye("failed", 5)
        until((pager.config / "pid").exists, 20)
        began = time.monotonic()
        assert hub.process.wait(60) == 0
        assert time.monotonic() - began < 50
    with pytest.raises(ProcessLookupError):
        os.kill(int((pager.config / "pid").read_text()), 0)


def test_gradients_that_overflow_now_and_then_wake_nobody_and_a_long_row_does(tmp_path: Path, pager: Pager) -> None:
    run_dir = tmp_path / "run"
    with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
        rank.record(rows(1, 2, 3, grad_norm=[float("inf"), float("nan"), 1.0]))
        assert seen(rank, hub.card(), "inf").severity == "info"
        rank.record(rows(*range(20, 60), grad_norm=[1.0] * 10 + [float("inf")] * 30))
        alert = pager.until(lambda alert: True)
        assert (alert["step"], alert["severity"]) == (49, "error")
        assert "was not finite for 20 values in a row" in alert["text"]


def test_the_alerts_see_what_is_recorded_and_the_hub_serves_it(tmp_path: Path, pager: Pager) -> None:
    async def scenario() -> None:
        with hub_running(tmp_path / "run") as hub, rank_linked(tmp_path / "run") as rank:
            rank.record(rows(1, loss=[float("nan")]))
            alert = await asyncio.to_thread(pager.until, lambda alert: True)
            async with peer_of(hub.card()) as peer:
                (event,) = [event for event in (await snapshot(peer)).events if isinstance(event, Anomaly)]
            assert (alert["time"], alert["step"], alert["text"]) == (event.time, event.step, event.text)

    asyncio.run(scenario())
