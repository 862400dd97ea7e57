"""Sinks: copies of the history in other tools' forms, written by the hub and in nobody's way."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import msgspec
import pytest
from hub_double import Rank, hub_running, info, progress, rank_linked, rows
from sink_reading import curves, wandb_rows

from trainctl.hub.sinks.prometheus import Newest, PrometheusSettings, PrometheusSink
from trainctl.hub.sinks.sink import Start
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record
from trainctl.wire.cards import read_cards
from trainctl.wire.messages import (
    Anomaly,
    CheckpointSaved,
    GpuReading,
    LinkInfo,
    NodeReading,
    RankFigures,
    Ranks,
    RolledBack,
    SnapshotRequest,
)
from waiting import until


def configure(home: Path, text: str) -> None:
    (home / "config").mkdir(exist_ok=True)
    (home / "config" / "config.toml").write_text(text)


def rolled_back(step: int, incarnation: int, checkpoint: str = "no-such") -> RolledBack:
    return RolledBack(
        time=time.time(),
        step=step,
        incarnation=incarnation,
        from_step=20,
        from_incarnation=incarnation - 1,
        checkpoint=checkpoint,
    )


def asking(run_dir: Path, sinks: list[str], *, attempt: int = 2, config: dict[str, object] | None = None) -> LinkInfo:
    made = info(run_dir, attempt=attempt)
    return LinkInfo(info=msgspec.structs.replace(made, sinks=sinks, config=config or {}))


def told(run_dir: Path) -> list[str]:
    return [event.text for event in load_record(run_dir).events if isinstance(event, Anomaly) and event.what == "sink"]


def test_tensorboard_shows_the_live_branch_only_and_goes_on_after_the_hub_died(tmp_path: Path, own_home: Path) -> None:
    configure(own_home, "[sinks.tensorboard]\n")
    run_dir = tmp_path / "run"
    with hub_running(run_dir) as hub:
        with rank_linked(run_dir) as rank:
            rank.record(rows(*range(1, 21)))
            rank.record(CheckpointSaved(time=1.0, step=15, incarnation=1, id="c15"))
            rank.record(rolled_back(10, 2))
            rank.record(rows(11, 12, 13, incarnation=2, loss=[5.0, 6.0, 7.0]))
            shown = until(lambda: len(found := curves(run_dir / "tensorboard").get("loss", [])) == 13 and found)
            assert [step for step, _ in shown] == list(range(1, 14))
            assert [value for _, value in shown[9:]] == [pytest.approx(0.1), 5.0, 6.0, 7.0]
        hub.kill()
    with hub_running(run_dir), rank_linked(run_dir) as rank:
        rank.sent = rank.have
        rank.record(rows(14, incarnation=2, loss=[8.0]))
        until(lambda: dict(curves(run_dir / "tensorboard")["loss"]).get(14) == 8.0)
        assert [step for step, _ in curves(run_dir / "tensorboard")["loss"]] == list(range(1, 15))
        # Back to a checkpoint of the branch that was left behind: its values 11 to 15 are the live ones again.
        rank.record(rolled_back(15, 3, "c15"))
        rank.record(rows(16, incarnation=3, loss=[9.0]))
        until(lambda: dict(curves(run_dir / "tensorboard")["loss"]).get(16) == 9.0)
        shown = curves(run_dir / "tensorboard")["loss"]
        assert shown == [(step, pytest.approx(1 / step)) for step in range(1, 16)] + [(16, 9.0)]


def test_a_sink_that_is_switched_on_late_gets_the_whole_history_and_the_script_may_ask_for_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with hub_running(run_dir, linger_s=0.3) as hub:
        with rank_linked(run_dir) as rank:
            rank.record(rows(*range(1, 51)))
            rank.record(rows(51, loss=[float("nan")]))
            rank.bye("stopped", 51)
        assert hub.process.wait(15) == 0
    with hub_running(run_dir):
        rank = Rank(run_dir, attempt=2)
        rank.connect(step=51, incarnation=2)
        rank.say(asking(run_dir, ["tensorboard"]))
        rank.record(rows(52, incarnation=2, loss=[0.5]))
        shown = until(lambda: len(found := curves(run_dir / "tensorboard").get("loss", [])) == 52 and found)
        assert [step for step, _ in shown] == list(range(1, 53))
        assert shown[50][1] != shown[50][1], "NaN stays NaN"
        rank.close()


def test_wandb_offline_keeps_one_run_whose_step_may_go_back(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/nowhere/of-the-script")  # a script that uses W&B itself
    configure(own_home, '[sinks.wandb]\nmode = "offline"\n')
    run_dir = tmp_path / "run"
    with hub_running(run_dir, linger_s=0.3) as hub:
        with rank_linked(run_dir) as rank:
            rank.record(rows(1, 2, 3, loss=[3.0, 2.0, float("nan")]))
            rank.record(rolled_back(1, 2))
            rank.record(rows(2, incarnation=2, loss=[1.5]))
            rank.bye("finished", 2)
        assert hub.process.wait(30) == 0
    found = wandb_rows(run_dir)
    assert [(row["trainctl/step"], row["trainctl/incarnation"]) for row in found] == [(1, 1), (2, 1), (3, 1), (2, 2)]
    assert [str(row["loss"]) for row in found] == ["3", "2", "nan", "1.5"]
    assert [row["_timestamp"] for row in found] == [1001, 1002, 1003, 1002]
    files = list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == ["run-demo-1.wandb"]


def test_mlflow_has_values_times_and_parameters_in_one_run_across_attempts(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(own_home, "[sinks.mlflow]\n")
    run_dir = tmp_path / "run"
    for attempt, step in ((1, 1), (2, 3)):
        with hub_running(run_dir, linger_s=0.3) as hub:
            rank = Rank(run_dir, attempt=attempt)
            rank.connect(step=step - 1, incarnation=attempt)
            rank.say(asking(run_dir, [], attempt=attempt, config={"lr": 0.1, "depth": 12}))
            rank.record(rows(step, step + 1, incarnation=attempt, **{"train loss%": [float("nan"), 0.5]}))
            rank.bye("finished", step + 1)
            rank.close()
            assert hub.process.wait(30) == 0
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{run_dir}/mlruns")
    experiment = client.get_experiment_by_name("trainctl")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"lr": "0.1", "depth": "12"}
    assert (run.info.status, run.data.tags["trainctl.run_id"]) == ("FINISHED", "demo-1")
    values = client.get_metric_history(run.info.run_id, "train loss_")
    assert [(value.step, value.timestamp) for value in values] == [
        (step, 1_000_000 + 1000 * step) for step in range(1, 5)
    ]
    assert [str(value.value) for value in values] == ["nan", "0.5", "nan", "0.5"]


def test_prometheus_is_told_the_newest_of_everything_with_its_age(tmp_path: Path, own_home: Path) -> None:
    port = free_port()
    configure(own_home, f"[sinks.prometheus]\nport = {port}\n")
    run_dir = tmp_path / "run"
    figures = RankFigures(rank=3, node="node-a", pid=1, state="running", step=2, time=time.time(), step_time_s=0.25)
    with hub_running(run_dir), rank_linked(run_dir) as rank:
        rank.record(rows(1, 2, loss=[1.0, float("nan")], acc=[0.5, 0.75]))
        rank.record(Ranks(incarnation=1, ranks=[figures]))
        samples = until(lambda: (found := scraped(port)) and any("rank_step_time" in name for name in found) and found)
    assert samples['trainctl_metric{id="demo-1",metric="loss",run="demo"}'] == "NaN"
    assert samples['trainctl_metric{id="demo-1",metric="acc",run="demo"}'] == "0.75"
    assert float(samples['trainctl_metric_age_seconds{id="demo-1",metric="acc",run="demo"}']) > 1e6
    assert samples['trainctl_step{id="demo-1",run="demo"}'] == "2.0"
    assert samples['trainctl_run_state{id="demo-1",run="demo",state="starting"}'] == "1.0"
    assert samples['trainctl_rank_step_time_seconds{id="demo-1",node="node-a",rank="3",run="demo"}'] == "0.25"


def test_prometheus_keeps_the_newest_step_when_another_rank_tells_late_what_it_read(tmp_path: Path) -> None:
    newest = Newest(Start(picture=RunRecord(info(tmp_path)).snapshot(SnapshotRequest(req=0), []), directory=tmp_path))
    newest.take(rows(100, 101, loss=[1.0, 2.0]))
    newest.take(rows(88, 89, 90, **{"data_first.1": [1.0, 2.0, 3.0]}))
    assert [value for name, _, _, value in newest.samples(0.0) if name == "trainctl_step"] == [101]


def test_prometheus_has_no_sample_for_what_was_not_measured(tmp_path: Path) -> None:
    port = free_port()
    sink = PrometheusSink(PrometheusSettings(port=port))
    gpu = GpuReading(index=0, name="H100", uuid="GPU-1", utilization=50.0)
    sink.open(Start(picture=RunRecord(info(tmp_path)).snapshot(SnapshotRequest(req=0), []), directory=tmp_path))
    try:
        sink.write(NodeReading(node="node-a", time=time.time(), interval_s=1.0, gpus=[gpu]))
        samples = scraped(port)
    finally:
        sink.close(progress(1))
    labels = 'gpu="0",id="demo-1",name="H100",node="node-a",run="demo",uuid="GPU-1"'
    assert samples[f"trainctl_gpu_utilization_ratio{{{labels}}}"] == "0.5"
    assert not any("gpu_power" in name or "node_cpu" in name for name in samples)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def scraped(port: int) -> dict[str, str]:
    """Samples by name and sorted labels; none while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    samples = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {_sorted(name): value for name, value in samples}


def _sorted(sample: str) -> str:
    name, _, labels = sample.rstrip("}").partition("{")
    return f"{name}{{{','.join(sorted(labels.split(',')))}}}"


def test_a_sink_that_fails_is_told_of_once_and_gets_what_it_missed(tmp_path: Path, own_home: Path) -> None:
    configure(own_home, f'[sinks.tensorboard]\ndir = "{tmp_path}/shared"\n')
    (tmp_path / "shared").write_text("in the way")
    run_dir = tmp_path / "run"
    with hub_running(run_dir), rank_linked(run_dir) as rank:
        rank.record(rows(*range(1, 11)))
        until(lambda: told(run_dir))
        until(lambda: (tmp_path / "hub-test.log").read_text().count("sink tensorboard failed") >= 2)
        (tmp_path / "shared").unlink()
        until(lambda: len(curves(tmp_path / "shared" / "demo-1").get("loss", [])) == 10)
        until(lambda: len(told(run_dir)) == 2)
    failed, again = told(run_dir)
    assert failed.startswith("sink tensorboard failed (NotADirectoryError")
    assert "training and everything else go on" in failed
    assert again == "sink tensorboard works again, and has what it missed"
    subjects = [event.subject for event in load_record(run_dir).events if isinstance(event, Anomaly)]
    assert subjects == ["tensorboard", "tensorboard"], "so that alerts know whose end it is"


def test_what_cannot_work_is_one_event_each_and_stops_nothing(tmp_path: Path, own_home: Path) -> None:
    configure(own_home, '[sinks.tensorbord]\n[sinks.mlflow]\nuri = "x"\n[sinks.prometheus]\n[sinks.tensorboard]\n')
    run_dir = tmp_path / "run"
    with hub_running(run_dir), rank_linked(run_dir) as rank:
        rank.record(rows(1))
        until(lambda: len(curves(run_dir / "tensorboard").get("loss", [])) == 1)
        until(lambda: len(told(run_dir)) == 3)
    texts = sorted(told(run_dir))
    assert texts[0].startswith("sink mlflow is off: [sinks.mlflow] in config.toml: Object contains unknown field `uri`")
    assert texts[1].startswith("sink prometheus is off: it needs a port")
    assert texts[2] == "there is no sink 'tensorbord'; there are: tensorboard, wandb, mlflow, prometheus"


def test_a_script_switches_a_sink_on_by_one_word(tmp_path: Path, own_home: Path) -> None:
    script = (
        "from trainctl.trainer import Run\n"
        "try: Run.attach('wrong', sinks='tensorboard')\n"
        "except TypeError as error: print(error)\n"
        "with Run.attach('mine', sinks=['tensorboard']) as run:\n"
        "    for step in range(30):\n"
        "        run.log(loss=1.0 / (step + 1))\n"
        "        run.step_done()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert 'sinks takes a list of names, such as ["tensorboard"]' in done.stdout
    runs = own_home / "state" / "runs"
    try:
        directory = until(lambda: next(runs.glob("mine-*/tensorboard"), None), 20)
        shown = until(lambda: len(found := curves(directory).get("loss", [])) == 30 and found, 20)
        assert [step for step, _ in shown] == list(range(1, 31))
    finally:
        for card in read_cards():
            os.kill(card.pid, signal.SIGTERM)


def test_the_hub_loads_no_sink_and_no_library_of_one_before_it_is_switched_on() -> None:
    libraries = ("tensorboard", "wandb", "mlflow", "prometheus_client", "pyarrow", "google.protobuf")
    code = f"import sys, trainctl.hub.__main__; print([name for name in {libraries} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
