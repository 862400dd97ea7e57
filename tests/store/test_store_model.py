"""Journal, packed segments, saved index, rank 0's numbers and rollups together, against plain numpy.

A run is told as a hub hears it: rows, figures, events and rollbacks with rank 0's numbers; attempts; hubs that are
killed at any moment, in the middle of a frame too, and to whose successors rank 0 says the last part again.
"""

import math
import shutil
import tempfile
from pathlib import Path

import msgspec
import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from plain_history import PlainHistory, nothing_but, same_span, same_values

from trainctl.store.frames import frame, packed_file, recorded_segments, segment_file, segments
from trainctl.store.journal import JournalIndex, JournalWriter
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record, replay_journal
from trainctl.store.saved import index_file, packed_sizes, write_index
from trainctl.wire import codec
from trainctl.wire.messages import (
    Body,
    CheckpointSaved,
    Column,
    Envelope,
    Note,
    RankFigures,
    Ranks,
    RolledBack,
    Rows,
    RunInfo,
    StateChanged,
    stream_of,
)
from trainctl.wire.rundir import RunDir

NAMES = ["loss", "lr", "val/loss"]
ODD = [math.nan, math.inf, -math.inf, -0.0, 1e-310, 1e300, 3.4e38, 1e39]
counts = st.one_of(st.integers(1, 5), st.integers(1, 700))


class History(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="tc-model-"))
        self.run = RunDir(self.directory)
        self.run.create()
        self.info = RunInfo(run="m", id="m", dir=str(self.directory), host="h", created=0, started=0, world_size=1)
        self.run.info_file.write_bytes(msgspec.json.encode(self.info))
        self.model = PlainHistory()
        self.notes: list[str] = []
        self.checkpoints: dict[str, tuple[int, int]] = {}
        self.said: list[Body] = []  # of this attempt: rank 0's number of each is its place, from 1
        self.step, self.incarnation, self.attempt, self.epoch, self.clock = 0, 1, 1, 0, 1.7e9
        self.segment_bytes = 3000

    @initialize(segment_bytes=st.sampled_from([3000, 20_000, 200_000]))
    def begin(self, segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes
        self.open()
        self.take(StateChanged(time=self.clock, step=0, incarnation=1, state="starting", attempt=1))

    def open(self) -> None:
        """A hub begins."""
        self.epoch += 1
        self.record, self.index = RunRecord(self.info), JournalIndex(self.run.journal)
        replay_journal(self.record, self.index, self.run.journal)
        self.writer = JournalWriter(self.run.journal, segment_bytes=self.segment_bytes, index=self.index)

    def enveloped(self, body: Body, link: int) -> Envelope:
        stream = stream_of(body)
        attempt = self.attempt if link else 0
        seq = self.record.heads[stream] + 1
        return Envelope(
            source="m", epoch=self.epoch, stream=stream, seq=seq, time=self.clock, body=body, attempt=attempt, link=link
        )

    def take(self, body: Body, link: int = 0) -> None:
        """A hub takes what it does not have."""
        if link and link <= self.record.link_have(self.attempt):
            return
        envelope = self.enveloped(body, link)
        self.writer.append(codec.encode(envelope), envelope.stream, envelope.seq)
        self.record.apply(envelope)

    def say(self, body: Body) -> None:
        """Rank 0 says something."""
        self.said.append(body)
        self.take(body, len(self.said))

    def say_again(self, last: int) -> None:
        for link in range(max(1, len(self.said) - last + 1), len(self.said) + 1):
            self.take(self.said[link - 1], link)

    # --- a run

    def batch(self, seed: int, rows: int) -> Rows:
        random = np.random.default_rng(seed)
        steps = list(range(self.step + 1, self.step + rows + 1))
        times = [self.clock + 0.05 * number for number in range(rows)]
        columns = []
        for name in random.permutation(NAMES)[: random.integers(1, 4)].tolist():
            values = random.normal(size=rows)
            if random.random() < 0.3:
                values[random.integers(0, rows, 3)] = random.choice(ODD, 3)
            if random.random() < 0.1:
                values[:] = random.choice(ODD)
            with np.errstate(over="ignore"):
                values = values.astype("<f4") if random.random() < 0.6 else values.astype("<f8")
            columns.append(Column(name=name, dtype="f4" if values.dtype.itemsize == 4 else "f8", data=values.tobytes()))
            into = self.model.values.setdefault((name, self.incarnation), [])
            into += zip(steps, times, values.astype("f8").tolist(), strict=True)
        self.step, self.clock = steps[-1], self.clock + 0.05 * rows
        return Rows(attempt=self.attempt, incarnation=self.incarnation, steps=steps, times=times, columns=columns)

    @rule(seed=st.integers(0, 2**32), rows=counts)
    def train(self, seed: int, rows: int) -> None:
        self.say(self.batch(seed, rows))

    @rule(seed=st.integers(0, 2**32), back=st.integers(1, 30))
    def train_on_from_an_earlier_step(self, seed: int, back: int) -> None:
        self.step = max(0, self.step - back)  # a script that counts backwards
        self.say(self.batch(seed, 40))

    @rule(text=st.text(max_size=300), numbered=st.booleans())
    def note(self, text: str, numbered: bool) -> None:
        self.notes.append(text)
        note = Note(time=self.clock, step=self.step, incarnation=self.incarnation, actor="a", text=text)
        figures = RankFigures(rank=0, node="n", pid=1, state="running", step=self.step, time=self.clock)
        self.say(Ranks(incarnation=self.incarnation, ranks=[figures]))
        if numbered:
            self.say(note)
        else:
            self.take(note)

    @rule()
    def checkpoint(self) -> None:
        name = f"c{len(self.checkpoints)}"
        self.checkpoints[name] = self.incarnation, self.step
        event = CheckpointSaved(time=self.clock, step=self.step, incarnation=self.incarnation, id=name, bytes=1)
        self.say(event)

    @precondition(lambda self: self.checkpoints)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        """To a checkpoint of any branch, an abandoned one's too."""
        name = data.draw(st.sampled_from(sorted(self.checkpoints)))
        parent, step = self.checkpoints[name]
        before, self.incarnation = self.incarnation, max(self.model.parents) + 1
        self.model.parents[self.incarnation] = parent, step
        self.say(
            RolledBack(
                time=self.clock,
                step=step,
                incarnation=self.incarnation,
                from_step=self.step,
                from_incarnation=before,
                checkpoint=name,
            )
        )
        self.step = step

    @rule(back=st.integers(0, 50))
    def begin_an_attempt(self, back: int) -> None:
        self._begin_attempt(self.incarnation, max(0, self.step - back), told=None)

    @precondition(lambda self: self.checkpoints)
    @rule(data=st.data())
    def restart_from(self, data: st.DataObject) -> None:
        """A checkpoint of any branch."""
        parent, step = self.checkpoints[data.draw(st.sampled_from(sorted(self.checkpoints)))]
        self._begin_attempt(parent, step, told=parent)

    def _begin_attempt(self, parent: int, step: int, *, told: int | None) -> None:
        self.writer.close()
        self.open()
        self.incarnation, self.step = max(self.model.parents) + 1, step
        self.model.parents[self.incarnation] = parent, step
        self.attempt, self.said = self.attempt + 1, []
        self.take(
            StateChanged(
                time=self.clock,
                step=step,
                incarnation=self.incarnation,
                state="starting",
                attempt=self.attempt,
                parent=told,
            )
        )

    # --- what becomes of the hub and its files

    @rule(most=st.integers(1, 4), both=st.booleans())
    def pack(self, most: int, both: bool) -> None:
        for number in [n for n in recorded_segments(self.run.journal) if n != self.writer.segment][:most]:
            recorded = segment_file(self.run.journal, number).read_bytes()
            places = pack_segment(self.run.journal, number)
            if both:  # killed before the recorded one went, and before it told anybody
                segment_file(self.run.journal, number).write_bytes(recorded)
                self.writer.close()
                self.open()
                return
            self.index.forget(number)
            self.record.seal(places)

    @rule()
    def save_index(self) -> None:
        packed = [number for number in segments(self.run.journal) if packed_file(self.run.journal, number).exists()]
        write_index(self.run.journal, self.record.save(packed_sizes(self.run.journal, packed), self.index.gone))

    @rule(seed=st.integers(0, 2**32), rows=counts, cut=st.floats(0, 1, exclude_max=True), again=st.integers(1, 30))
    def die_in_the_middle_of_a_frame(self, seed: int, rows: int, cut: float, again: int) -> None:
        batch = self.batch(seed, rows)
        self.said.append(batch)
        framed = frame(codec.encode(self.enveloped(batch, len(self.said))))
        self.writer.close()
        with segment_file(self.run.journal, self.writer.segment).open("ab") as file:
            file.write(framed[: int(cut * len(framed))])
        self.open()
        self.say_again(again)

    @rule(indexed=st.booleans(), again=st.integers(0, 30))
    def open_again(self, indexed: bool, again: int) -> None:
        if not indexed:
            index_file(self.run.journal).unlink(missing_ok=True)
        self.writer.close()
        self.open()
        self.say_again(again)

    # --- what must be true

    @precondition(lambda self: self.model.values)
    @rule(data=st.data(), points=st.sampled_from([1, 7, 50, 400]))
    def ask(self, data: st.DataObject, points: int) -> None:
        name, incarnation = data.draw(st.sampled_from(sorted(self.model.values)))
        low = data.draw(st.one_of(st.none(), st.integers(-2, self.step + 2)))
        high = data.draw(st.one_of(st.none(), st.integers(0, 900).map(lambda more: (low or 0) + more)))
        same_span(self.record.metrics, self.model, name, incarnation, low, high, points)

    @rule()
    def look_at_everything(self) -> None:
        self.whole(self.record)

    def whole(self, record: RunRecord) -> None:
        same_values(record.metrics, self.model)
        assert [event.text for event in record.events if isinstance(event, Note)] == self.notes
        assert record.link_have(self.attempt) == len(self.said)
        for name, incarnation in self.model.values:
            same_span(record.metrics, self.model, name, incarnation, None, None, 50)

    def decayed(self) -> None:
        """A flipped byte, or a piece that is missing, somewhere."""
        random = np.random.default_rng(int(self.clock) + len(self.said))
        files = [path for path in sorted(self.run.journal.iterdir()) if path.stat().st_size > 8]
        victim = files[random.integers(len(files))]
        data = bytearray(victim.read_bytes())
        at = int(random.integers(len(data)))
        if random.random() < 0.7:
            data[at] ^= int(random.integers(1, 256))
        else:
            del data[at : at + int(random.integers(1, 200))]
        victim.write_bytes(data)
        if random.random() < 0.5:
            index_file(self.run.journal).unlink(missing_ok=True)
        record = load_record(self.directory)
        missing = nothing_but(record.metrics, self.model)
        assert not missing or record.damage or record.metrics.unreadable, "what is missing is told"

    def teardown(self) -> None:
        if hasattr(self, "writer"):
            self.whole(self.record)
            self.writer.close()
            self.whole(load_record(self.directory))
            self.decayed()
        shutil.rmtree(self.directory)


TestHistory = History.TestCase
TestHistory.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shorten thirty steps takes minutes
)
