"""Journal, packed segments, saved index and rollups together, against plain lists: a model-based test."""

import math
import shutil
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trainctl.store.frames import packed_file, recorded_segments, segment_file, segments
from trainctl.store.journal import JournalIndex, JournalWriter
from trainctl.store.numbers import (
    pack_integers,
    pack_times,
    unpack_integers,
    unpack_times,
)
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record, replay_journal
from trainctl.store.saved import index_file, packed_sizes, read_index, write_index
from trainctl.wire import codec
from trainctl.wire.messages import Body, Column, Envelope, Note, RolledBack, Rows, RunInfo, StateChanged
from trainctl.wire.rundir import RunDir

NAMES = ["loss", "lr", "val/loss"]
numbers = st.one_of(
    st.floats(width=32),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1e-310, 1e300]),
)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50))
def test_integers_come_back(values: list[int]) -> None:
    given_values = np.array(values, "i8")
    assert np.array_equal(unpack_integers(pack_integers(given_values)), given_values)


@given(st.lists(st.one_of(st.floats(0, 4e9), st.floats(), st.just(-0.0)), max_size=50))
def test_times_come_back_to_the_bit(values: list[float]) -> None:
    given_values = np.array(values, "f8")
    found = unpack_times(pack_times(given_values))
    assert np.array_equal(found, given_values, equal_nan=True)


def test_times_of_the_clock_take_a_third_of_their_size() -> None:
    rng = np.random.default_rng(1)
    times = 1.79e9 + np.cumsum(rng.normal(0.05, 0.001, 4096))
    times = np.round(times * 2**22) / 2**22
    assert len(pack_times(times)) < 0.4 * times.nbytes


class History(RuleBasedStateMachine):
    """A hub's record while it is fed, packed, indexed, damaged at its end and opened again."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="tc-model-"))
        self.run = RunDir(self.directory)
        self.run.create()
        self.info = RunInfo(run="m", id="m", dir=str(self.directory), host="h", created=0, started=0, world_size=1)
        self.run.info_file.write_bytes(msgspec.json.encode(self.info))
        self.expected: dict[tuple[str, int], list[tuple[int, float, float]]] = {}
        self.notes: list[str] = []
        self.step, self.incarnation, self.clock = 0, 1, 1.7e9
        self.open()

    def open(self) -> None:
        self.record = RunRecord(self.info)
        self.index = JournalIndex(self.run.journal)
        replay_journal(self.record, self.index, self.run.journal)
        self.writer = JournalWriter(self.run.journal, segment_bytes=3000, index=self.index)

    def take(self, body: Body, stream: str = "events") -> None:
        seq = self.record.heads[stream] + 1
        envelope = Envelope(source="m", epoch=1, stream=stream, seq=seq, time=self.clock, body=body, attempt=1)  # type: ignore[arg-type]
        self.writer.append(codec.encode(envelope), stream, seq)
        self.record.apply(envelope)

    @initialize()
    def begin(self) -> None:
        self.take(StateChanged(time=self.clock, step=0, incarnation=1, state="starting"))

    @rule(data=st.data(), rows=st.one_of(st.integers(1, 5), st.integers(1, 600)), back=st.integers(0, 12))
    def train(self, data: st.DataObject, rows: int, back: int) -> None:
        if back > 9 and self.step > 3:
            self.step -= back - 9  # a script that counts backwards
        seeds = data.draw(st.lists(numbers, min_size=1, max_size=4))
        names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
        steps = list(range(self.step + 1, self.step + rows + 1))
        times = [self.clock + 0.05 * number for number in range(rows)]
        columns = []
        for name in names:
            values = np.resize(np.array(seeds, "f8"), rows)
            with np.errstate(over="ignore", invalid="ignore"):
                narrow = values.astype("<f4")
            exact = bool(np.array_equal(narrow.astype("f8"), values, equal_nan=True))
            columns.append(
                Column(name=name, dtype="f4" if exact else "f8", data=(narrow if exact else values).tobytes())
            )
            into = self.expected.setdefault((name, self.incarnation), [])
            into += zip(steps, times, values.tolist(), strict=True)
        self.take(Rows(attempt=1, incarnation=self.incarnation, steps=steps, times=times, columns=columns), "metrics")
        self.step, self.clock = steps[-1], self.clock + 0.05 * rows

    @rule(text=st.text(max_size=300))
    def note(self, text: str) -> None:
        self.notes.append(text)
        self.take(Note(time=self.clock, step=self.step, incarnation=self.incarnation, actor="a", text=text))

    @precondition(lambda self: self.step > 2)
    @rule(back=st.integers(1, 40))
    def roll_back(self, back: int) -> None:
        before, step = self.incarnation, max(0, self.step - back)
        self.incarnation += 1
        event = RolledBack(
            time=self.clock,
            step=step,
            incarnation=self.incarnation,
            from_step=self.step,
            from_incarnation=before,
            checkpoint="c",
        )
        self.take(event)
        self.step = step

    @rule(seal=st.booleans())
    def pack(self, seal: bool) -> None:
        full = [number for number in recorded_segments(self.run.journal) if number != self.writer.segment]
        for number in full[:1]:
            places = pack_segment(self.run.journal, number)
            self.index.forget(number)
            if seal:
                self.record.seal(places)
            else:
                self.writer.close()
                self.open()

    @rule()
    def save_index(self) -> None:
        packed = [number for number in segments(self.run.journal) if packed_file(self.run.journal, number).exists()]
        write_index(self.run.journal, self.record.save(packed_sizes(self.run.journal, packed), self.index.gone))

    @rule(tail=st.binary(max_size=30))
    def die_and_open_again(self, tail: bytes) -> None:
        self.writer.close()
        with segment_file(self.run.journal, self.writer.segment).open("ab") as file:
            file.write(tail)  # what a crash in the middle of a write leaves
        self.open()

    @rule()
    def lose_the_index(self) -> None:
        index_file(self.run.journal).unlink(missing_ok=True)
        self.writer.close()
        self.open()

    @invariant()
    def every_value_is_there_once_and_to_the_bit(self) -> None:
        for (name, incarnation), expected in self.expected.items():
            found = self.record.metrics.query(name, incarnation=incarnation)
            model = np.array(expected, "f8")
            order_kept = zip(("step", "time", "value"), model.T, strict=True)
            assert all(
                np.array_equal(found[column].astype("f8"), wanted, equal_nan=True) for column, wanted in order_kept
            )
            rolled = self.record.metrics.query(name, incarnation=incarnation, points=7)
            assert int(rolled["count"].sum()) == len(model)
            assert len(rolled["count"]) <= 9
            values = model[:, 2]
            finite = values[np.isfinite(values)]
            assert int(rolled["nonfinite"].sum()) == len(values) - len(finite)
            if len(finite):
                assert np.nanmin(rolled["min"].astype("f8")) == finite.min()
                assert np.nanmax(rolled["max"].astype("f8")) == finite.max()

    @invariant()
    def what_was_said_is_there_in_order(self) -> None:
        assert [event.text for event in self.record.events if isinstance(event, Note)] == self.notes
        assert self.record.state.incarnation in {1, self.incarnation}

    def teardown(self) -> None:
        self.writer.close()
        shutil.rmtree(self.directory)


TestHistory = History.TestCase
TestHistory.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def filled(directory: Path, envelopes: int = 60, rows: int = 100) -> RunDir:
    """A recorded run of one metric, packed whole."""
    run = RunDir(directory)
    run.create()
    info = RunInfo(run="m", id="m", dir=str(directory), host="h", created=0, started=0, world_size=1)
    run.info_file.write_bytes(msgspec.json.encode(info))
    writer = JournalWriter(run.journal, segment_bytes=20_000)
    for number in range(envelopes):
        steps = list(range(number * rows + 1, (number + 1) * rows + 1))
        data = np.array(steps, "<f4").tobytes()
        body = Rows(
            attempt=1,
            incarnation=1,
            steps=steps,
            times=[1.7e9 + step for step in steps],
            columns=[Column(name="loss", dtype="f4", data=data)],
        )
        envelope = Envelope(source="m", epoch=1, stream="metrics", seq=number + 1, time=1.7e9, body=body, attempt=1)
        writer.append(codec.encode(envelope), "metrics", number + 1)
    writer.close()
    for number in segments(run.journal):
        pack_segment(run.journal, number)
    return run


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_in_a_packed_segment_costs_a_block_and_never_gives_a_wrong_value(at: float, flip: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        run = filled(Path(name))
        victim = packed_file(run.journal, segments(run.journal)[1])
        data = bytearray(victim.read_bytes())
        data[int(at * len(data))] ^= flip
        victim.write_bytes(data)
        record = load_record(run.path)
        found = record.metrics.query("loss")
        assert np.array_equal(found["value"], found["step"].astype("f8"))
        assert 0 < len(found["step"]) < 6000
        assert record.damage


def test_a_block_that_decays_after_it_was_indexed_leaves_a_gap_and_is_counted(tmp_path: Path) -> None:
    run = filled(tmp_path)
    record = load_record(run.path)
    packed_file(run.journal, segments(run.journal)[0]).write_bytes(b"")
    found = record.metrics.query("loss")
    assert 0 < len(found["step"]) < 6000
    assert np.array_equal(found["value"], found["step"].astype("f8"))
    assert record.metrics.unreadable == 1


@pytest.mark.parametrize("harm", [b"", b"nonsense", b"TCI\0\x01\0\0\0\0\0\0\0"])
def test_an_index_that_cannot_be_used_is_passed_over(tmp_path: Path, harm: bytes) -> None:
    run = filled(tmp_path)
    record = load_record(run.path)
    packed = segments(run.journal)
    write_index(run.journal, record.save(packed_sizes(run.journal, packed), {"metrics": 60}))
    assert read_index(run.journal) is not None
    assert len(load_record(run.path).metrics.query("loss")["step"]) == 6000
    index_file(run.journal).write_bytes(harm)
    assert read_index(run.journal) is None
    assert len(load_record(run.path).metrics.query("loss")["step"]) == 6000


def test_an_index_of_other_segments_is_passed_over(tmp_path: Path) -> None:
    run = filled(tmp_path)
    record = load_record(run.path)
    sizes = packed_sizes(run.journal, segments(run.journal))
    write_index(run.journal, record.save([(number, size + 1) for number, size in sizes], {}))
    assert read_index(run.journal) is None


def test_a_range_that_was_packed_is_gone_and_a_newer_one_is_not(tmp_path: Path) -> None:
    index = JournalIndex(tmp_path)
    writer = JournalWriter(tmp_path, segment_bytes=100, index=index)
    for seq in range(1, 21):
        envelope = Envelope(
            source="m",
            epoch=1,
            stream="events",
            seq=seq,
            time=0,
            body=Note(time=0, step=0, incarnation=1, actor="a", text="x" * 40),
        )
        writer.append(codec.encode(envelope), "events", seq)
    first = segments(tmp_path)[0]
    last_of_first = max(seq for seq in range(1, 21) if seq <= 2)
    pack_segment(tmp_path, first)
    index.forget(first)
    assert index.read("events", 1, last_of_first) == []
    assert len(index.read("events", 10, 20)) == 11
    writer.close()
