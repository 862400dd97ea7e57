"""Prometheus: the newest values of the whole run on one port, from the hub that gathers them.

Names and units are those of the agent's own exporter (wire/gauges.py), with `run` and `id` beside them. What is missing
has no sample, a NaN is a NaN, and every group of values has its age, so that an alert can tell "not measured lately"
from "fine".
"""

import time
from collections.abc import Callable, Iterator
from threading import Lock, Thread
from typing import Any, ClassVar

import msgspec

from trainctl.hub.sinks.columns import values_of
from trainctl.hub.sinks.sink import Branching, Start, Unusable
from trainctl.wire.gauges import Gauge, node_gauges
from trainctl.wire.messages import (
    Body,
    NodeReading,
    RankFigures,
    Ranks,
    Rows,
    RunState,
    StateChanged,
    Stream,
)


class PrometheusSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`bind` is an address of this machine; everybody who reaches it may read, so it is the loopback by default."""

    enabled: bool = True
    port: int | None = None
    bind: str = "127.0.0.1"


class PrometheusSink:
    """See `sink.Sink`. Several runs on one machine need several ports."""

    streams: ClassVar[frozenset[Stream]] = frozenset({"metrics", "ranks", "nodes", "events"})
    history: ClassVar[bool] = False

    def __init__(self, settings: PrometheusSettings) -> None:
        self._settings = settings
        self._server: Any = None
        self._thread: Thread | None = None
        self.newest: Newest | None = None

    def open(self, start: Start) -> dict[str, str]:
        if self._settings.port is None:
            raise Unusable('it needs a port: write "[sinks.prometheus]" and "port = 9400" into config.toml')
        import prometheus_client
        from prometheus_client.core import GaugeMetricFamily

        self.newest = Newest(start)
        registry = prometheus_client.CollectorRegistry(auto_describe=False)
        registry.register(_Collector(self.newest, GaugeMetricFamily))
        self._server, self._thread = prometheus_client.start_http_server(
            self._settings.port, addr=self._settings.bind, registry=registry
        )
        return {}

    def branch(self, branching: Branching) -> None:
        """Only the newest values are shown."""

    def write(self, body: Body) -> None:
        assert self.newest is not None, "open comes first"
        self.newest.take(body)

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self, state: RunState) -> None:
        del state
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._thread is not None:
            self._thread.join()


class Newest:
    """The newest of everything; written by the sink's thread, read by those of the HTTP server."""

    def __init__(self, start: Start) -> None:
        picture = start.picture
        self._lock = Lock()
        self._labels = {"run": picture.info.run, "id": picture.info.id}
        self._state: str = picture.state.state
        self._step, self._incarnation = picture.state.step, picture.state.incarnation
        self._metrics = {name: (last.value, last.time) for name, last in picture.metrics.items()}
        self._ranks = {figures.rank: figures for figures in picture.ranks}
        self._nodes = {reading.node: reading for reading in picture.nodes}

    def take(self, body: Body) -> None:
        with self._lock:
            match body:
                case Rows() if body.steps and body.incarnation >= self._incarnation:
                    # What other ranks read of a step comes seconds after it, and says nothing of where the run is.
                    place = (body.incarnation, body.steps[-1])
                    self._incarnation, self._step = max(place, (self._incarnation, self._step))
                    self._metrics |= {name: (values[-1], body.times[-1]) for name, values in values_of(body).items()}
                case Ranks(ranks=ranks):
                    self._ranks.update({figures.rank: figures for figures in ranks})
                case NodeReading():
                    self._nodes[body.node] = body
                case StateChanged():
                    self._state, self._step, self._incarnation = body.state, body.step, body.incarnation
                    if body.state == "starting":
                        self._ranks.clear()
                        self._nodes.clear()
                case _:
                    pass

    def samples(self, now: float) -> Iterator[tuple[str, str, dict[str, str], float | None]]:
        """Name, help, labels and value of every gauge."""
        with self._lock:
            run, state = self._labels, {**self._labels, "state": self._state}
            found: list[tuple[str, str, dict[str, str], float | None]] = [
                ("trainctl_run_state", "1 for the state that the run is in", state, 1.0),
                ("trainctl_step", "Steps completed", run, self._step),
                ("trainctl_incarnation", "Grows with every restart and rollback", run, self._incarnation),
            ]
            for name, (value, at) in self._metrics.items():
                labels = {**run, "metric": name}
                found.append(("trainctl_metric", "Newest value of a metric", labels, value))
                found.append(("trainctl_metric_age_seconds", "Time since it was logged", labels, _age(now, at)))
            for figures in self._ranks.values():
                found.extend(_rank(figures, run, now))
            for reading in self._nodes.values():
                found.extend(_node(reading, run, now))
        yield from found


class _Collector:
    """What prometheus_client asks at every scrape."""

    def __init__(self, newest: Newest, family: Callable[..., Any]) -> None:
        self._newest = newest
        self._family = family

    def collect(self) -> Iterator[Any]:
        families: dict[str, Any] = {}
        for name, text, labels, value in self._newest.samples(time.time()):
            if value is None:
                continue
            if name not in families:
                families[name] = self._family(name, text, labels=list(labels))
            families[name].add_metric(list(labels.values()), value)
        yield from families.values()


def _age(now: float, at: float) -> float:
    return max(0.0, now - at)


def _rank(figures: RankFigures, run: dict[str, str], now: float) -> Iterator[Gauge]:
    labels = {**run, "rank": str(figures.rank), "node": figures.node}
    yield "trainctl_rank_step", "Steps that this rank completed", labels, figures.step
    yield "trainctl_rank_age_seconds", "Time since this rank reported", labels, _age(now, figures.time)
    yield "trainctl_rank_step_time_seconds", "Time of a step", labels, figures.step_time_s
    yield "trainctl_rank_data_wait_seconds", "Time waited for data in a step", labels, figures.data_wait_s
    yield "trainctl_rank_device_memory_bytes", "Memory in use by this rank", labels, figures.memory_bytes
    for phase, seconds in figures.phases_s.items():
        yield "trainctl_rank_phase_seconds", "Time in a phase of a step", {**labels, "phase": phase}, seconds


def _node(reading: NodeReading, run: dict[str, str], now: float) -> Iterator[Gauge]:
    labels = {**run, "node": reading.node}
    yield "trainctl_node_up", "1 while the node's agent answers", labels, float(reading.state == "alive")
    yield "trainctl_node_age_seconds", "Time since this node was measured", labels, _age(now, reading.time)
    yield from node_gauges(reading, labels)
