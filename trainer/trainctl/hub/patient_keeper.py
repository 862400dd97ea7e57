"""The journal, written by the disk's thread: while the disk hangs, what is recorded waits in memory."""

import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from trainctl.hub.disk import Disk, DiskHangs
from trainctl.hub.keeper import BACKLOG_BYTES, JournalKeeper
from trainctl.hub.unproven import Waiting
from trainctl.store.journal import JournalIndex

T = TypeVar("T")

_TURN_BYTES = 1024 * 1024


class PatientKeeper(JournalKeeper):
    """A keeper whose methods come back within a moment, also while the disk hangs; `sync` alone is for another thread,
    and takes what it takes.

    As long as the disk answers, an event is in the journal when `append` returns, and everything else before the loop
    has its next turn: to hand every envelope to another thread by itself costs more than to write it. While the disk
    does not answer, envelopes wait here in order, at most 64 MiB of them, and are written by the first `settle` after
    it does again. Nothing of what waits counts as written: rank 0 is told of none of it, and keeps it.
    """

    def __init__(
        self, directory: Path, index: JournalIndex, disk: Disk, soon: Callable[[Callable[[], None]], object]
    ) -> None:
        """`soon` has something done at the loop's next turn."""
        self._disk = disk
        self._soon = soon
        self._later: deque[Waiting] = deque()
        self._later_bytes = 0
        self._writing: deque[Waiting] = deque()  # what the disk's thread is at; shared with it
        self._wanted_attempt = self._begun_attempt = 0
        self._gone = False
        super().__init__(directory, index)

    @property
    def hangs(self) -> bool:
        return self._disk.hangs

    def at_the_disk(self, work: Callable[[], T]) -> T:
        return self._disk.do(work)

    def append(self, encoded: bytes, stream: str, seq: int, link: int = 0, attempt: int = 0) -> None:
        self._later.append(Waiting(encoded=encoded, stream=stream, seq=seq, link=link, attempt=attempt))
        self._later_bytes += len(encoded)
        if stream == "events" or self._later_bytes > _TURN_BYTES:
            self.settle()
        elif len(self._later) == 1:
            self._soon(self.settle)
        while self._later_bytes > BACKLOG_BYTES:
            self._later_bytes -= len(self._later.popleft().encoded)
            self.lost += 1

    def settle(self) -> None:
        if self._later and not self._disk.busy:
            self._hand_over()
            with contextlib.suppress(DiskHangs):  # it goes on
                self._disk.do(self._write_all)

    def give_up(self) -> None:
        """Another hub took over while the disk hung: it gets from rank 0 what waits here, and nothing is written."""
        self._later.clear()
        self._later_bytes = 0

    def retry(self) -> bool:
        self.settle()
        try:
            return self._disk.do(super().retry)
        except DiskHangs:
            return False

    def deleted(self) -> bool:
        with contextlib.suppress(DiskHangs):
            self._disk.do(partial(self._look_for_it, super().deleted))
        gone, self._gone = self._gone, False
        return gone

    def full_segments(self) -> list[int]:
        return self._disk.do(super().full_segments)

    def close(self) -> None:
        """Waits for the disk, however long that takes: what this process holds would be gone with it."""
        self._hand_over()
        self._disk.do_however_long(partial(self._write_and_close, super().close))

    def begin_attempt(self, attempt: int) -> None:
        if attempt != self._wanted_attempt:
            self._wanted_attempt = attempt
            self._disk.post(partial(self._begin, attempt, super().begin_attempt))

    @property
    def written_link(self) -> int:
        return super().written_link if self._begun_attempt == self._wanted_attempt else 0

    @property
    def synced_link(self) -> int:
        return super().synced_link if self._begun_attempt == self._wanted_attempt else 0

    def unwritten_link(self) -> int | None:
        self.settle()
        if not self._disk.busy:
            return super().unwritten_link()
        if self.synced_link:
            return self.synced_link + 1  # the next one, if there is one: nothing after it was proved
        # The disk's thread moves them from each of these to the next: looked at in this order, none is missed.
        later, writing, backlog = list(self._later), list(self._writing), list(self._backlog)
        waiting = [*self._unproven.waiting(), *backlog, *writing, *later]
        return next((item.link for item in waiting if item.link and item.attempt == self._wanted_attempt), None)

    @property
    def safe_to_index(self) -> bool:
        self.settle()
        return not self._disk.busy and not self._later and super().safe_to_index

    # --- in the disk's thread, all but the first

    def _hand_over(self) -> None:
        self._writing.extend(self._later)
        self._later.clear()
        self._later_bytes = 0

    def _write_all(self) -> None:
        while self._writing:
            item = self._writing[0]
            try:
                super().append(item.encoded, item.stream, item.seq, item.link, item.attempt)
            finally:
                self._writing.popleft()  # only now: until then it is not written

    def _write_and_close(self, close: Callable[[], None]) -> None:
        self._write_all()
        close()

    def _look_for_it(self, deleted: Callable[[], bool]) -> None:
        self._gone = deleted() or self._gone

    def _begin(self, attempt: int, begin: Callable[[int], None]) -> None:
        begin(attempt)
        self._begun_attempt = attempt  # last: from here on `written_link` is of this attempt
