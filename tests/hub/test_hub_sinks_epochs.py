"""A sink goes by what the journal has: where that lost its end, numbers come again and mean something else."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hub_double import Rank, hub_running, info, rank_linked, rows
from sink_reading import curves

from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.sinks.access import Access
from trainctl.hub.sinks.memory import Progress, confirmed, read_progress
from trainctl.hub.sinks.sink import Branching, Start
from trainctl.hub.sinks.worker import Job, Worker
from trainctl.store.epochs import EpochBegin
from trainctl.store.frames import recorded_segments, segment_file, segment_frames, segments
from trainctl.store.journal import JournalIndex
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.replay import replay_journal
from trainctl.store.saved import packed_sizes, write_index
from trainctl.wire import codec
from trainctl.wire.messages import Body, Envelope, Rows, RunState, Stream
from waiting import until


class Copy:
    """Keeps what it is given, in a dict that outlives it, and drops what is void."""

    streams: ClassVar[frozenset[Stream]] = frozenset({"metrics"})
    history: ClassVar[bool] = True

    def __init__(self, values: dict[int, float]) -> None:
        self.values = values

    def open(self, start: Start) -> dict[str, str]:
        return {}

    def branch(self, branching: Branching) -> None:
        for step in [step for step in self.values if step >= branching.from_step]:
            del self.values[step]
        for restored in branching.restored:
            self.write(restored)

    def write(self, body: Body) -> None:
        if isinstance(body, Rows):
            values = memoryview(body.columns[0].data).cast("d")
            self.values.update(zip(body.steps, values, strict=True))

    def flush(self) -> None: ...
    def close(self, state: RunState) -> None: ...


def replayed(directory: Path, index: JournalIndex) -> RunRecord:
    record, journal = RunRecord(info(directory)), directory / "journal"
    if journal.exists():
        replay_journal(record, index, journal)
    return record


class Hub:
    """What of a hub a sink sees, over a real journal: replayed when it begins, with the next epoch."""

    def __init__(self, directory: Path, epoch: int) -> None:
        self.directory, self.epoch = directory, epoch
        journal = directory / "journal"
        index = JournalIndex(journal)
        self.record = replayed(directory, index)
        self.keeper = JournalKeeper(journal, index)
        self.told: list[str] = []

    def records(self, first: int, last: int, incarnation: int = 1) -> None:
        for step in range(first, last + 1):
            body = rows(step, incarnation=incarnation, loss=[self.epoch + step / 1000])
            seq = self.record.heads["metrics"] + 1
            made = Envelope(source="demo-1", epoch=self.epoch, stream="metrics", seq=seq, time=1.0, body=body)
            self.keeper.append(codec.encode(made), "metrics", seq, 0)
            self.record.apply(made)

    async def sink(self, values: dict[int, float]) -> None:
        """Let a sink do all there is to do."""
        recorder: Any = type("Recorder", (), {"record": self.record})()
        job = Job(
            name="copy",
            history=True,
            make=lambda: Copy(values),
            access=Access(recorder=recorder, keeper=self.keeper),
            directory=self.directory,
            tell=lambda _subject, text, _severity: self.told.append(text),
            state=lambda: self.record.state,
        )
        worker = Worker(job, head=self.record.heads["metrics"])
        worker.start()
        worker.end(drain=True)
        assert await asyncio.to_thread(worker.join, 20)
        assert worker.behind == 0

    def close(self) -> None:
        self.keeper.close()

    def history(self) -> dict[int, float]:
        found = self.record.metrics.query("loss")
        return dict(zip(found["step"].tolist(), found["value"].tolist(), strict=True))


def cut(directory: Path, seq: int) -> None:
    """The power went, and with it what the journal held from a number on."""
    decode = codec.envelope_decoder()
    for number in recorded_segments(directory / "journal"):
        for found in segment_frames(directory / "journal", number):
            envelope = decode(found.payload)
            assert isinstance(envelope, Envelope)
            if envelope.seq >= seq:
                with segment_file(directory / "journal", number).open("r+b") as file:
                    file.truncate(found.offset)
                break


async def first_hub(tmp_path: Path, values: dict[int, float]) -> None:
    hub = Hub(tmp_path, 1)
    hub.records(1, 20)
    await hub.sink(values)
    hub.close()
    assert sorted(values) == list(range(1, 21))
    assert read_progress(tmp_path / "sinks" / "copy.json").seq == 20


@pytest.mark.parametrize("in_between", [0, 6, 30])
def test_values_behind_a_power_cut_reach_the_sink(tmp_path: Path, in_between: int) -> None:
    """Also where another hub, with the sink switched off, recorded something first."""
    values: dict[int, float] = {}

    async def scenario() -> None:
        await first_hub(tmp_path, values)
        cut(tmp_path, 13)
        hub = Hub(tmp_path, 2)
        assert hub.record.heads["metrics"] == 12
        if in_between:
            hub.records(11, 10 + in_between, incarnation=2)
            hub.close()
            hub = Hub(tmp_path, 3)
        await hub.sink(values)
        hub.records(11 + in_between, 40, incarnation=2)
        await hub.sink(values)
        assert values == hub.history()
        assert sorted(values) == list(range(1, 41))
        assert [text for text in hub.told if "lost its end or was deleted" in text] == hub.told
        assert len(hub.told) == 1, "said once"
        hub.close()

    asyncio.run(scenario())


def test_a_sink_keeps_what_the_journal_lost_before_the_steps_that_it_goes_on_with(tmp_path: Path) -> None:
    values: dict[int, float] = {}

    async def scenario() -> None:
        await first_hub(tmp_path, values)
        shutil.rmtree(tmp_path / "journal")
        hub = Hub(tmp_path, 2)
        hub.records(11, 15, incarnation=2)
        await hub.sink(values)
        assert {step: value for step, value in values.items() if step > 10} == hub.history()
        assert sorted(values) == list(range(1, 16)), "16 to 20 are void, and 1 to 10 nobody else has"
        hub.close()

    asyncio.run(scenario())


def test_a_hub_that_has_all_of_it_writes_nothing_again(tmp_path: Path) -> None:
    values: dict[int, float] = {}

    async def scenario() -> None:
        await first_hub(tmp_path, values)
        for epoch in (2, 3):
            hub, again = Hub(tmp_path, epoch), dict[int, float]()
            hub.records(10 * epoch + 1, 10 * epoch + 10)
            await hub.sink(again)
            assert sorted(again) == list(range(10 * epoch + 1, 10 * epoch + 11))
            assert hub.told == []
            hub.close()

    asyncio.run(scenario())


def test_progress_that_knows_no_epoch_is_believed_as_far_as_the_journal_goes() -> None:
    """It is of a version that wrote none."""
    known = [EpochBegin(epoch=1, seq=1, incarnation=0, step=0), EpochBegin(epoch=2, seq=13, incarnation=1, step=12)]
    progress = Progress(seq=20, incarnation=1, step=20)
    coming = EpochBegin(epoch=3, seq=41, incarnation=2, step=40)
    assert confirmed(progress, [*known, coming], 2) == Progress(epoch=2, seq=20, incarnation=1, step=20)
    coming = EpochBegin(epoch=3, seq=16, incarnation=1, step=15)
    assert confirmed(progress, [*known, coming], 2) == Progress(epoch=2, seq=15, incarnation=1, step=15)


def test_where_epochs_begin_is_known_from_packed_segments_and_from_the_index_too(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    for epoch in (1, 2, 4):
        hub = Hub(tmp_path, epoch)
        hub.records(10 * epoch + 1, 10 * epoch + 10, incarnation=epoch)
        hub.close()
    expected = [
        EpochBegin(epoch=1, seq=1, incarnation=0, step=0),
        EpochBegin(epoch=2, seq=11, incarnation=1, step=20),
        EpochBegin(epoch=4, seq=21, incarnation=2, step=30),
    ]
    assert list(replayed(tmp_path, JournalIndex(journal)).metric_epochs) == expected
    for number in recorded_segments(journal):
        pack_segment(journal, number)
    packed = replayed(tmp_path, JournalIndex(journal))
    assert list(packed.metric_epochs) == expected
    write_index(journal, packed.save(packed_sizes(journal, segments(journal)), {"metrics": 30}))
    opened = replayed(tmp_path, JournalIndex(journal)).metric_epochs
    assert list(opened) == expected
    assert opened.next(5, 31) == EpochBegin(epoch=5, seq=31, incarnation=4, step=50)


@pytest.mark.thorough
def test_tensorboard_has_all_of_a_run_whose_node_lost_power(tmp_path: Path, own_home: Path) -> None:
    (own_home / "config").mkdir()
    (own_home / "config" / "config.toml").write_text("[sinks.tensorboard]\n")
    run_dir = tmp_path / "run"
    written = run_dir / "sinks" / "tensorboard.json"
    with hub_running(run_dir) as hub:
        with rank_linked(run_dir) as rank:
            for step in range(1, 21):
                rank.record(rows(step))
            until(lambda: written.exists() and json.loads(written.read_bytes())["step"] == 20, 20)
        hub.kill()
    decode = codec.envelope_decoder()
    newest = recorded_segments(run_dir / "journal")[-1]
    rest = list(segment_frames(run_dir / "journal", newest))
    for found in rest:
        envelope = decode(found.payload)
        if isinstance(envelope, Envelope) and isinstance(envelope.body, Rows) and envelope.body.steps[-1] > 12:
            with segment_file(run_dir / "journal", newest).open("r+b") as file:
                file.truncate(found.offset)
            break
    with hub_running(run_dir):
        rank = Rank(run_dir, attempt=2)
        rank.connect(step=10, incarnation=2)
        for step in range(11, 41):
            rank.record(rows(step, incarnation=2, loss=[100.0 + step]))
        shown = until(lambda: len(found := curves(run_dir / "tensorboard")["loss"]) == 40 and found, 20)
        assert dict(shown) == {step: pytest.approx(1 / step) for step in range(1, 11)} | {
            step: 100.0 + step for step in range(11, 41)
        }
        rank.close()
