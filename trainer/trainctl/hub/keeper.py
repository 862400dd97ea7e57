"""The journal on disk, and what happens while it cannot be written: keep it in memory and try again."""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

from trainctl.store.frames import recorded_segments
from trainctl.store.journal import JournalIndex, JournalWriter

BACKLOG_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """An envelope that is not in the journal yet."""

    encoded: bytes
    stream: str
    seq: int
    link: int


class JournalKeeper:
    """Appends envelopes in order; never raises. `problem` says in words why they are not reaching the disk."""

    def __init__(self, directory: Path, index: JournalIndex) -> None:
        self.directory = directory
        self._writer: JournalWriter | None = None
        self._backlog: deque[Waiting] = deque()
        self._backlog_bytes = 0
        self.index = index
        self.problem: str | None = None
        self.lost = 0  # envelopes that had to be given up
        self.cut_bytes = 0
        self.written_link = 0
        self._appended = 0
        self._first_segment: int | None = None
        self._last_segment = 0
        self._open()

    def append(self, encoded: bytes, stream: str, seq: int, link: int) -> None:
        item = Waiting(encoded=encoded, stream=stream, seq=seq, link=link)
        if self._backlog or not self._write(item):
            self._backlog.append(item)
            self._backlog_bytes += len(encoded)
            while self._backlog_bytes > BACKLOG_BYTES:
                self._backlog_bytes -= len(self._backlog.popleft().encoded)
                self.lost += 1

    def retry(self) -> bool:
        """Try again what failed; true when the journal is whole up to now."""
        if self._writer is None:
            self._open()
        while self._backlog and self._write(self._backlog[0]):
            self._backlog_bytes -= len(self._backlog.popleft().encoded)
        if self._writer is not None and not self._backlog:
            self.problem = None
        return self.problem is None

    def deleted(self) -> bool:
        """Notice, once, that the journal was deleted under us: what is appended from now on waits for a new one."""
        if self._writer is None or not self._writer.removed:
            return False
        self.close()
        self.lost += self._appended
        self._appended = 0
        self.problem = "somebody deleted it"
        return True

    def sync(self) -> bool:
        """Put what was appended on disk; may run in a thread. False, with `problem` set, when that fails."""
        writer = self._writer
        if writer is None:
            return False
        try:
            writer.sync()
        except OSError as error:
            self.problem = _words(error)
            return False
        return True

    def full_segments(self) -> list[int]:
        """Numbers of the segments that nobody writes any more and that are not packed, oldest first. Raises OSError."""
        writing = self._writer.segment if self._writer is not None else None
        return [number for number in recorded_segments(self.directory) if number != writing]

    def wrote(self, segment: int) -> bool:
        """Whether a segment is from this process."""
        return self._first_segment is not None and segment >= self._first_segment

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self.problem = _words(error)
            self._writer = None

    def new_attempt(self) -> None:
        """Rank 0 counts its records from 1 again."""
        self.written_link = 0

    def _open(self) -> None:
        try:
            self._writer = JournalWriter(self.directory, index=self.index, after=self._last_segment)
        except OSError as error:
            self.problem = _words(error)
        else:
            self.cut_bytes = self._writer.cut_bytes
            self._last_segment = self._writer.segment
            self._first_segment = self._first_segment or self._writer.segment

    def _write(self, item: Waiting) -> bool:
        if self._writer is None:
            return False
        try:
            self._writer.append(item.encoded, item.stream, item.seq)
        except OSError as error:
            self.problem = _words(error)
            return False
        self.written_link = max(self.written_link, item.link)
        self._last_segment = self._writer.segment
        self._appended += 1
        return True


def _words(error: OSError) -> str:
    return error.strerror or str(error)
