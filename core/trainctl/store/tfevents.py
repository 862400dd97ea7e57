"""A run's metrics as a TensorBoard event file: what the hub's sink and `trainctl export` both write.

TensorBoard's own messages and record format are used, without torch, TensorFlow and the thread of its EventFileWriter:
the hub's sink has one already. Values become float32, as everywhere in TensorBoard.

A rollback leaves steps behind that are not to be drawn any more. Both of TensorBoard's readers drop them: the Python
one when a SessionLog START event says at which step the writer began again, RustBoard when a tag's step goes back. So
`begin` writes that event before the first value of a new branch, and curves stay clean (TensorBoard 3732).
"""

import os
import re
import socket
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainctl.wire.messages import Rows

_NAME_TIME = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class _Records(Protocol):
    def write(self, data: bytes) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class EventFile:
    """One new event file in `directory`, which is made if it is not there. Every method raises OSError (a full disk).

    Importing TensorBoard happens here: ImportError says that it is not installed.
    """

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._session_log, self._summary = Event, SessionLog, Summary
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / _later_name(directory)).open("xb")
        self._records: _Records = RecordWriter(file)
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))

    def begin(self, step: int, at: float) -> None:
        """What was written for `step` and after it is void from here on."""
        start = self._session_log(status=self._session_log.START)
        self._write(self._event(wall_time=at, step=step, session_log=start))

    def add(self, rows: Rows) -> None:
        """Write every value of some rows: one event a step."""
        value = self._summary.Value
        columns = [
            (column.name, np.frombuffer(column.data, f"<{column.dtype}").tolist())
            for column in rows.columns
            if len(column.data) == int(column.dtype[1]) * len(rows.steps)
        ]
        for at, (step, wall) in enumerate(zip(rows.steps, rows.times, strict=True)):
            summary = self._summary(value=[value(tag=name, simple_value=values[at]) for name, values in columns])
            self._write(self._event(wall_time=wall, step=step, summary=summary))

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


def _later_name(directory: Path) -> str:
    """TensorBoard reads files in the order of their names, which begin with the second they were made in: one that is
    made within the same second, or after the clock went back, must not come before the one that it follows."""
    made = [int(found[1]) for path in directory.iterdir() if (found := _NAME_TIME.match(path.name))]
    second = max([int(time.time()), *(number + 1 for number in made)])
    return f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.0"
