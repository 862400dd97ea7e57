"""The journal on disk, and what happens while it cannot be written: keep it in memory and try again."""

import contextlib
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
    attempt: int


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
        self._attempt = 0
        self._written_link = 0
        self._appended = 0
        self._retired: list[JournalWriter] = []
        self.closed = False
        self._first_segment: int | None = None
        self._last_segment = 0
        self._open()

    def append(self, encoded: bytes, stream: str, seq: int, link: int = 0, attempt: int = 0) -> None:
        item = Waiting(encoded=encoded, stream=stream, seq=seq, link=link, attempt=attempt)
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
        # Its descriptors are closed by who syncs, in a thread that may be using them now.
        self._retired.append(self._writer)
        self._writer = None
        self.lost += self._appended
        self._appended = 0
        self.problem = "somebody deleted it"
        return True

    def sync(self) -> bool:
        """Put what was appended on disk; may run in a thread. False, with `problem` set, when that fails."""
        writer = self._writer
        while self._retired:
            with contextlib.suppress(OSError):  # nobody can have what it holds
                self._retired.pop().close()
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
        self.closed = True
        self.sync()

    def begin_attempt(self, attempt: int) -> None:
        """The numbers of this attempt are acknowledged from now on; those of another count for nothing."""
        if attempt != self._attempt:
            self._attempt, self._written_link = attempt, 0

    @property
    def written_link(self) -> int:
        """The newest of rank 0's numbers, in its newest attempt, that was appended since this process began."""
        return self._written_link

    def unwritten_link(self) -> int | None:
        """The oldest of rank 0's numbers, in its newest attempt, that waits in memory to be appended."""
        return next((item.link for item in self._backlog if item.link and item.attempt == self._attempt), None)

    @property
    def safe_to_index(self) -> bool:
        """Whether the journal has everything that it will ever have of what was to be appended."""
        return not self._backlog and (self._writer is not None or (self.closed and self.problem is None))

    @property
    def newest_segment(self) -> int:
        """The newest segment that this process wrote to; 0 before it could."""
        return self._last_segment

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
        if item.attempt == self._attempt:
            self._written_link = max(self._written_link, item.link)
        self._last_segment = self._writer.segment
        self._appended += 1
        return True


def _words(error: OSError) -> str:
    return error.strerror or str(error)
