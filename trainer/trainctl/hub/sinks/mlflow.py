"""MLflow: one MLflow run for one run of ours, across restarts. Needs `mlflow-skinny`, or all of `mlflow`.

MLflow keeps every value that was ever logged at a step, so what a rollback abandoned stays there; the metric
`trainctl/incarnation` is logged at each branch's first step to tell where one began.
"""

import os
import re
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
import numpy as np

from trainctl.hub.sinks.sink import Branching, Start
from trainctl.wire.messages import FINAL_STATES, Body, Rows, RunInfo, RunState, Stream

_METRICS_A_CALL = 1000  # MLflow's limits
_PARAMS_A_CALL = 100
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "lost": "FAILED", "preempted": "KILLED"}
_INVALID = re.compile(r"[^\w\-. :/]")


class MlflowSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`tracking_uri` left out is what MLFLOW_TRACKING_URI says, or `mlruns` in the run's directory."""

    enabled: bool = True
    tracking_uri: str | None = None
    experiment: str = "trainctl"


class MlflowSink:
    """See `sink.Sink`."""

    streams: ClassVar[frozenset[Stream]] = frozenset({"metrics"})
    history: ClassVar[bool] = True

    def __init__(self, settings: MlflowSettings) -> None:
        self._settings = settings
        self._client: Any = None
        self._id = ""
        self._incarnation = 0
        self._waiting: list[Any] = []

    def open(self, start: Start) -> dict[str, str]:
        uri = self._settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"file:{start.directory}/mlruns"
        if uri.startswith(("file:", "/", ".")):
            # MLflow asks whoever wants its file store to say so.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        info = start.picture.info
        self._id = start.notes.get("id", "")
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._create(info)
        return {"id": self._id}

    def _create(self, info: RunInfo) -> str:
        found = self._client.get_experiment_by_name(self._settings.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._settings.experiment)
        tags = {"trainctl.run_id": info.id, "trainctl.host": info.host, "trainctl.directory": info.dir}
        made = self._client.create_run(experiment, start_time=_ms(info.started), tags=tags, run_name=info.run)
        from mlflow.entities import Param

        params = [Param(_name(name), str(value)) for name, value in info.config.items()]
        for some in _some(params, _PARAMS_A_CALL):
            self._client.log_batch(made.info.run_id, params=some)
        return str(made.info.run_id)

    def branch(self, branching: Branching) -> None:
        """Nothing can be taken back: see the module."""

    def write(self, body: Body) -> None:
        if not isinstance(body, Rows):
            return
        from mlflow.entities import Metric

        if body.steps and body.incarnation != self._incarnation:
            self._incarnation = body.incarnation
            self._waiting.append(
                Metric("trainctl/incarnation", float(body.incarnation), _ms(body.times[0]), body.steps[0])
            )
        for column in body.columns:
            values = np.frombuffer(column.data, f"<{column.dtype}").tolist()
            name = _name(column.name)
            self._waiting.extend(
                Metric(name, value, _ms(at), step)
                for value, at, step in zip(values, body.times, body.steps, strict=True)
            )
        if len(self._waiting) >= _METRICS_A_CALL:
            self._send()

    def flush(self) -> None:
        self._send()

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for some in _some(waiting, _METRICS_A_CALL):
            self._client.log_batch(self._id, metrics=some)

    def close(self, state: RunState) -> None:
        if not self._id:
            return
        self._send()
        if state.state in FINAL_STATES:
            self._client.set_terminated(self._id, _STATUS.get(state.state, "FAILED"), end_time=_ms(time.time()))


def _some(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _name(name: str) -> str:
    """MLflow takes letters, digits, `_-. :/` and at most 250 characters."""
    return _INVALID.sub("_", name)[:250] or "_"
