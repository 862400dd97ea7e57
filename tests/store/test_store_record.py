"""A run as told by its envelopes, and as read back from its directory."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from trainctl.store.history import HISTORY_BYTES
from trainctl.store.journal import JournalWriter
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.replay import NoRecord, load_record
from trainctl.wire import codec
from trainctl.wire.events import kind_of
from trainctl.wire.messages import (
    Anomaly,
    Body,
    CheckpointSaved,
    Column,
    CommandUpdate,
    Envelope,
    Event,
    EventsRequest,
    HistoryRequest,
    NodeChanged,
    NodeReading,
    Note,
    RankFigures,
    Ranks,
    RolledBack,
    Rows,
    RunInfo,
    SnapshotRequest,
    StateChanged,
    stream_of,
)
from trainctl.wire.rundir import RunDir


class Teller:
    """Numbers bodies as a hub does, and tells them to a record."""

    def __init__(self, directory: Path) -> None:
        self.info = RunInfo(
            run="demo",
            id="demo-1",
            dir=str(directory),
            host="h",
            created=1.0,
            started=1.0,
            world_size=1,
            total_steps=100,
        )
        self.record = RunRecord(self.info)
        self.told: list[Envelope] = []

    def tell(self, body: Body, *, attempt: int = 1, link: int = 0) -> Envelope:
        stream = stream_of(body)
        envelope = Envelope(
            source="demo-1",
            epoch=1,
            stream=stream,
            seq=self.record.heads[stream] + 1,
            time=float(len(self.told)),
            body=body,
            attempt=attempt,
            link=link,
        )
        self.record.apply(envelope)
        self.told.append(envelope)
        return envelope

    def write(self, directory: Path) -> None:
        RunDir(directory).create()
        RunDir(directory).info_file.write_bytes(msgspec.json.encode(self.info))
        writer = JournalWriter(RunDir(directory).journal)
        for envelope in self.told:
            writer.append(codec.encode(envelope), envelope.stream, envelope.seq)
        writer.close()


def rows(steps: range, incarnation: int = 1, names: tuple[str, ...] = ("loss",)) -> Rows:
    data = np.array([float(step) for step in steps], "<f8").tobytes()
    return Rows(
        attempt=1,
        incarnation=incarnation,
        steps=list(steps),
        times=[float(step) for step in steps],
        columns=[Column(name=name, dtype="f8", data=data) for name in names],
    )


def state(
    name: str, step: int = 0, *, incarnation: int = 1, attempt: int = 1, parent: int | None = None
) -> StateChanged:
    made = {"time": 1.0, "step": step, "incarnation": incarnation, "state": name, "attempt": attempt, "parent": parent}
    return msgspec.convert(made, StateChanged)


def update(command_id: str, name: str, **more: object) -> CommandUpdate:
    made = {"time": 1.0, "step": 1, "incarnation": 1, "id": command_id, "command": "pause", "args": {}, "actor": "a"}
    return msgspec.convert(made | {"state": name} | more, CommandUpdate)


def note(number: int) -> Note:
    return Note(time=float(number), step=number, incarnation=1, actor="ann", text=str(number))


def test_a_run_that_was_replayed_is_the_run_that_was_lived(tmp_path: Path) -> None:
    teller = Teller(tmp_path)
    teller.tell(state("starting"))
    teller.tell(state("running"))
    teller.tell(rows(range(1, 41), names=("loss", "lr")), link=1)
    teller.tell(CheckpointSaved(time=1.0, step=20, incarnation=1, id="ck-20"), link=2)
    teller.tell(
        RolledBack(time=2.0, step=20, incarnation=2, from_step=40, from_incarnation=1, checkpoint="ck-20"), link=3
    )
    teller.tell(rows(range(21, 31), incarnation=2), link=4)
    teller.tell(Ranks(incarnation=2, ranks=[RankFigures(rank=0, node="n", pid=1, state="running", step=30, time=1.0)]))
    teller.tell(NodeReading(node="n", time=1.0, interval_s=1.0))
    teller.tell(update("c1", "accepted"))
    teller.tell(state("finished", 30, incarnation=2))
    teller.write(tmp_path)
    lived, read = teller.record, load_record(tmp_path)
    asked = SnapshotRequest(req=1)
    assert read.snapshot(asked, []) == lived.snapshot(asked, [])
    assert (read.state.state, read.state.step, read.state.incarnation) == ("finished", 30, 2)
    assert read.state.lr.effective == 40.0
    assert read.link_have(1) == 4
    assert read.metrics.query("loss")["step"].tolist() == list(range(1, 31))
    assert [pending.id for pending in read.pending] == ["c1"]


def test_a_recording_without_an_end_is_of_a_lost_run_and_a_moved_directory_is_still_its_own(tmp_path: Path) -> None:
    teller = Teller(tmp_path / "old")
    teller.tell(state("running"))
    teller.tell(rows(range(1, 4)))
    teller.write(tmp_path / "new")
    read = load_record(tmp_path / "new")
    assert (read.state.state, read.state.since, read.info.dir) == ("lost", 1.0, str(tmp_path / "new"))


def test_a_directory_that_holds_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoRecord, match=r"holds no run: there is no run\.json"):
        load_record(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(NoRecord, match="cannot be read"):
        load_record(tmp_path)


def test_an_envelope_that_was_taken_before_is_ignored(tmp_path: Path) -> None:
    teller = Teller(tmp_path)
    envelope = teller.tell(rows(range(1, 4)), link=9)
    teller.record.apply(envelope)
    assert teller.record.metrics.query("loss")["step"].tolist() == [1, 2, 3]
    assert (teller.record.link_have(1), teller.record.link_have(2)) == (9, 0)


def test_a_rollback_to_an_abandoned_branch_stands_on_that_branch(tmp_path: Path) -> None:
    teller = Teller(tmp_path)
    teller.tell(rows(range(1, 41)))
    for step in (10, 30):
        teller.tell(CheckpointSaved(time=1.0, step=step, incarnation=1, id=f"ck-{step}"))
    teller.tell(RolledBack(time=1.0, step=10, incarnation=2, from_step=40, from_incarnation=1, checkpoint="ck-10"))
    teller.tell(rows(range(11, 21), incarnation=2))
    teller.tell(RolledBack(time=1.0, step=30, incarnation=3, from_step=20, from_incarnation=2, checkpoint="ck-30"))
    teller.tell(rows(range(31, 33), incarnation=3))
    found = teller.record.metrics.query("loss")
    assert found["incarnation"].tolist() == [1] * 30 + [3] * 2
    assert found["step"].tolist() == list(range(1, 33))


def live(record: RunRecord) -> list[tuple[int, int]]:
    """Step and incarnation of each value on the live branch."""
    found = record.metrics.query("loss")
    return list(zip(found["step"].tolist(), found["incarnation"].tolist(), strict=True))


@pytest.mark.parametrize("begins", ["a rollback to what is in memory only", "an attempt"])
def test_what_goes_on_from_an_abandoned_branch_says_which_it_is(begins: str, tmp_path: Path) -> None:
    teller = Teller(tmp_path)
    teller.tell(rows(range(1, 41)))
    teller.tell(CheckpointSaved(time=1.0, step=30, incarnation=1, id="ck-30", error="the disk is full"))
    teller.tell(RolledBack(time=1.0, step=10, incarnation=2, from_step=40, from_incarnation=1, checkpoint="ck-10"))
    teller.tell(rows(range(11, 41), incarnation=2))
    if begins == "an attempt":
        teller.tell(state("starting", 30, incarnation=3, attempt=2, parent=1), attempt=2)
    else:
        teller.tell(
            RolledBack(time=1.0, step=30, incarnation=3, from_step=40, from_incarnation=2, checkpoint="ck-30", parent=1)
        )
    teller.tell(rows(range(31, 33), incarnation=3))
    expected = [(step, 1) for step in range(1, 31)] + [(31, 3), (32, 3)]
    assert live(teller.record) == expected
    teller.write(tmp_path)
    assert live(load_record(tmp_path)) == expected


def test_an_attempt_that_begins_from_nothing_stands_on_nothing(tmp_path: Path) -> None:
    teller = Teller(tmp_path)
    teller.tell(state("starting", parent=0))
    teller.tell(rows(range(1, 4)))
    teller.tell(state("starting", 0, incarnation=2, attempt=2, parent=0), attempt=2)
    assert live(teller.record) == []
    assert teller.record.metrics.live_branch() == [(2, None)]


def test_the_first_outcome_of_a_command_stands_unless_it_was_unknown(tmp_path: Path) -> None:
    teller = Teller(tmp_path)
    for name in ("accepted", "scheduled", "applied", "failed"):
        teller.tell(update("c1", name))
    for name in ("accepted", "unknown", "applied"):
        teller.tell(update("c2", name))
    assert [teller.record.commands[name].state for name in ("c1", "c2")] == ["applied", "applied"]
    assert teller.record.pending == []


def test_events_are_found_by_kind_time_and_step(tmp_path: Path) -> None:
    teller = Teller(tmp_path)
    for number in range(1, 11):
        teller.tell(note(number))
    teller.tell(NodeChanged(time=11.0, step=11, incarnation=1, node="n", state="lost", text="gone"))
    teller.tell(Anomaly(time=12.0, step=12, incarnation=1, what="nan", text="loss is NaN"))

    def steps(**asked: object) -> list[int]:
        request = msgspec.convert({"req": 1} | asked, EventsRequest)
        return [event.step for event in teller.record.events_page(request).events]

    assert steps(limit=3) == [10, 11, 12]
    assert steps(limit=2, kinds=["note"]) == [9, 10]
    assert steps(kinds=["node"]) == [11]
    assert steps(since=9.0, kinds=["note", "anomaly"]) == [9, 10, 12]
    assert steps(from_step=12) == [12]
    event: Event = teller.record.events[-2]
    assert kind_of(event) == "node"
    assert teller.record.snapshot(SnapshotRequest(req=1, events=1), []).events[0].step == 12


def test_a_long_history_comes_in_parts_that_join_without_a_seam(tmp_path: Path) -> None:
    teller = Teller(tmp_path)
    for first in range(1, 60_001, 1000):
        teller.tell(rows(range(first, first + 1000), names=("loss", "lr")))
    steps: dict[str, list[int]] = {"loss": [], "lr": []}
    from_step: int | None = None
    parts = 0
    while True:
        answer = teller.record.history(HistoryRequest(req=1, metrics=["loss", "lr"], from_step=from_step))
        assert len(codec.encode(answer)) < HISTORY_BYTES + 64 * 1024
        for series in answer.series:
            steps[series.name] += np.frombuffer(series.columns["step"], "<i8").tolist()
        parts += 1
        if answer.next_step is None:
            break
        from_step = answer.next_step
    assert parts > 3
    assert steps == {"loss": list(range(1, 60_001)), "lr": list(range(1, 60_001))}


def test_rollups_of_many_metrics_fit_one_answer(tmp_path: Path) -> None:
    teller = Teller(tmp_path)
    names = tuple(f"m{number}" for number in range(20))
    teller.tell(rows(range(1, 20_001), names=names))
    answer = teller.record.history(HistoryRequest(req=1, metrics=list(names), points=10_000))
    assert len(codec.encode(answer)) < codec.DATA_LIMIT
    assert answer.next_step is None
    counted = [np.frombuffer(series.columns["count"], "<i8").sum() for series in answer.series]
    assert counted == [20_000] * 20


@pytest.mark.parametrize("packed", [False, True])
def test_what_another_rank_read_of_earlier_steps_does_not_set_the_run_back(tmp_path: Path, *, packed: bool) -> None:
    teller = Teller(tmp_path)
    teller.tell(state("running"))
    teller.tell(rows(range(1, 101), names=("loss", "lr")), link=1)
    teller.tell(rows(range(40, 61), names=("data_first.1", "data_last.1")), link=2)
    assert (teller.record.state.step, teller.record.state.step_time) == (100, 100.0)
    teller.write(tmp_path)
    if packed:
        pack_segment(RunDir(tmp_path).journal, 1)
    read = load_record(tmp_path)
    assert (read.state.step, read.state.step_time, read.state.lr.effective) == (100, 100.0, 100.0)
    assert read.metrics.query("data_last.1")["step"].tolist() == list(range(40, 61))
    rolled_back = RolledBack(time=2.0, step=20, incarnation=2, from_step=100, from_incarnation=1, checkpoint="c")
    teller.tell(rolled_back, link=3)
    teller.tell(rows(range(61, 81), names=("data_first.1",)), link=4)
    assert (teller.record.state.step, teller.record.state.incarnation) == (20, 2), "a late word of the branch before"
    teller.tell(rows(range(21, 23), incarnation=2), link=5)
    assert teller.record.state.step == 22
