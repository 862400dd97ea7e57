"""An agent as a source: found by its card, one for each job, back at the same place after a crash, gone when told."""

import asyncio
import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from agent_process import agent

from trainctl.wire.cards import card_file, read_cards
from trainctl.wire.messages import Snapshot, SnapshotRequest
from trainctl.wire.peer import Refused
from waiting import until


def test_a_card_says_where_the_agent_is(tmp_path: Path) -> None:
    with agent(tmp_path, "--no-gpus", job="4711") as running:
        card = running.card
        assert (card.kind, card.source, card.name, card.job_id) == ("agent", f"{card.host}-4711", card.host, "4711")
        assert card.host == os.uname().nodename
        assert card_file(card).name == f"agent-{card.host}-4711.json"
        assert stat.S_IMODE(card_file(card).stat().st_mode) == 0o600
        reading = running.reads()
        assert (reading.node, reading.state, reading.interval_s) == (card.name, "alive", 1.0)
        assert reading.memory_used_bytes
        assert reading.memory_total_bytes
        assert 0 < reading.memory_used_bytes < reading.memory_total_bytes


def test_cpu_is_unknown_in_the_first_reading_and_a_percentage_after(tmp_path: Path) -> None:
    with agent(tmp_path, "--no-gpus", "--interval", "0.2") as running:
        reading = running.reads(lambda reading: reading.cpu is not None)
    assert reading.cpu is not None
    assert 0 <= reading.cpu <= 100


def test_sigterm_ends_it_cleanly_and_takes_the_card_away(tmp_path: Path) -> None:
    with agent(tmp_path) as running:
        running.reads()
        running.process.terminate()
        assert running.wait() == 0
        assert read_cards() == []
        assert running.stderr == ""


def test_a_second_agent_of_the_same_job_leaves_and_says_who_is_there(tmp_path: Path) -> None:
    with agent(tmp_path, "--no-gpus") as first:
        pid = first.card.pid
        with agent(tmp_path, "--no-gpus") as second:
            assert second.wait() == 0
            assert second.stderr == f"the agent of job job-1 is already running here (pid {pid})\n"
        with agent(tmp_path, "--no-gpus", job="job-2") as of_another_job:
            of_another_job.reads()
        assert first.process.poll() is None


def test_after_kill_9_the_next_agent_is_found_at_the_same_place(tmp_path: Path) -> None:
    with agent(tmp_path, "--no-gpus") as first:
        before = first.card
        first.process.kill()
        first.wait()
    with agent(tmp_path, "--no-gpus") as second:
        after = second.card
        assert (after.addresses, after.publish_port) == (before.addresses, before.publish_port)
        assert after.epoch > before.epoch
        second.reads()


def test_a_poller_does_not_outlive_an_agent_that_was_killed(tmp_path: Path, gpus) -> None:
    import psutil

    with agent(tmp_path, environment=gpus(1).environment) as running:
        running.reads(lambda reading: reading.gpu_state == "ok")
        (poller,) = psutil.Process(running.process.pid).children()
        running.process.kill()
        running.wait()
        until(lambda: not poller.is_running(), what="the poller leaves")


def test_what_only_a_run_has_is_refused_with_a_hint(tmp_path: Path) -> None:
    async def scenario() -> None:
        peer = await running.connect()
        try:
            with pytest.raises(Refused, match="knows no run") as refused:
                await peer.ask(SnapshotRequest(req=0), Snapshot)
            assert "trainctl ls" in refused.value.hint
        finally:
            peer.close()

    with agent(tmp_path, "--no-gpus") as running:
        asyncio.run(scenario())


def test_without_a_writable_home_it_works_on_and_says_where_it_is(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with agent(tmp_path, "--no-gpus", environment={"TRAINCTL_HOME": str(blocked)}) as running:
        said = until(lambda: running.stderr, 10)
        assert "no card could be written" in said
        assert "tcp://127.0.0.1:" in said
        assert running.process.poll() is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--interval", "0"], "--interval is 0.0: use seconds from"),
        (["--interval", "nan"], "--interval is nan"),
        (["--job", "../../x"], "--job is '../../x'"),
        (["--prometheus", "70000"], "use a port from 1 to 65535"),
        (["--linger", "0"], "--linger is 0.0"),
    ],
)
def test_wrong_usage_is_one_clear_line_and_2(options: list[str], said: str) -> None:
    command = [sys.executable, "-P", "-m", "trainctl.agent", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 2
    assert said in ended.stderr


def test_an_address_that_is_not_here_is_one_clear_line_and_1(tmp_path: Path) -> None:
    with agent(tmp_path, "--bind", "192.0.2.1") as running:
        assert running.wait() == 1
        assert running.stderr.startswith("the agent cannot start: ")
        assert running.stderr.count("\n") == 1


def test_prometheus_gets_what_is_known_and_no_sample_of_what_is_not(tmp_path: Path, gpus, unused_port: int) -> None:
    fake = gpus(2)
    fake.gpu(1, lost=1)
    with agent(tmp_path, "--prometheus", str(unused_port), environment=fake.environment) as running:
        node = running.reads(lambda reading: len(reading.gpus) == 2).node
        url = f"http://127.0.0.1:{unused_port}"
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
            text = response.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            urllib.request.urlopen(f"{url}/", timeout=5)
        refused.value.close()
    labels = f'{{node="{node}",gpu="0",uuid="GPU-00000000",name="Fake H100"}}'
    assert f"trainctl_gpu_utilization_ratio{labels} 0.9\n" in text
    assert f"trainctl_gpu_power_watts{labels} 650.0\n" in text
    assert 'gpu="1"' not in text
    assert text.count("# TYPE trainctl_gpu_power_watts gauge\n") == 1
    assert f'trainctl_gpus_ok{{node="{node}",state="GPU 1: GPU is lost' in text


def test_a_port_that_is_taken_costs_prometheus_and_nothing_else(tmp_path: Path) -> None:
    with agent(tmp_path, "--no-gpus") as other:
        taken = other.card.addresses[0].rpartition(":")[2]
        with agent(tmp_path, "--no-gpus", "--prometheus", taken, job="job-2") as running:
            running.reads()
            assert "the agent works on without it" in until(lambda: running.stderr)
