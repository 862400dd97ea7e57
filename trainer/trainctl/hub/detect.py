"""Shows a run's metrics to the detectors as they are recorded, and records what the detectors find."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainctl.hub.detect_past import REPLAYED, past_values
from trainctl.hub.detect_spike import WINDOW, SpikeWatch, Turn
from trainctl.hub.nonfinite import NonFiniteWatch, finite_values
from trainctl.hub.recorder import Recorder
from trainctl.store.record import RunRecord
from trainctl.wire.figures import number
from trainctl.wire.messages import Anomaly, Envelope, Rows

SPIKE = "loss-spike"
NOT_FINITE = frozenset({"nan", "inf"})
CURVES = 64
_SEPARATORS = "_/."
# Steps that are read back to learn again, after a restart, for how long a metric was finite.
_LOOK_BACK = 8 * WINDOW


def is_loss(metric: str) -> bool:
    """Whether a metric is a loss by its name: `loss`, ending in `_loss`, `/loss` or `.loss`, or in a folder `loss/`.

    Capitals are as good as small letters: `Loss/train` is what TensorBoard's own examples log.
    """
    name = metric.lower()
    return name == "loss" or name.startswith("loss/") or (name.endswith("loss") and name[-5] in _SEPARATORS)


Past: TypeAlias = Callable[[str, int], NDArray[np.floating]]


def _no_past(_metric: str, _incarnation: int) -> NDArray[np.floating]:
    return np.empty(0)


class SpikeWatches:
    """A `SpikeWatch` for each loss of the run's newest incarnation. Pure.

    `past` gives the values of the live branch that an incarnation found of a curve when it began: it goes on with them,
    and knows nothing of the branch that was abandoned. An episode that it begins in is told anew, because whoever
    follows the events (alerts, the retention) goes by those of an incarnation.
    """

    def __init__(self, past: Past = _no_past) -> None:
        self._past = past
        self._curves: dict[str, SpikeWatch | None] = {}  # None: known to the incarnation before
        self._goes_on: set[str] = set()  # an episode of the incarnation before, to be told of
        self._incarnation = 0

    def curve(self, metric: str, incarnation: int) -> SpikeWatch | None:
        """The watch of one loss; None for what is not watched. In a new incarnation it is shown the past first."""
        if incarnation > self._incarnation:
            self._incarnation = incarnation
            self._curves = dict.fromkeys(self._curves)
            self._goes_on.clear()
        if incarnation < self._incarnation or not is_loss(metric):
            return None
        if metric not in self._curves and len(self._curves) >= CURVES:
            return None
        watch = self._curves.get(metric)
        if watch is None:
            watch = self._curves[metric] = SpikeWatch()
            watch.observe(self._past(metric, incarnation))
            if watch.spiking:
                self._goes_on.add(metric)
        return watch

    def resume(self, metric: str, incarnation: int, past: NDArray[np.floating], told: Anomaly | None) -> None:
        """Begin to watch in the middle of an incarnation, after all of `past`. What operators were told last of it on
        the live branch counts."""
        spiking = told is not None and told.severity == "warning"
        self._incarnation = max(self._incarnation, incarnation)
        if not is_loss(metric) or len(self._curves) >= CURVES:
            return
        watch = self._curves[metric] = SpikeWatch()
        watch.observe(past)
        if watch.spiking != spiking:
            watch.assume(spiking=spiking)
        if told is not None and told.incarnation < incarnation and watch.spiking:
            self._goes_on.add(metric)

    def observe(self, rows: Rows) -> list[Anomaly]:
        """The episodes that begin or end in these rows."""
        found: list[Anomaly] = []
        for column in rows.columns:
            curve = self.curve(column.name, rows.incarnation)
            values = finite_values(rows, column)
            if curve is not None and values is not None and len(values):
                if column.name in self._goes_on:
                    self._goes_on.remove(column.name)
                    found.append(_goes_on(rows, column.name, float(values[0])))
                found += [_told(rows, column.name, turn) for turn in curve.observe(values)]
        return found


def _told(rows: Rows, metric: str, turn: Turn) -> Anomaly:
    step, value, usual = rows.steps[turn.at], number(turn.value), number(turn.usual)
    if turn.begins:
        text = f"{metric} leapt to {value} at step {step}: usually {usual}, robust z {turn.z:.0f}"
    elif turn.stays:
        text = f"{metric} stays at {value}, at step {step}: it was {usual}, and this is what is usual from now on"
    else:
        text = f"{metric} is back at {value} at step {step}"
    return Anomaly(
        time=rows.times[turn.at],
        step=step,
        incarnation=rows.incarnation,
        what=SPIKE,
        text=text,
        severity="warning" if turn.begins else "info" if turn.stays else "good",
        metric=metric,
        value=turn.value,
    )


def _goes_on(rows: Rows, metric: str, value: float) -> Anomaly:
    step = rows.steps[0]
    return Anomaly(
        time=rows.times[0],
        step=step,
        incarnation=rows.incarnation,
        what=SPIKE,
        text=f"{metric} is {number(value)} at step {step}: it had leapt before the step that the run went back to",
        severity="warning",
        metric=metric,
        value=value,
    )


class Detectors:
    """Follows the recorder. Starts with what the record says of earlier, so that a restart repeats no alarm."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        metrics = recorder.record.metrics

        def past(metric: str, incarnation: int) -> NDArray[np.floating]:
            return past_values(
                metrics, metric, incarnation=incarnation, at_most=_replayed(recorder.record), itself=False
            )

        self._nonfinite, self._spikes = NonFiniteWatch(), SpikeWatches(past)
        learn(recorder.record, self._nonfinite, self._spikes)

    def follow(self, envelope: Envelope) -> None:
        """Look at one recorded envelope."""
        rows = envelope.body
        if not isinstance(rows, Rows) or len(rows.times) != len(rows.steps):
            return
        found = self._nonfinite.observe(rows) + self._spikes.observe(rows)
        for anomaly in sorted(found, key=lambda anomaly: anomaly.step):
            self._recorder.take(anomaly)


def learn(record: RunRecord, nonfinite: NonFiniteWatch, spikes: SpikeWatches) -> None:
    """Bring new detectors to where the record stands."""
    incarnation = record.state.incarnation
    told = [event for event in record.events if isinstance(event, Anomaly) and event.incarnation == incarnation]
    began = {event.metric: event for event in told if event.metric is not None and event.what in NOT_FINITE}
    for metric, newest in began.items():
        if newest.severity == "good":
            continue
        values = _values(record, metric, max(newest.step, record.state.step - _LOOK_BACK), incarnation)
        bad = np.flatnonzero(~np.isfinite(values))
        calm = len(values) - 1 - int(bad[-1]) if len(bad) else len(values)
        error = newest.what if newest.severity == "error" else None
        nonfinite.assume(metric, incarnation, calm=calm, error=error)
    live = dict(record.metrics.live_branch())
    turned: dict[str | None, Anomaly] = {}
    for event in record.events:
        if isinstance(event, Anomaly) and event.what == SPIKE and event.incarnation in live:
            cut = live[event.incarnation]
            if cut is None or event.step <= cut:
                turned[event.metric] = event
    for metric in filter(is_loss, record.metrics.names):
        past = past_values(record.metrics, metric, incarnation=incarnation, at_most=_replayed(record))
        spikes.resume(metric, incarnation, past, turned.get(metric))


def _replayed(record: RunRecord) -> int:
    """How many values of each loss may be shown again."""
    return REPLAYED // max(1, min(CURVES, sum(map(is_loss, record.metrics.names))))


def _values(record: RunRecord, metric: str, from_step: int, incarnation: int) -> NDArray[np.floating]:
    found = record.metrics.query(metric, from_step=max(0, from_step), incarnation=incarnation)
    return found["value"].astype("f8")
