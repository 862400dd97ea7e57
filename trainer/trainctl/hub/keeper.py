"""The journal on disk, and what happens while it cannot be written: keep it in memory and try again.

What was appended is kept until it was synced. A sync that failed proves nothing of what was appended since the last
good one, and neither does any sync after it: all of that is appended once more, to a new segment, before more is
acknowledged.
"""

import contextlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from trainctl.hub.unproven import Unproven, Waiting
from trainctl.store.frames import recorded_segments
from trainctl.store.journal import JournalIndex, JournalWriter
from trainctl.store.tails import Unsynced, cut_back, sync_recorded

T = TypeVar("T")

BACKLOG_BYTES = 64 * 1024 * 1024


class JournalKeeper:
    """Appends envelopes in order; never raises. `problem` says in words why they are not reaching the disk."""

    def __init__(self, directory: Path, index: JournalIndex) -> None:
        self.directory = directory
        self._writer: JournalWriter | None = None
        self._backlog: deque[Waiting] = deque()
        self._backlog_bytes = 0
        self._unproven = Unproven(BACKLOG_BYTES)
        self._failed: JournalWriter | None = None  # its last sync failed
        self._doubtful: dict[int, int] = {}  # segments to be cut to so many bytes once all of the rest is elsewhere
        self._again = False  # what was appended anew is not synced yet
        self.index = index
        self.problem: str | None = None
        self.lost = 0  # envelopes that had to be given up
        self.cut_bytes = 0
        self._attempt = 0
        self._written_link = 0
        self._synced = (0, 0)  # attempt, number
        self._appended = 0
        self._retired: list[JournalWriter] = []
        self.closed = False
        self._first_segment: int | None = None
        self._last_segment = 0
        self._take_over()
        self._open()
        if self._backlog:
            self.retry()

    @property
    def hangs(self) -> bool:
        """Whether the disk does not answer: see `PatientKeeper`."""
        return False

    def at_the_disk(self, work: Callable[[], T]) -> T:
        """Do some other work in the journal's directory. Raises what it raises."""
        return work()

    def append(self, encoded: bytes, stream: str, seq: int, link: int = 0, attempt: int = 0) -> None:
        item = Waiting(encoded=encoded, stream=stream, seq=seq, link=link, attempt=attempt)
        self._give_up_failed()
        if self._backlog or not self._write(item):
            self._wait(item)

    def _wait(self, item: Waiting) -> None:
        self._backlog.append(item)
        self._backlog_bytes += len(item.encoded)
        while self._backlog_bytes > BACKLOG_BYTES:
            self._backlog_bytes -= len(self._backlog.popleft().encoded)
            self.lost += 1

    def _give_up_failed(self) -> None:
        """Take back what was appended since the last good sync of a writer whose sync failed."""
        failed, self._failed, writer = self._failed, None, self._writer
        if failed is None or writer is not failed:
            return
        self._doubtful |= writer.unproven()
        self._retired.append(writer)
        self._writer, self._again = None, True
        taken, given_up = self._unproven.take()
        self.lost += given_up
        self._appended -= len(taken)
        self._written_link = 0
        behind, self._backlog, self._backlog_bytes = self._backlog, deque(), 0
        for item in [*taken, *behind]:
            self._wait(item)
        for item in reversed(taken):
            self.index.rewind(item.stream, item.seq)

    def _take_over(self) -> None:
        """What the hub before us appended last is on disk, or is appended again."""
        try:
            sync_recorded(self.directory)
        except Unsynced as error:
            self._doubtful |= error.doubtful
            self._again = True
            for found in error.envelopes:
                self._wait(Waiting(**found))
            for item in reversed(self._backlog):
                self.index.rewind(item.stream, item.seq)
        except OSError:
            pass  # it cannot be read, which whoever reads the journal tells

    def settle(self) -> None:
        """Write what waits for the loop's next turn: see `PatientKeeper`."""

    def retry(self) -> bool:
        """Try again what failed; true when the journal is whole up to now."""
        self._give_up_failed()
        if self._writer is None:
            self._open()
        while self._backlog and self._write(self._backlog[0]):
            self._backlog_bytes -= len(self._backlog.popleft().encoded)
        if self._writer is not None and not self._backlog and not self._again:
            self.problem = None
        return self.problem is None

    def deleted(self) -> bool:
        """Notice, once, that the journal was deleted under us: what is appended from now on waits for a new one."""
        self._give_up_failed()
        try:
            if self._writer is None or not self._writer.removed:
                return False
        except OSError:
            return False  # nobody can say; an append will
        # Its descriptors are closed by who syncs, in a thread that may be using them now.
        self._retired.append(self._writer)
        self._writer = None
        self.lost += self._appended
        self._appended = 0
        self._unproven.take()
        self.problem = "somebody deleted it"
        return True

    def sync(self) -> bool:
        """Put what was appended on disk; may run in a thread. False, with `problem` set, when that fails."""
        # In this order: what the loop does meanwhile makes less of it true, never more.
        writer, appended, whole = self._writer, self._unproven.appended, not self._backlog
        attempt = self._attempt
        link = self._written_link
        while self._retired:
            with contextlib.suppress(OSError):  # nobody can have what it holds
                self._retired.pop().close()
        if writer is None or self._failed is not None:
            return False
        try:
            writer.sync()
        except OSError as error:
            self.problem = _words(error)
            self._failed = writer
            return False
        self._synced = attempt, link
        self._proved(appended, whole=whole)
        return True

    def _proved(self, appended: int, *, whole: bool) -> None:
        self._unproven.prove(appended)
        if whole:
            self._again = False
            # A reader takes the numbers of a stream as they grow: behind a hole it would pass over what was in it.
            for segment, size in list(self._doubtful.items()):
                with contextlib.suppress(OSError):  # then a hole, if there is one, is told as damage
                    cut_back(self.directory, segment, size)
                del self._doubtful[segment]

    def full_segments(self) -> list[int]:
        """Numbers of the segments that nobody writes any more and that are not packed, oldest first. Raises OSError."""
        writing = self._writer.segment if self._writer is not None else None
        full = [number for number in recorded_segments(self.directory) if number != writing]
        return [number for number in full if number not in self._doubtful]

    def wrote(self, segment: int) -> bool:
        """Whether a segment is from this process."""
        return self._first_segment is not None and segment >= self._first_segment

    def close(self) -> None:
        self._synced_at_last()
        if self._failed is not None:
            self.retry()
            self._synced_at_last()
        if self._writer is not None:
            with contextlib.suppress(OSError):  # synced it is, or there is a problem
                self._writer.close()
            self._writer = None
        self.closed = True
        self.sync()

    def _synced_at_last(self) -> None:
        if self.sync() and not self._backlog:
            self.problem = None

    def begin_attempt(self, attempt: int) -> None:
        """The numbers of this attempt are acknowledged from now on; those of another count for nothing."""
        if attempt != self._attempt:
            self._written_link = 0
            self._attempt = attempt

    @property
    def written_link(self) -> int:
        """The newest of rank 0's numbers, in its newest attempt, that was appended since this process began."""
        return self._written_link

    @property
    def synced_link(self) -> int:
        """The newest of them that is on disk, and all before it."""
        attempt, link = self._synced
        return link if attempt == self._attempt else 0

    def unwritten_link(self) -> int | None:
        """The oldest of rank 0's numbers, in its newest attempt, that is not on disk for sure."""
        unproven = self._unproven.link(self._attempt)
        if unproven is not None:
            return unproven
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
        self._unproven.append(item)
        self._appended += 1
        return True


def _words(error: OSError) -> str:
    return error.strerror or str(error)
