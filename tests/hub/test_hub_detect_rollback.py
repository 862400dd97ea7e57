"""After a rollback, or a restart of the hub, a loss's detector is as in a run that only trained the live branch."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_double import RUN, Rank, hub_running, rank_linked, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from trainctl.hub import detect, detect_past
from trainctl.hub.detect import SPIKE, Detectors
from trainctl.hub.detect_past import past_values
from trainctl.hub.detect_spike import REFIT_EVERY, SpikeWatch
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record
from trainctl.wire.messages import Anomaly, Body, Envelope, RolledBack, Rows, RunInfo, stream_of
from waiting import until


class Hub:
    """A record, and the detectors that follow it: the part of a hub that decides."""

    def __init__(self, directory: Path) -> None:
        self.record = RunRecord(
            RunInfo(run="demo", id=RUN, dir=str(directory), host="h", created=0.0, world_size=1, started=0.0)
        )
        self.told: list[Anomaly] = []
        self.step, self.incarnation = 0, 1
        self.live: list[float] = []  # the live branch's losses, by step
        self.restart()

    def take(self, body: Body) -> None:
        stream = stream_of(body)
        envelope = Envelope(
            source="hub", epoch=1, stream=stream, seq=self.record.heads[stream] + 1, time=time.time(), body=body
        )
        self.record.apply(envelope)
        if isinstance(body, Anomaly):
            self.told.append(body)
        else:
            self._detectors.follow(envelope)

    def restart(self) -> None:
        """The detectors of a new process, which knows what is recorded."""
        self._detectors = Detectors(self)  # type: ignore[arg-type]

    def train(self, losses: list[float], at_once: int = 10) -> list[Anomaly]:
        """Further steps, a few to a message; what was told of them."""
        before = len(self.told)
        for first in range(0, len(losses), at_once):
            part = losses[first : first + at_once]
            steps = range(self.step + 1, self.step + 1 + len(part))
            self.take(rows(*steps, incarnation=self.incarnation, loss=part))
            self.step += len(part)
            self.live += part
        return self.told[before:]

    def roll_back(self, to: int) -> None:
        self.incarnation += 1
        event = RolledBack(
            time=time.time(),
            step=to,
            incarnation=self.incarnation,
            from_step=self.step,
            from_incarnation=self.incarnation - 1,
            checkpoint="c",
        )
        self.take(event)
        self.step = to
        del self.live[to:]

    def watch(self) -> SpikeWatch:
        watch = self._detectors._spikes.curve("loss", self.incarnation)
        assert watch is not None
        return watch


def state(watch: SpikeWatch) -> dict[str, Any]:
    """All that it goes by; the ring's order is none of it."""
    fields = dict(vars(watch))
    return fields | {"_window": sorted(fields["_window"].values.tolist()), "_recent": list(fields["_recent"])}


def never_left(losses: list[float]) -> SpikeWatch:
    watch = SpikeWatch()
    watch.observe(np.array(losses))
    return watch


def noisy(count: int, seed: int, level: float = 2.0) -> list[float]:
    return np.random.default_rng(seed).normal(level, 0.1, count).tolist()


def test_a_leap_right_after_a_rollback_is_noticed_by_what_was_usual_at_the_target(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    hub.train(noisy(300, seed=1))
    hub.train(noisy(200, seed=2, level=50.0))  # the abandoned branch: a level of its own
    hub.roll_back(250)
    assert state(hub.watch()) == state(never_left(hub.live)), "nothing of the abandoned branch stays"
    (begin,) = hub.train([40.0])
    assert (begin.what, begin.step, begin.incarnation, begin.severity) == (SPIKE, 251, 2, "warning")
    assert begin.text.startswith("loss leapt to 40.00 at step 251: usually 1.994")


@pytest.mark.parametrize("restarted", [False, True])
def test_an_episode_that_a_rollback_leads_into_goes_on_and_is_told_anew(restarted: bool, tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    assert [event.severity for event in hub.train([*noisy(200, seed=1), *[30.0] * 20, *noisy(40, seed=2)])] == [
        "warning",
        "good",
    ]
    hub.roll_back(210)
    if restarted:
        hub.restart()
    assert hub.watch().spiking
    told = hub.train([30.0, *noisy(20, seed=3)])
    assert [(event.severity, event.incarnation) for event in told] == [("warning", 2), ("good", 2)]
    assert told[0].step == 211
    assert "it had leapt before the step that the run went back to" in told[0].text
    hub.restart()
    assert hub.train(noisy(5, seed=4)) == [], "once"


operations = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.integers(1, 150), st.integers(0, 3)),
        st.tuples(st.just("roll back"), st.integers(0, 1000), st.just(0)),
        st.tuples(st.just("restart"), st.just(0), st.just(0)),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), operations=operations)
def test_whatever_happened_it_decides_as_one_that_saw_the_live_branch_alone(
    seed: int, operations: list[tuple[str, int, int]]
) -> None:
    hub = Hub(Path("/nonexistent"))
    hub.train(noisy(120, seed))
    goes_on = False
    for number, (what, much, leaps) in enumerate(operations):
        match what:
            case "train":
                losses = np.array(noisy(much, seed + number + 1))
                for at in np.random.default_rng(seed + number).integers(0, much, leaps):
                    losses[at : at + 12] *= 10
                before = len(hub.live)
                told = hub.train(losses.tolist(), at_once=7)
                turns = [turn for turn in SpikeWatch().observe(np.array(hub.live)) if turn.at >= before]
                expected = [(turn.at + 1, turn.value) for turn in turns]
                if goes_on:
                    expected.insert(0, (before + 1, float(losses[0])))
                assert [(event.step, event.value) for event in told] == expected
                goes_on = False
            case "roll back":
                hub.roll_back(much % (hub.step + 1))
                goes_on = never_left(hub.live).spiking
            case _:
                hub.restart()
        if what != "roll back" or hub.live:
            assert state(hub.watch()) == state(never_left(hub.live))


@pytest.mark.parametrize("length", [3000, 5003])
def test_of_a_long_curve_the_newest_are_enough(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "REPLAYED", 2000)
    hub = Hub(tmp_path)
    losses = noisy(length, seed=4)
    hub.train(losses, at_once=100)
    hub.roll_back(length - 7)
    past = past_values(hub.record.metrics, "loss", incarnation=2, at_most=2000, itself=False).tolist()
    left_out = length - 7 - len(past)
    assert past == losses[left_out : length - 7]
    assert 1900 <= len(past) <= 2000
    assert left_out % REFIT_EVERY == 0, "so that baselines are fitted after the same values"
    assert state(hub.watch()) == state(never_left(hub.live))


def test_what_is_not_recorded_is_no_past(tmp_path: Path) -> None:
    metrics = Hub(tmp_path).record.metrics
    assert past_values(metrics, "loss", incarnation=1, at_most=detect_past.REPLAYED).size == 0


@pytest.fixture
def told_by(tmp_path: Path) -> Any:
    run_dir = tmp_path / "run"

    def told() -> list[Anomaly]:
        return [event for event in load_record(run_dir).events if isinstance(event, Anomaly) and event.what == SPIKE]

    return run_dir, told


def test_a_real_hub_that_was_started_again_knows_what_is_usual_after_a_rollback(told_by: Any) -> None:
    run_dir, told = told_by

    def sent(losses: list[float], first: int, incarnation: int) -> Rows:
        return rows(*range(first, first + len(losses)), incarnation=incarnation, loss=losses)

    with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
        rank.record(sent(noisy(100, seed=1), 1, 1))
        rank.record(sent(noisy(40, seed=2, level=50.0), 101, 1))
        until(told, 20, what="the leap of the branch that is left")
        rank.record(RolledBack(time=1.0, step=100, incarnation=2, from_step=140, from_incarnation=1, checkpoint="c"))
        until(lambda: load_record(run_dir).state.incarnation == 2, 20, what="the rollback on disk")
        hub.kill()
    with hub_running(run_dir), rank_linked(run_dir) as rank:
        rank.sent = rank.have
        rank.record(sent([40.0], 101, 2))
        until(lambda: len(told()) == 2, 20, what="the leap after the rollback")
    first, second = told()
    assert (first.step, first.incarnation) == (101, 1)
    assert (second.step, second.incarnation, second.severity) == (101, 2, "warning")


def test_after_a_restart_from_an_abandoned_checkpoint_a_hub_knows_what_was_usual_in_that_branch(
    told_by: Any,
) -> None:
    run_dir, told = told_by
    with hub_running(run_dir):
        with rank_linked(run_dir) as rank:
            rank.record(rows(*range(1, 101), loss=noisy(100, seed=1)))
            back = {"time": 1.0, "step": 10, "from_step": 100, "from_incarnation": 1, "checkpoint": "c"}
            rank.record(RolledBack(incarnation=2, **back))  # type: ignore[arg-type]
            rank.record(rows(*range(11, 81), incarnation=2, loss=noisy(70, seed=2, level=50.0)))
            until(lambda: load_record(run_dir).state.step == 80, 20, what="the branch with a level of its own")
        rank = Rank(run_dir, attempt=2)
        rank.connect(step=80, incarnation=3, parent=1)
        try:
            rank.record(rows(81, incarnation=3, loss=[40.0]))
            until(told, 20, what="the leap after the restart")
        finally:
            rank.close()
    (leap,) = told()
    assert (leap.step, leap.incarnation, leap.severity) == (81, 3, "warning")
    assert load_record(run_dir).metrics.live_branch() == [(1, 80), (3, None)]
