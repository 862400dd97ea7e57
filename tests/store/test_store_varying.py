"""A script that logs other metrics at each step: its sets of names cost nothing for longer than they are needed."""

import random
import struct
import zlib
from pathlib import Path

import msgspec
import numpy as np

from trainctl.store.frames import packed_file, recorded_segments, segments
from trainctl.store.journal import JournalIndex, JournalWriter
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record, replay_journal
from trainctl.store.saved import index_file, packed_sizes, read_index, write_index
from trainctl.wire import codec
from trainctl.wire.messages import Column, Envelope, Rows, RunInfo
from trainctl.wire.rundir import RunDir

TASKS = [f"loss/task_{number:02d}" for number in range(50)]
STEPS = 3000


class Multitask:
    """Eight of fifty tasks at each step; the value of each is the step."""

    def __init__(self, directory: Path) -> None:
        self.run = RunDir(directory)
        self.run.create()
        info = RunInfo(run="m", id="m", dir=str(directory), host="h", created=0, started=0, world_size=1)
        self.run.info_file.write_bytes(msgspec.json.encode(info))
        self.record, self.index = RunRecord(info), JournalIndex(self.run.journal)
        self.writer = JournalWriter(self.run.journal, segment_bytes=200_000, index=self.index)
        self.steps: dict[str, list[int]] = {name: [] for name in TASKS}
        self._random = random.Random(1)

    def train(self, steps: int = STEPS) -> None:
        for step in range(1, steps + 1):
            data = np.array([step], "<f4").tobytes()
            names = self._random.sample(TASKS, 8)
            columns = [Column(name=name, dtype="f4", data=data) for name in names]
            body = Rows(attempt=1, incarnation=1, steps=[step], times=[1e9 + step], columns=columns)
            envelope = Envelope(source="m", epoch=1, stream="metrics", seq=step, time=1e9, body=body, attempt=1)
            self.writer.append(codec.encode(envelope), "metrics", step)
            self.record.apply(envelope)
            for name in names:
                self.steps[name].append(step)

    def pack(self, *, all_of_it: bool = True) -> None:
        if all_of_it:
            self.writer.close()
        writing = None if all_of_it else self.writer.segment
        for number in [each for each in recorded_segments(self.run.journal) if each != writing]:
            self.record.seal(pack_segment(self.run.journal, number))
            self.index.forget(number)

    def save_index(self) -> int:
        packed = [number for number in segments(self.run.journal) if packed_file(self.run.journal, number).exists()]
        return write_index(self.run.journal, self.record.save(packed_sizes(self.run.journal, packed), self.index.gone))

    def whole(self, record: RunRecord) -> bool:
        return all(record.metrics.query(name)["step"].tolist() == steps for name, steps in self.steps.items())


def test_a_set_of_names_is_kept_as_long_as_a_value_of_it_is_in_no_block(tmp_path: Path) -> None:
    tasks = Multitask(tmp_path)
    tasks.train()
    assert tasks.record.metrics.unsealed.sets_of_names > 0.9 * STEPS
    tasks.pack(all_of_it=False)
    assert 0 < tasks.record.metrics.unsealed.sets_of_names < STEPS / 2, "of the segment that is being written"
    before = tasks.save_index()
    assert before / (8 * STEPS) < 20, "numbers for names"
    opened = load_record(tmp_path)
    assert opened.metrics.unsealed.sets_of_names == tasks.record.metrics.unsealed.sets_of_names
    tasks.pack()
    assert tasks.record.metrics.unsealed.sets_of_names == 0
    tasks.save_index()
    assert tasks.whole(tasks.record)
    assert tasks.whole(load_record(tmp_path))
    assert load_record(tmp_path).metrics.unsealed.sets_of_names == 0


def test_an_index_of_the_version_that_named_all_names_is_read_and_sealing_goes_on_from_it(tmp_path: Path) -> None:
    tasks = Multitask(tmp_path)
    tasks.train()
    tasks.pack(all_of_it=False)
    tasks.save_index()
    saved = read_index(tasks.run.journal)
    assert saved is not None
    names = saved.metrics.names
    kinds = [(each, tuple(names[at] for at in members if isinstance(at, int))) for each, members in saved.metrics.kinds]
    older = msgspec.structs.replace(saved, metrics=msgspec.structs.replace(saved.metrics, kinds=kinds))
    payload = msgspec.msgpack.encode(older)
    index_file(tasks.run.journal).write_bytes(struct.pack("<4sII", b"TCI\0", 2, zlib.crc32(payload)) + payload)
    assert read_index(tasks.run.journal) == older
    opened = RunRecord(tasks.record.info)
    replay_journal(opened, JournalIndex(tasks.run.journal), tasks.run.journal)
    tasks.record = opened
    tasks.pack()
    assert opened.metrics.unsealed.sets_of_names == 0
    assert opened.metrics.in_memory < 50 * 256, "all but the newest, incomplete bucket of each is read from its block"
    assert tasks.whole(opened)
