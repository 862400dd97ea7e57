"""How often somebody is woken: never for the same thing twice, and always for what lasts."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainctl.hub.alerts_gate import Gate, HeldBack, Limits
from trainctl.wire.messages import Anomaly, Event, NodeChanged, RankChanged, RolledBack, Severity, StateChanged

LIMITS = Limits(per_hour=20, repeat_s=300.0)
EARLIER: frozenset[Severity] = frozenset({"warning", "error"})


def state(name: str, *, step: int = 50, attempt: int = 1) -> StateChanged:
    return StateChanged(time=0.0, step=step, incarnation=1, state=name, attempt=attempt)  # type: ignore[arg-type]


def anomaly(
    what: str,
    severity: Severity = "error",
    *,
    metric: str | None = None,
    text: str = "t",
    incarnation: int = 1,
    subject: str | None = None,
) -> Anomaly:
    return Anomaly(
        time=0.0,
        step=50,
        incarnation=incarnation,
        what=what,
        text=text,
        severity=severity,
        metric=metric,
        subject=subject,
    )


def node(name: str, severity: Severity = "warning") -> NodeChanged:
    return NodeChanged(time=0.0, step=50, incarnation=1, node="a", state=name, text="t", severity=severity)


def rank(name: str, severity: Severity = "error") -> RankChanged:
    return RankChanged(time=0.0, step=50, incarnation=1, rank=3, node="a", state=name, text="t", severity=severity)


def hear(gate: Gate, event: Event, now: float, limits: Limits = LIMITS) -> bool:
    """What the hub does with an event that would wake somebody."""
    gate.note(event)
    return gate.admit(event, now, limits)


def due(gate: Gate, now: float, limits: Limits = LIMITS) -> list[Event]:
    found: list[Event] = []
    while (event := gate.due(now, limits)) is not None:
        found.append(event)
    return found


def test_a_run_that_recovers_and_stalls_for_good_wakes_somebody_again() -> None:
    gate = Gate()
    assert hear(gate, state("stalled"), 0.0)
    gate.note(state("running"))
    assert hear(gate, state("stalled"), 100.0)


@pytest.mark.parametrize("name", ["stalled", "lost", "failed"])
def test_twenty_metrics_that_turn_nan_do_not_hold_back_the_end_of_the_run(name: str) -> None:
    gate = Gate()
    sent = [hear(gate, anomaly("nan", metric=f"m{number}"), 0.0) for number in range(25)]
    assert sent == [True] * 20 + [False] * 5
    assert hear(gate, state(name), 1.0)
    assert gate.take_held() == HeldBack(over_rate=5)
    gate = Gate()
    gate.note(state(name))
    assert gate.admit(state(name), 0.0, LIMITS, room=False), "nor does a queue that is full"


def test_a_run_that_stalls_all_the_time_wakes_nobody_more_often_than_the_rate_but_its_end_does() -> None:
    gate, limits = Gate(), Limits(per_hour=2, repeat_s=300.0)
    woken = []
    for number in range(4):
        woken.append(hear(gate, state("stalled", step=number), 10.0 * number, limits))
        gate.note(state("running", step=number + 1))
    assert woken == [True, True, False, False]
    assert due(gate, 4000.0, limits) == [], "it goes on"
    assert hear(gate, state("lost"), 50.0, limits)


def test_what_is_over_the_rate_is_sent_when_there_is_room_unless_it_is_over() -> None:
    gate, limits = Gate(), Limits(per_hour=1, repeat_s=300.0)
    lasting, passing = anomaly("inf", metric="b"), anomaly("nan", metric="c")
    assert [hear(gate, event, 0.0, limits) for event in (anomaly("nan", metric="a"), lasting, passing)] == [
        True, False, False,
    ]  # fmt: skip
    gate.note(anomaly("nan", "good", metric="c"))
    assert due(gate, 3599.0, limits) == []
    assert due(gate, 3600.0, limits) == [lasting]
    assert gate.take_held() == HeldBack(over_rate=1), "the one that is over; the other was sent after all"
    assert due(gate, 9000.0, limits) == []


def test_the_same_thing_again_is_sent_when_its_hold_is_over() -> None:
    gate = Gate()
    first, last = anomaly("metric", text="one"), anomaly("metric", text="three")
    assert [hear(gate, event, at) for event, at in ((first, 0.0), (anomaly("metric"), 10.0), (last, 20.0))] == [
        True, False, False,
    ]  # fmt: skip
    assert gate.take_held() == HeldBack(repeated=2)
    assert due(gate, 299.0) == []
    assert due(gate, 300.0) == [last]
    assert gate.take_held() == HeldBack()
    assert hear(gate, first, 599.0) is False
    assert hear(gate, first, 600.0), "it goes by itself, and what was kept of it is not sent beside it"
    assert due(gate, 9000.0) == []


@pytest.mark.parametrize(
    ("begins", "ends"),
    [
        (state("stalled"), state("paused")),
        (state("stalled"), state("stalled", attempt=2)),
        (anomaly("nan", metric="loss"), anomaly("nan", "good", metric="loss")),
        (anomaly("loss-spike", "warning", metric="loss"), anomaly("loss-spike", "info", metric="loss")),
        (anomaly("disk-full"), anomaly("disk-full", "good")),
        (node("lost"), node("alive", "good")),
        (rank("stuck"), rank("running", "good")),
        (rank("dead"), state("starting", attempt=2)),
        (
            anomaly("nan", metric="loss"),
            RolledBack(time=0.0, step=5, incarnation=2, from_step=50, from_incarnation=1, checkpoint="c"),
        ),
    ],
)
def test_an_episode_that_ended_and_begins_again_is_a_new_one_and_is_not_sent_late(begins: Event, ends: Event) -> None:
    gate = Gate()
    assert hear(gate, begins, 0.0)
    gate.note(ends)
    assert hear(gate, begins, 1.0)
    late = Gate()
    assert not late.admit(begins, 0.0, LIMITS, room=False) or isinstance(begins, StateChanged)
    late.note(ends)
    assert due(late, 9000.0) == []


@pytest.mark.parametrize(
    "other",
    [
        anomaly("nan", "good", metric="val_loss"),
        anomaly("inf", "good", metric="loss"),
        state("running"),
        node("alive", "good"),
    ],
)
def test_the_end_of_something_else_changes_nothing(other: Event) -> None:
    gate, nan = Gate(), anomaly("nan", metric="loss")
    assert hear(gate, nan, 0.0)
    gate.note(other)
    assert not hear(gate, nan, 1.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (anomaly("sink", subject="wandb"), anomaly("sink", subject="mlflow")),
        (anomaly("dropped", subject="link"), anomaly("dropped", subject="size")),
        (anomaly("journal", subject="not written"), anomaly("journal", subject="damaged")),
    ],
)
def test_what_is_about_different_subjects_wakes_and_ends_each_by_itself(one: Anomaly, other: Anomaly) -> None:
    gate = Gate()
    assert [hear(gate, one, 0.0), hear(gate, other, 10.0)] == [True, True], "it is not the same thing again"
    gate = Gate()
    assert not gate.admit(one, 0.0, LIMITS, room=False)
    assert not gate.admit(other, 0.0, LIMITS, room=False)
    gate.note(msgspec.structs.replace(one, severity="good"))
    assert due(gate, 9000.0) == [other], "the end of something else has no say in it"
    assert not hear(restarted(one, other, msgspec.structs.replace(one, severity="good")), other, 5.0)


def test_a_gradient_that_was_noted_and_becomes_an_error_is_not_the_same_thing() -> None:
    gate = Gate()
    assert hear(gate, anomaly("inf", "info", metric="grad_norm"), 0.0)
    assert hear(gate, anomaly("inf", "error", metric="grad_norm"), 1.0)


# --- a hub that was started again


def restarted(*events: Event) -> Gate:
    gate = Gate()
    gate.remember(events, 0.0, severities=EARLIER)
    return gate


@pytest.mark.parametrize(
    "event", [anomaly("journal"), anomaly("disk-low", "warning"), anomaly("audit"), node("lost"), rank("dead")]
)
def test_what_the_last_hub_told_wakes_nobody_again_while_it_lasts(event: Event) -> None:
    gate = restarted(event)
    assert not hear(gate, event, 5.0)
    assert due(gate, 9000.0) == []
    assert hear(gate, event, 10_000.0), "so long after the start it is something new"


def test_what_was_over_before_the_restart_or_is_another_thing_wakes() -> None:
    assert hear(restarted(anomaly("journal"), anomaly("journal", "good")), anomaly("journal"), 5.0)
    assert hear(restarted(node("lost"), node("alive", "good")), node("lost"), 5.0)
    assert hear(restarted(anomaly("journal", text="block 7 is damaged")), anomaly("journal", text="no space"), 5.0)


def test_a_new_hub_that_takes_a_stalled_run_for_running_at_first_repeats_no_alert() -> None:
    gate = restarted(state("stalled", step=7))
    gate.note(state("running", step=7))
    assert not hear(gate, state("stalled", step=7), 400.0)
    assert hear(gate, state("stalled", step=9), 500.0), "it stepped meanwhile: another stall"
    assert hear(gate, state("lost", step=9), 501.0)


def test_a_stall_that_was_over_before_the_restart_is_not_the_one_after_it() -> None:
    gate = restarted(state("stalled", step=7), state("running", step=7))
    assert hear(gate, state("stalled", step=7), 20.0)


# --- whatever happens


@given(
    moves=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["tell", "end"]), st.floats(0, 2000)), max_size=80),
    per_hour=st.integers(1, 8),
    repeat_s=st.floats(0, 1000),
)
def test_never_more_than_the_rate_and_whatever_lasts_is_told_in_the_end(
    moves: list[tuple[int, str, float]], per_hour: int, repeat_s: float
) -> None:
    gate, limits, now = Gate(), Limits(per_hour=per_hour, repeat_s=repeat_s), 0.0
    sent: list[float] = []
    untold: set[str | None] = set()  # metrics whose newest alert was neither sent nor is over
    for number, move, after_s in moves:
        now += after_s
        sent += [now] * len(found := due(gate, now, limits))
        untold -= {event.metric for event in found if isinstance(event, Anomaly)}
        if move == "end":
            gate.note(anomaly("nan", "good", metric=f"m{number}"))
            untold.discard(f"m{number}")
        elif hear(gate, anomaly("nan", metric=f"m{number}"), now, limits):
            sent.append(now)
            untold.discard(f"m{number}")
        else:
            untold.add(f"m{number}")
    for at in sent:
        assert sum(1 for other in sent if 0 <= at - other < 3600) <= per_hour
    for _ in range(7):
        now += 3600.0
        untold -= {event.metric for event in due(gate, now, limits) if isinstance(event, Anomaly)}
    assert untold == set()
    assert min(gate.held.repeated, gate.held.over_rate) >= 0
