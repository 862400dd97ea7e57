"""Odd names of metrics and of configuration keys: every sink takes them all, and none of them stops it."""

import asyncio
import re
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import pytest
from hub_double import info, progress, rows
from hypothesis import given
from hypothesis import strategies as st
from sink_reading import curves, wandb_rows
from test_hub_sinks import free_port, scraped
from test_hub_sinks_rules import Bench

from trainctl.hub.sinks.mlflow import MlflowSettings, MlflowSink
from trainctl.hub.sinks.mlflow_names import Names, valid
from trainctl.hub.sinks.prometheus import PrometheusSettings, PrometheusSink
from trainctl.hub.sinks.sink import Sink, Start
from trainctl.hub.sinks.tensorboard import TensorBoardSettings, TensorBoardSink
from trainctl.hub.sinks.wandb import WandbSettings, WandbSink
from trainctl.hub.sinks.worker import Job, Worker
from trainctl.store.record import RunRecord
from trainctl.wire.messages import Column, SnapshotRequest
from waiting import until

ODD = [
    *("loss", "/loss", "loss/", "train//loss", "./x", "../x", "..", "loss/val", "loss/val/deep", "a%", "a_"),
    *("deep/down", "deep", " ", "é" * 200, "x" * 300, "_step", "_timestamp", "_wandb", "trainctl/incarnation", "a:b"),
]
CONFIG = {name: at for at, name in enumerate(ODD)} | {"long": "y" * 9000, "lines": "a\r\nb", "none": None}


def start(directory: Path, notes: dict[str, str] | None = None, told: list[str] | None = None) -> Start:
    record = RunRecord(msgspec.structs.replace(info(directory), config=CONFIG))
    tell = [].append if told is None else told.append
    picture = record.snapshot(SnapshotRequest(req=0), [])
    return Start(picture=picture, directory=directory, notes=notes or {}, tell=tell)


def odd_rows(*steps: int) -> Any:
    return rows(*steps, **{name: [at + step / 1000 for step in steps] for at, name in enumerate(ODD)})


@pytest.fixture(autouse=True)
def file_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def mlflow_client(directory: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"file:{directory}/mlruns")


def mlflow_runs(directory: Path) -> list[Any]:
    client = mlflow_client(directory)
    return list(client.search_runs([client.get_experiment_by_name("trainctl").experiment_id]))


# --- MLflow


@given(st.lists(st.text("ab/._%é ", max_size=12) | st.sampled_from(ODD), unique=True), st.integers(0, 9))
def test_mlflow_gets_a_name_of_its_own_for_each_of_ours_and_none_is_the_folder_of_another(
    names: list[str], cut: int
) -> None:
    given_out = Names(kept={}, reserved=["trainctl/incarnation"])
    found = {name: given_out.of(name) for name in names}
    used = ["trainctl/incarnation", *found.values()]
    assert len(set(used)) == len(used)
    for name in used:
        path = PurePosixPath(name)
        assert str(path) == name
        assert not {".", "..", "/"} & set(path.parts)
        assert len(name) <= 250
        assert re.fullmatch(r"[\w\-. :/]+", name)
        assert all(len(part.encode()) <= 255 for part in path.parts)
        assert not {str(folder) for folder in path.parents} & set(used)
    # The next hub, which has seen some of the names, gives the same ones.
    renamed = {name: as_ for name, as_ in found.items() if as_ != valid(name)}
    again = Names(kept=renamed, reserved=["trainctl/incarnation"])
    assert {name: again.of(name) for name in names[cut:] + names[:cut]} == found


def test_names_that_mlflow_takes_stay_as_they_are() -> None:
    names = Names(kept={})
    taken = ["loss", "train/loss", "train/acc 5", "lr-0", "a.b", "grad_norm", "x:y"]
    assert [names.of(name) for name in taken] == taken


def test_mlflow_has_every_odd_metric_and_parameter_and_goes_on_with_the_same_curves(tmp_path: Path) -> None:
    sink = MlflowSink(MlflowSettings())
    notes = sink.open(start(tmp_path))
    sink.flush()
    sink.write(odd_rows(1, 2))
    sink.close(progress(2, "stopped"))
    again = MlflowSink(MlflowSettings())
    assert again.open(start(tmp_path, dict(notes))) == notes
    again.flush()
    again.write(rows(3, **{name: [at + 0.003] for at, name in reversed(list(enumerate(ODD)))}))
    again.close(progress(3, "finished"))

    (run,) = mlflow_runs(tmp_path)
    assert len(run.data.params) == len(CONFIG)
    found = {
        tuple(value.value for value in mlflow_client(tmp_path).get_metric_history(run.info.run_id, name))
        for name in run.data.metrics.keys() - {"trainctl/incarnation"}
    }
    assert found == {(at + 0.001, at + 0.002, at + 0.003) for at in range(len(ODD))}


def test_what_mlflow_refuses_all_the_same_is_left_out_and_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
    from mlflow.tracking import MlflowClient

    real, calls = MlflowClient.log_batch, []

    def strict(self: Any, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        calls.append(1)
        if any(item.key == "deep/down" for item in [*metrics, *params]):
            raise MlflowException("no name of this server", INVALID_PARAMETER_VALUE)
        real(self, run_id, metrics=list(metrics), params=list(params))

    monkeypatch.setattr(MlflowClient, "log_batch", strict)
    sink = MlflowSink(MlflowSettings())
    notes = sink.open(start(tmp_path, told=(told := [])))
    sink.flush()
    sink.write(odd_rows(1, 2))
    sink.flush()
    calls.clear()
    sink.write(odd_rows(3))
    sink.flush()
    assert len(calls) == 1, "it is not tried again and again"
    again = MlflowSink(MlflowSettings())
    again.open(start(tmp_path, dict(notes), told))
    again.write(odd_rows(4))
    again.close(progress(4, "finished"))
    assert [text.split(",")[0] for text in told] == [
        "leaves out 'deep/down' of the params",
        "leaves out 'deep/down' of the metrics",
    ]
    (run,) = mlflow_runs(tmp_path)
    assert len(run.data.metrics) == len(ODD)  # without the refused one, with trainctl/incarnation
    assert len(run.data.params) == len(CONFIG) - 1


def test_an_mlflow_that_fails_at_the_parameters_gets_no_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    real, failures = MlflowClient.log_batch, iter([True])

    def shaky(self: Any, run_id: str, **batch: Any) -> None:
        if next(failures, False):
            raise ConnectionError("the server is being restarted")
        real(self, run_id, **batch)

    monkeypatch.setattr(MlflowClient, "log_batch", shaky)

    async def scenario() -> None:
        bench = Bench(tmp_path, told := [])
        bench.record.info = msgspec.structs.replace(bench.record.info, config=CONFIG)
        bench.take(1)
        job = Job(
            name="mlflow",
            history=True,
            make=lambda: MlflowSink(MlflowSettings()),
            access=bench.access(),
            directory=tmp_path,
            tell=lambda _subject, text, _severity: told.append(text),
            state=lambda: bench.record.state,
        )
        worker = Worker(job, head=bench.record.heads["metrics"])
        worker.start()
        await asyncio.to_thread(until, lambda: worker.behind == 0, 20)
        worker.end(drain=True)
        assert await asyncio.to_thread(worker.join, 10)
        assert told[0].startswith("sink mlflow failed (ConnectionError")
        bench.keeper.close()

    asyncio.run(scenario())
    (run,) = mlflow_runs(tmp_path)
    assert (len(run.data.params), run.data.metrics["loss"]) == (len(CONFIG), 1.0)


# --- the others


def test_tensorboard_and_prometheus_show_odd_names_as_they_are(tmp_path: Path) -> None:
    port = free_port()
    sinks: list[Sink] = [TensorBoardSink(TensorBoardSettings()), PrometheusSink(PrometheusSettings(port=port))]
    for sink in sinks:
        sink.open(start(tmp_path))
        sink.write(odd_rows(1))
        sink.flush()
    shown = {name for name in scraped(port) if name.startswith("trainctl_metric{")}
    for sink in sinks:
        sink.close(progress(1))
    assert {name for name in ODD if any(f'metric="{name}"' in sample for sample in shown)} == set(ODD)
    assert curves(tmp_path / "tensorboard").keys() == set(ODD)


@pytest.mark.thorough
def test_wandb_keeps_a_metric_whose_name_is_one_of_its_own(tmp_path: Path) -> None:
    sink = WandbSink(WandbSettings(mode="offline"))
    sink.open(start(tmp_path))
    sink.write(odd_rows(1))
    sink.close(progress(1, "finished"))
    (row,) = until(lambda: wandb_rows(tmp_path), 20, what="the row in W&B's file")
    own = {"_step", "_timestamp", "_wandb", "trainctl/incarnation"}
    assert {name: row[f"{name}_" if name in own else name] for name in ODD} == {
        name: at + 0.001 for at, name in enumerate(ODD)
    }
    assert (row["_timestamp"], row["trainctl/incarnation"]) == (1001, 1)


def test_a_damaged_column_stops_no_sink(tmp_path: Path) -> None:
    damaged = rows(1, 2)
    short = [Column(name="short", dtype="f8", data=b"12345678"), Column(name="none", dtype="f4", data=b"")]
    damaged = msgspec.structs.replace(damaged, columns=[*damaged.columns, *short])
    for sink in (
        MlflowSink(MlflowSettings()),
        WandbSink(WandbSettings(mode="offline")),
        PrometheusSink(PrometheusSettings(port=free_port())),
        TensorBoardSink(TensorBoardSettings()),
    ):
        sink.open(start(tmp_path))
        sink.write(damaged)
        sink.close(progress(2, "finished"))
    assert [value for _, value in curves(tmp_path / "tensorboard")["loss"]] == [1.0, 0.5]
