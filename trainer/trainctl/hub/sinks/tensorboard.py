"""TensorBoard: event files of the live branch. Needs `tensorboard`, neither torch nor TensorFlow."""

from pathlib import Path
from typing import ClassVar

import msgspec

from trainctl.hub.sinks.sink import Branching, Start
from trainctl.store.tfevents import EventFile
from trainctl.wire.messages import Body, Rows, RunState, Stream


class TensorBoardSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dir` gets a folder for each run; without it the files are in the run's directory, under `tensorboard`."""

    enabled: bool = True
    dir: str | None = None


class TensorBoardSink:
    """See `sink.Sink`."""

    streams: ClassVar[frozenset[Stream]] = frozenset({"metrics"})
    history: ClassVar[bool] = True

    def __init__(self, settings: TensorBoardSettings) -> None:
        self._settings = settings
        self._file: EventFile | None = None

    def open(self, start: Start) -> dict[str, str]:
        given = self._settings.dir
        run_id = start.picture.info.id
        directory = Path(given).expanduser() / run_id if given else start.directory / "tensorboard"
        self._file = EventFile(directory)
        return {}

    def branch(self, branching: Branching) -> None:
        file = self._opened()
        file.begin(branching.from_step, branching.time)
        for rows in branching.restored:
            file.add(rows)

    def write(self, body: Body) -> None:
        if isinstance(body, Rows):
            self._opened().add(body)

    def flush(self) -> None:
        self._opened().flush()

    def close(self, state: RunState) -> None:
        del state
        if self._file is not None:
            self._file.close()

    def _opened(self) -> EventFile:
        assert self._file is not None, "open comes first"
        return self._file
