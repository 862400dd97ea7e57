"""Takes what a rank 0 left in the run's directory because the hub was frozen, or not there yet, when training ended."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import msgspec

from trainctl.hub.aside import Aside, StillBusy
from trainctl.hub.board import RunBoard
from trainctl.hub.disk import Disk
from trainctl.store.record import RunRecord
from trainctl.wire import codec
from trainctl.wire.left_behind import Head, Left, left_in
from trainctl.wire.messages import LinkBye, LinkRecord, RunState

log = logging.getLogger(__name__)

T = TypeVar("T")

_AT_ONCE = 64  # records that are read before the loop has a turn: 8 MiB at most
_LOOK_S = 2.0  # for a disk that hangs: what is found later is told later
_READ_S = 10.0


class LeftBehind:
    """Takes each file once. `taken` are those that `forget` may delete, as soon as the journal is synced."""

    def __init__(
        self,
        *,
        directory: Path,
        record: RunRecord,
        board: RunBoard,
        take: Callable[[LinkRecord, int], object],
        end: Callable[[LinkBye, int, float, RunState], object],
    ) -> None:
        """`take` has a record of an attempt recorded, unless it is already; `end` says how that attempt ended, when,
        and what was true then."""
        self._directory = directory
        self._record = record
        self._board = board
        self._take = take
        self._end = end
        self._have: dict[Path, int] = {}  # what the link had brought when a file was first seen
        self._known: set[Path] = set()
        self._turn = asyncio.Lock()
        self.taken: list[Path] = []

    async def bring(self, up_to: int | None = None) -> None:
        """Take what is there of attempts up to `up_to`. Where the disk hangs, that is for the next time."""
        async with self._turn:
            try:
                for path in await Aside(partial(left_in, self._directory, up_to)).run(_LOOK_S):
                    if path not in self._known:
                        with contextlib.suppress(OSError):  # that one cannot be read now
                            await self._bring(path)
            except (OSError, StillBusy) as error:
                log.warning("whether rank 0 left something in %s is not known: %s", self._directory, error)

    def forget(self, taken: list[Path], disk: Disk) -> None:
        """Delete files of which everything is in the journal, and synced; where that fails, the next time."""

        def delete() -> None:
            for path in taken:
                path.unlink(missing_ok=True)

        with contextlib.suppress(OSError):
            disk.do(delete)
            self.taken = [path for path in self.taken if path not in taken]

    async def _bring(self, path: Path) -> None:
        try:
            left = await _aside(partial(Left, path))
        except codec.DecodeError as error:
            log.warning("%s is damaged, and passed over: %s", path, error)
            self._known.add(path)
            return
        info = left.head.hello.info
        if info.id != self._record.info.id:
            log.warning("%s is of the run %s, and passed over", path, info.id)
            self._known.add(path)
            return
        attempt, records = left.head.attempt, left.records()
        have = self._have.setdefault(path, self._record.link_have(attempt))
        if attempt >= self._board.state.attempt and not self._board.knows(attempt):
            self._board.take_info(msgspec.structs.replace(info, dir=str(self._directory)))  # it may have been moved
            self._board.begin(left.head.hello)
        while some := await _aside(lambda: list(islice(records, _AT_ONCE))):
            for record in some:
                self._take(record, attempt)
        self._known.add(path)
        self.taken.append(path)
        self._conclude(left.head, have)

    def _conclude(self, head: Head, have: int) -> None:
        run, lost = head.ended(have)
        if head.tells_the_end(self._board.state):
            self._end(head.bye, head.attempt, head.time, run)
        log.info("the end of attempt %d is as rank 0 left it: %s", head.attempt, head.bye)
        if lost:
            text = (
                f"{lost} rows and events of the run's end are missing: the hub did not run when training ended, and "
                "they were older than a minute or the disk had no room for them; all others are there"
            )
            self._board.anomaly("dropped", text, "warning")


async def _aside(work: Callable[[], T]) -> T:
    return await Aside(work).run(_READ_S)
