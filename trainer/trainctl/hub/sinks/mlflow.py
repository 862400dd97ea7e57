"""MLflow: one MLflow run for one run of ours, across restarts. Needs `mlflow-skinny`, or all of `mlflow`.

MLflow keeps every value that was ever logged at a step, so what a rollback abandoned stays there; the metric
`trainctl/incarnation` is logged at each branch's first step to tell where one began.
"""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import msgspec

from trainctl.hub.sinks.columns import values_of
from trainctl.hub.sinks.mlflow_names import Names, valid
from trainctl.hub.sinks.sink import Branching, Start
from trainctl.wire.messages import FINAL_STATES, Body, Rows, RunInfo, RunState, Stream

_METRICS_A_CALL = 1000  # MLflow's limits
_PARAMS_A_CALL = 100
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "lost": "FAILED", "preempted": "KILLED"}
_BAD_REQUEST = 400
_INCARNATION = "trainctl/incarnation"
_RENAMED, _REFUSED, _PARAMS_LOGGED = "name:", "refused:", "params"  # of the notes


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
        self._notes: dict[str, str] = {}
        self._config: dict[str, Any] = {}
        self._names = Names(kept={})
        self._refused: set[str] = set()
        self._tell: Callable[[str], None] = lambda _: None

    def open(self, start: Start) -> dict[str, str]:
        uri = self._settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"file:{start.directory}/mlruns"
        if uri.startswith(("file:", "/", ".")):
            # MLflow asks whoever wants its file store to say so.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        info = start.picture.info
        self._notes, self._config, self._tell = start.notes, dict(info.config), start.tell
        kept = {note.removeprefix(_RENAMED): used for note, used in self._notes.items() if note.startswith(_RENAMED)}
        self._names = Names(kept=kept, reserved=[_INCARNATION])
        for name in start.picture.metrics:
            self._name(name)
        self._id = self._notes.get("id", "")
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
        else:
            # Nothing that may fail comes after this: a run whose id nobody noted would be made anew at each try.
            self._id = self._notes["id"] = self._create(info)
        return self._notes

    def _create(self, info: RunInfo) -> str:
        found = self._client.get_experiment_by_name(self._settings.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._settings.experiment)
        tags = {"trainctl.run_id": info.id, "trainctl.host": info.host, "trainctl.directory": info.dir}
        made = self._client.create_run(experiment, start_time=_ms(info.started), tags=tags, run_name=info.run)
        return str(made.info.run_id)

    def branch(self, branching: Branching) -> None:
        """Nothing can be taken back: see the module."""

    def write(self, body: Body) -> None:
        if not isinstance(body, Rows):
            return
        from mlflow.entities import Metric

        if body.steps and body.incarnation != self._incarnation:
            self._incarnation = body.incarnation
            self._waiting.append(Metric(_INCARNATION, float(body.incarnation), _ms(body.times[0]), body.steps[0]))
        for metric, values in values_of(body).items():
            name = self._name(metric)
            if name in self._refused:
                continue
            self._waiting.extend(
                Metric(name, value, _ms(at), step)
                for value, at, step in zip(values, body.times, body.steps, strict=True)
            )
        if len(self._waiting) >= _METRICS_A_CALL:
            self._send()

    def _name(self, metric: str) -> str:
        name = self._names.of(metric)
        if name != valid(metric):
            self._notes[_RENAMED + metric] = name  # the next hub goes on with the same curve
        return name

    def flush(self) -> None:
        if _PARAMS_LOGGED not in self._notes:
            self._log_params()
        self._send()

    def close(self, state: RunState) -> None:
        if not self._id:
            return
        self._send()
        if state.state in FINAL_STATES:
            self._client.set_terminated(self._id, _STATUS.get(state.state, "FAILED"), end_time=_ms(time.time()))

    # --- to MLflow

    def _log_params(self) -> None:
        """The run's configuration, once: parameters cannot be changed."""
        from mlflow.entities import Param

        names, there = Names(kept={}), self._client.get_run(self._id).data.params
        params = [Param(names.of(name), str(value)) for name, value in self._config.items()]
        for some in _some([param for param in params if param.key not in there], _PARAMS_A_CALL):
            self._log("params", some)
        self._notes[_PARAMS_LOGGED] = "logged"

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for some in _some(waiting, _METRICS_A_CALL):
            self._log("metrics", some)

    def _log(self, kind: str, some: list[Any]) -> None:
        """Log a batch. One that MLflow refuses for what is in it is logged name by name, without those it refuses."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self._id, **{kind: some})
        except MlflowException as error:
            status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
            if status != _BAD_REQUEST:
                raise
            keys = dict.fromkeys(item.key for item in some)
            if len(keys) > 1:
                for key in keys:
                    self._log(kind, [item for item in some if item.key == key])
            else:
                self._leave_out(kind, next(iter(keys)), error)

    def _leave_out(self, kind: str, name: str, error: Exception) -> None:
        if kind == "metrics":
            self._refused.add(name)
        mark = f"{_REFUSED}{kind}/{name}"
        if mark in self._notes:
            return
        self._notes[mark] = why = " ".join(str(error).split())[:200]
        self._tell(f"leaves out {name!r} of the {kind}, because MLflow refuses it: {why}. All others go on")


def _some(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
