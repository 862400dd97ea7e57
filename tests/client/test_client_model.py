"""The run model: what a client knows, how old it is, and that no order of messages confuses it."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.scripted_hub import make_info, rows
from trainctl.client.model import RunModel
from trainctl.client.status import status_json
from trainctl.client.status_text import status_text
from trainctl.wire.messages import (
    Beat,
    Body,
    CheckpointInfo,
    CheckpointSaved,
    Column,
    CommandUpdate,
    Envelope,
    LastValue,
    LrState,
    NodeReading,
    Note,
    RankFigures,
    Ranks,
    RolledBack,
    Rows,
    RunState,
    Snapshot,
    StateChanged,
    stream_of,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


SOURCE_AHEAD_S = 5000.0  # the source's wall clock minus this test's monotonic one


def envelope(body: Body, when: float, seq: int = 1) -> Envelope:
    return Envelope(source="run-1", epoch=1, stream=stream_of(body), seq=seq, time=when, body=body)


def state(**changes: object) -> RunState:
    fields: dict[str, object] = {"state": "running", "since": 5000.0, "step": 10, "step_time": 5099.0}
    return RunState(**(fields | {"total_steps": 100, "steps_per_s": 2.0} | changes))  # type: ignore[arg-type]


def snapshot(**changes: object) -> Snapshot:
    fields: dict[str, object] = {
        "req": 1,
        "info": make_info("run-1", "gpt"),
        "state": state(),
        "heads": {},
        "metrics": {"loss": LastValue(step=10, time=5099.0, value=3.0)},
        "ranks": [RankFigures(rank=0, node="node-a", pid=1, state="running", step=10, time=5098.0)],
        "nodes": [],
        "checkpoints": [],
        "events": [Note(time=5090.0, step=8, incarnation=1, actor="ann", text="first")],
        "commands": [],
    }
    return Snapshot(**(fields | changes))  # type: ignore[arg-type]


def known(clock: Clock) -> RunModel:
    model = RunModel(clock)
    model.set_link("live")
    model.apply(snapshot())
    model.apply(Beat(source="run-1", epoch=1, time=clock.now + SOURCE_AHEAD_S, heads={}, run=state()))
    return model


def test_before_anything_was_heard_nothing_is_claimed() -> None:
    model = RunModel(Clock())
    assert (model.info, model.state, model.age_s(), model.eta_s, model.name) == (None, None, None, None, "")
    assert status_json(model)["state"] is None
    assert status_text(model) == "nothing was heard of this run yet"


def test_ages_are_measured_here_and_do_not_care_about_the_sources_clock() -> None:
    clock = Clock()
    model = known(clock)
    clock.now += 7
    assert model.age_s() == pytest.approx(7)
    assert model.metric_age_s("loss") == pytest.approx(8)
    assert model.rank_age_s(1) is None


def test_a_ranks_age_does_not_depend_on_its_own_nodes_clock() -> None:
    clock = Clock()
    model = known(clock)
    figures = RankFigures(rank=0, node="node-b", pid=1, state="running", step=11, time=99.0)  # an hour behind
    model.apply(envelope(Ranks(incarnation=1, ranks=[figures]), clock.now + SOURCE_AHEAD_S))
    clock.now += 4
    assert model.rank_age_s(0) == pytest.approx(4)
    model.apply(envelope(Ranks(incarnation=1, ranks=[figures]), clock.now + SOURCE_AHEAD_S, seq=2))
    assert model.rank_age_s(0) == pytest.approx(4), "the same figures again are no sign of life"


def test_rows_move_the_step_and_the_last_values() -> None:
    model = known(Clock())
    before = model.version
    model.apply(envelope(rows(11, 13, loss=2.0), 5100.0))
    assert model.state is not None
    assert (model.state.step, model.metrics["loss"].step) == (13, 13)
    assert model.metrics["loss"].value == pytest.approx(2.013)
    assert model.version > before


def test_a_column_that_is_not_as_long_as_it_says_is_left_out() -> None:
    model = known(Clock())
    short = Column(name="loss", dtype="f4", data=np.array([1.0], "<f4").tobytes())
    model.apply(envelope(Rows(attempt=1, incarnation=1, steps=[11, 12], times=[1.0, 2.0], columns=[short]), 5100.0))
    assert model.metrics["loss"].value == 3.0


def test_a_rollback_takes_the_step_back_and_rows_of_the_left_branch_do_not_bring_it_forward() -> None:
    model = known(Clock())
    back = RolledBack(time=5101.0, step=5, incarnation=2, from_step=10, from_incarnation=1, checkpoint="c")
    model.apply(envelope(back, 5101.0))
    assert model.state is not None
    assert (model.state.step, model.state.incarnation) == (5, 2)
    model.apply(envelope(rows(11, 11, incarnation=1, loss=2.0), 5102.0))
    assert (model.state.step, model.state.incarnation) == (5, 2)


def test_a_command_is_pending_until_its_outcome_and_a_set_tunable_shows_its_new_value() -> None:
    model = known(Clock())
    update = CommandUpdate(
        time=1.0, step=10, incarnation=1, id="c1", command="set", args={"name": "clip"}, actor="ann", state="accepted"
    )
    model.apply(envelope(update, 5100.0))
    assert list(model.commands) == ["c1"]
    fields = {"state": "applied", "after": 0.5}
    applied = CommandUpdate(**{name: getattr(update, name) for name in update.__struct_fields__} | fields)
    model.apply(envelope(applied, 5101.0, seq=2))
    assert not model.commands
    assert model.info is not None
    assert model.info.tunables[0].value == 0.5


def test_a_failed_checkpoint_is_no_checkpoint_and_a_verified_one_keeps_its_step() -> None:
    model = known(Clock())
    saved = CheckpointSaved(time=1.0, step=10, incarnation=1, id="a", bytes=7, note="n", metrics={"loss": 3.0})
    model.apply(envelope(saved, 5100.0))
    model.apply(envelope(CheckpointSaved(time=2.0, step=11, incarnation=1, id="b", error="disk full"), 5101.0, seq=2))
    model.apply(envelope(CheckpointSaved(time=3.0, step=30, incarnation=1, id="a", verified=True), 5102.0, seq=3))
    expected = CheckpointInfo(
        id="a", step=10, time=1.0, bytes=7, incarnation=1, note="n", metrics={"loss": 3.0}, verified=True
    )
    assert model.checkpoints == [expected]


def test_the_newest_checkpoint_is_that_of_the_newest_incarnation_whatever_a_clock_says() -> None:
    model = known(Clock())
    for seq, (step, incarnation, time) in enumerate(((10, 1, 50.0), (20, 1, 60.0), (15, 2, 40.0)), start=1):
        saved = CheckpointSaved(time=time, step=step, incarnation=incarnation, id=f"c{step}", bytes=7)
        model.apply(envelope(saved, 5100.0, seq=seq))
    assert [info.id for info in model.checkpoints] == ["c10", "c20", "c15"]


def test_a_later_snapshot_keeps_the_events_that_it_no_longer_brings() -> None:
    model = known(Clock())
    model.apply(snapshot(events=[Note(time=5095.0, step=9, incarnation=1, actor="bob", text="second")]))
    assert [event.text for event in model.events if isinstance(event, Note)] == ["first", "second"]


def test_eta_is_for_runs_that_move() -> None:
    model = known(Clock())
    assert model.eta_s == 45
    model.apply(envelope(StateChanged(time=1.0, step=10, incarnation=1, state="paused"), 5100.0))
    assert model.eta_s is None
    model.apply(envelope(StateChanged(time=2.0, step=10, incarnation=1, state="finished"), 5101.0, seq=2))
    assert model.ended


def test_status_has_exactly_the_promised_fields_and_absent_ones_are_null() -> None:
    clock = Clock()
    model = known(clock)
    model.apply(envelope(NodeReading(node="node-a", time=1.0, interval_s=1.0), clock.now + SOURCE_AHEAD_S))
    picture = status_json(model)
    promised = (
        "schema run id job_id state step total_steps incarnation attempt world_size age_s eta_s lr metrics throughput "
        "phases ranks nodes checkpoints capabilities dropped"
    )
    assert set(promised.split()) <= picture.keys()
    assert picture["lr"] == {"scheduled": None, "effective": None}
    assert picture["throughput"] == {"steps_per_s": 2.0, "tokens_per_s": None, "mfu": None}
    assert set(picture["metrics"]["loss"]) == {"step", "value", "age_s"}
    assert [rank["rank"] for rank in picture["ranks"]] == [0, 1], "a rank that never reported is listed too"
    assert {"rank", "node", "pid", "state", "step", "step_time_s", "age_s"} <= picture["ranks"][1].keys()
    assert picture["nodes"][0]["cpu"] is None
    assert {"node", "state", "age_s", "cpu", "memory", "gpus"} <= picture["nodes"][0].keys()
    assert picture["checkpoints"] == {"count": 0, "last": None, "best": None}
    assert picture["capabilities"]["eval"] == "no on_eval was given"
    assert picture["capabilities"]["lr scale"] is True


number = st.floats(allow_nan=True, allow_infinity=True)
bodies = st.one_of(
    st.builds(
        lambda step, count, incarnation, value: rows(step, step + count, incarnation, loss=value),
        st.integers(1, 50),
        st.integers(0, 3),
        st.integers(1, 3),
        number,
    ),
    st.builds(
        RolledBack,
        time=st.just(1.0),
        step=st.integers(0, 50),
        incarnation=st.integers(2, 4),
        from_step=st.just(50),
        from_incarnation=st.just(1),
        checkpoint=st.text(max_size=5),
    ),
    st.builds(
        StateChanged,
        time=st.just(1.0),
        step=st.integers(0, 50),
        incarnation=st.just(1),
        state=st.sampled_from(["running", "paused", "lost"]),
        reason=st.none() | st.text(max_size=8),
    ),
)


@given(st.lists(bodies, max_size=12), number)
def test_whatever_arrives_the_status_is_valid_json_and_one_line_per_part(found: list[Body], rate: float) -> None:
    model = known(Clock())
    version = model.version
    for seq, body in enumerate(found, 1):
        model.apply(envelope(body, 5100.0, seq))
        assert model.version > version
        version = model.version
    beat = state(lr=LrState(scheduled=rate, effective=rate), steps_per_s=abs(rate) if math.isfinite(rate) else None)
    model.apply(Beat(source="run-1", epoch=1, time=5200.0, heads={}, run=beat))
    assert json.loads(json.dumps(status_json(model), allow_nan=False))["schema"] == 1
    assert all(line.isprintable() for line in status_text(model).splitlines())
