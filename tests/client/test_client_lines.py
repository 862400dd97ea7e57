"""The log's lines: the metrics line as docs/cli.md gives it, a line for every event, and nothing a terminal obeys."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.scripted_hub import make_info, rows
from trainctl.client.figures import duration, file_size, memory, number, plain, quantity, scientific
from trainctl.client.jsonable import dumps
from trainctl.client.lines import (
    KINDS,
    data_of_a_rank,
    event_json,
    event_text,
    kind_of,
    metrics_json,
    metrics_line,
    row_values,
    severity_of,
)
from trainctl.client.model import RunModel
from trainctl.wire.messages import (
    Anomaly,
    Beat,
    CheckpointSaved,
    CommandUpdate,
    Envelope,
    Event,
    GpuReading,
    NodeChanged,
    NodeReading,
    Note,
    Output,
    RankChanged,
    RolledBack,
    RunState,
    Snapshot,
    StateChanged,
)

GIB = 2**30
AT = {"time": 1.0, "step": 50, "incarnation": 1}

EVENTS: list[tuple[Event, str]] = [
    (StateChanged(**AT, state="failed", reason="out of memory"), "failed at step 50: out of memory"),
    (
        CommandUpdate(
            **AT, id="c", command="lr scale", args={"factor": 0.5}, actor="mk", state="applied", before=2e-4,
            after=1e-4, ranks=8,
        ),
        "lr scale 0.5 by mk: applied at step 50 on 8 ranks, 0.0002 → 0.0001",
    ),
    (
        CommandUpdate(**AT, id="c", command="pause", args={}, actor="mk", state="rejected", reason="it is over"),
        "pause by mk: rejected: it is over",
    ),
    (
        CommandUpdate(
            **AT, id="c", command="checkpoint save", args={"pin": False}, actor="mk", state="applied", after="c-1"
        ),
        "checkpoint save by mk: applied at step 50, c-1",
    ),
    (
        CommandUpdate(**AT, id="c", command="pause", args={"for_s": 90.0}, actor="mk", state="accepted"),
        "pause for 1m30s by mk: accepted",
    ),
    (
        CommandUpdate(**AT, id="c", command="lr set", args={"value": 0.0, "group": 0}, actor="mk", state="accepted"),
        "lr set 0 group 0 by mk: accepted",
    ),
    (StateChanged(**AT, state="failed", reason="KeyboardInterrupt: "), "failed at step 50: KeyboardInterrupt"),
    (CheckpointSaved(**AT, id="c-1", bytes=1_200_000_000, stall_s=0.038), "checkpoint c-1 saved, 1.2 GB, stall 38 ms"),
    (CheckpointSaved(**AT, id="c-1", error="disk full"), "checkpoint c-1 failed: disk full"),
    (
        RolledBack(
            time=1.0, step=20, incarnation=2, from_step=50, from_incarnation=1, checkpoint="c-1", skipped_batches=40,
            lr_scale=0.5, actor="mk",
        ),
        "rolled back from step 50 to 20 (c-1), skipped 40 batches, lr ×0.5 by mk, incarnation 2",
    ),
    (Anomaly(**AT, what="nan", text="loss is nan"), "loss is nan (step 50)"),
    (RankChanged(**AT, rank=3, node="node-b", state="dead", text="killed"), "rank 3 on node-b: killed"),
    (NodeChanged(**AT, node="node-b", state="lost", text=""), "node node-b: lost"),
    (Output(**AT, rank=0, text="hello"), "rank 0: hello"),
    (Note(**AT, actor="ann", text="look"), "ann: look"),
]  # fmt: skip


@pytest.mark.parametrize(("event", "text"), EVENTS, ids=[kind_of(event) for event, _ in EVENTS])
def test_every_event_is_one_line_and_one_json_object(event: Event, text: str) -> None:
    assert event_text(event) == text
    found = json.loads(dumps(event_json(event)))
    assert {"schema", "time", "kind", "step", "incarnation"} <= found.keys()
    assert found["kind"] in KINDS
    assert severity_of(event) in {"info", "good", "warning", "error"}


def test_the_metrics_line_is_the_one_that_is_promised() -> None:
    model = RunModel(lambda: 0.0)
    gpu = GpuReading(index=0, name="H", utilization=94.0, memory_used_bytes=72 * GIB, memory_total_bytes=80 * GIB)
    reading = NodeReading(node="a", time=1.0, interval_s=1.0, gpus=[gpu])
    state = RunState(
        state="running", since=0.0, step=5000, step_time=0.0, total_steps=100_000, steps_per_s=95000 / 80100
    )
    model.apply(
        Snapshot(
            req=1, info=make_info("r", "gpt"), state=state, heads={}, metrics={}, ranks=[], nodes=[reading],
            checkpoints=[], events=[], commands=[],
        )
    )  # fmt: skip
    values = {"loss": 2.347, "lr": 2.8e-4, "grad_norm": 0.67, "tokens_per_s": 1.24e6, "step_time_s": 0.85}
    assert metrics_line(5000, values, total_steps=100_000, model=model) == (
        "step 5000/100000 | loss 2.347 | lr 2.8e-4 | grad 0.67 | 1.24M tok/s | 0.85 s/step"
        " | gpu 94% 72/80 GB | eta 22h15m"
    )


def test_parts_that_are_missing_are_left_out() -> None:
    assert metrics_line(7, {"loss": 2.0}) == "step 7 | loss 2.000"
    assert metrics_line(7, {"val_loss": 2.5}, total_steps=9) == "step 7/9 | val_loss 2.500"
    assert metrics_line(7, {"loss": float("nan")}) == "step 7 | loss nan"


def test_nan_and_infinities_are_words_in_json() -> None:
    found = json.loads(
        dumps(metrics_json(1, 2.0, 1, {"a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 1.5}))
    )
    assert found["metrics"] == {"a": "nan", "b": "inf", "c": "-inf", "d": 1.5}
    assert found["kind"] == "metrics"


def test_rows_are_read_back_as_they_were_written() -> None:
    found = list(row_values(rows(3, 4, loss=1.0, lr=2.0)))
    assert [(step, values) for step, _, values in found] == [
        (3, {"loss": 1.003, "lr": 2.003}),
        (4, {"loss": 1.004, "lr": 2.004}),
    ]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(2.3471), "2.347"),
        (number(1234567.0), "1.235e6"),
        (number(0.0), "0"),
        (number(float("-inf")), "-inf"),
        (scientific(2.8e-4), "2.8e-4"),
        (scientific(0.05), "0.05"),
        (scientific(1.93e-3), "1.93e-3"),
        (quantity(1_240_000), "1.24M"),
        (quantity(999.9), "1.00k"),
        (quantity(850), "850"),
        (duration(80100), "22h15m"),
        (duration(200), "3m20s"),
        (duration(45), "45s"),
        (duration(86400 * 2), "2d"),
        (duration(1.25), "1.2s"),
        (file_size(15_900_000), "15.9 MB"),
        (memory(72 * GIB, 80 * GIB), "72/80 GB"),
        (memory(None), "n/a"),
    ],
)
def test_figures(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_ever_printed(text: str) -> None:
    assert plain(text).isprintable()
    assert event_text(Note(**AT, actor=text, text=text)).isprintable()


def test_escape_sequences_in_a_note_become_harmless() -> None:
    assert event_text(Note(**AT, actor="x", text="\x1b[2Jgone\nnext\x9b31m")) == "x: [2Jgone next31m"


def test_a_beat_after_envelopes_does_not_make_ages_jump() -> None:
    model = RunModel(lambda: 10.0)
    model.apply(Beat(source="r", epoch=1, time=1000.0, heads={}))
    old = Envelope(source="r", epoch=1, stream="events", seq=1, time=500.0, body=Note(**AT, actor="a", text="b"))
    model.apply(old)  # backfilled
    assert model.age_of(1000.0) == 0.0


def test_what_other_ranks_read_is_for_files_and_not_for_lines() -> None:
    assert metrics_line(8, {"loss": 1.5, "data_first": 14, "data_first.3": 14}) == "step 8 | loss 1.500"
    assert metrics_line(8, {"acc": 0.5, "data_last.63": 15}) == "step 8 | acc 0.5000"
    assert not data_of_a_rank("data_first")
    assert not data_of_a_rank("mydata_first.1")
    assert not data_of_a_rank("data_first.loss")
