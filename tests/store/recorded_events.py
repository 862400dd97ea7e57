"""A run's directory with many events: recorded and packed segments, repeats, two hubs, rows in between."""

from pathlib import Path

import msgspec
import numpy as np

from trainctl.store.frames import recorded_segments
from trainctl.store.journal import JournalWriter
from trainctl.store.packing import pack_segment
from trainctl.wire import codec
from trainctl.wire.messages import Anomaly, Body, Column, Envelope, Note, Rows, RunInfo, stream_of
from trainctl.wire.rundir import RunDir

BEGAN = 1_000_000.0


class EventRun:
    """`texts` are those of its events in the order in which they came, each once."""

    def __init__(self, path: Path, *, segment_bytes: int = 8 * 1024 * 1024) -> None:
        self.texts: list[str] = []
        self.path = path
        directory = RunDir(path)
        directory.create()
        self.journal = directory.journal
        self.info = RunInfo(
            run="demo", id="demo-1", dir=str(path), host="a", created=BEGAN, started=BEGAN, world_size=1, attempt=1
        )
        directory.info_file.write_bytes(msgspec.json.encode(self.info))
        self._segment_bytes = segment_bytes
        self._seqs = dict.fromkeys(("metrics", "events"), 0)
        self._epoch = self._link = 0
        self.hub()

    def hub(self, *, back: int = 0) -> None:
        """A new hub writes on, which has not got the last `back` numbers of the events."""
        self._epoch += 1
        self._seqs["events"] -= back
        self._writer = JournalWriter(self.journal, self._segment_bytes)

    def tell(self, count: int, *, rows: bool = True) -> None:
        """Events, every tenth of them a note, and a row after each."""
        for number in range(len(self.texts) + 1, len(self.texts) + count + 1):
            self._link += 1
            self._append(self._event(number), self._link)
            self.texts.append(f"event {number}")
            if not rows:
                continue
            self._link += 1
            one = np.array([float(number)], "<f8").tobytes()
            columns = [Column(name="loss", dtype="f8", data=one)]
            row = Rows(attempt=1, incarnation=1, steps=[number], times=[BEGAN + number], columns=columns)
            self._append(row, self._link)

    def repeat(self, number: int, link: int) -> None:
        """Rank 0 sends an event again that the hub before had."""
        self._append(self._event(number), link)

    def pack(self, *, but: int) -> None:
        """Pack all segments but the newest `but`."""
        self._writer.close()
        numbers = recorded_segments(self.journal)
        for number in numbers[: len(numbers) - but]:
            pack_segment(self.journal, number)

    def close(self) -> None:
        self._writer.close()

    @property
    def link(self) -> int:
        return self._link

    def _event(self, number: int) -> Note | Anomaly:
        at, text = BEGAN + number, f"event {number}"
        if number % 10 == 0:
            return Note(time=at, step=number, incarnation=1, actor="ann", text=text)
        return Anomaly(time=at, step=number, incarnation=1, what="data", text=text, severity="info")

    def _append(self, body: Body, link: int) -> None:
        stream = stream_of(body)
        self._seqs[stream] += 1
        made = Envelope(
            source="demo-1",
            epoch=self._epoch,
            stream=stream,
            seq=self._seqs[stream],
            time=BEGAN + len(self.texts),
            body=body,
            attempt=1,
            link=link,
        )
        self._writer.append(codec.encode(made), stream, made.seq)
