"""Keeps the journal small and quick to open: full segments are packed, and the index is saved, while the hub lives."""

import asyncio
import contextlib
import logging
import time

from trainctl.hub.disk import DiskHangs
from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.ownership import Ownership
from trainctl.store.frames import packed_file, segment_file, segments
from trainctl.store.packed import Sealed, UnreadableSegment
from trainctl.store.packing import pack_segment, packing_steps
from trainctl.store.record import RunRecord
from trainctl.store.saved import packed_sizes, write_index

log = logging.getLogger(__name__)

_LOOK_S = 2.0
_AGAIN_S = 60.0
_GROWN = 1.05  # the index is saved again when the journal grew by so much: opening replays no more than that
_BACKLOG = 2
_TURN_S = 0.1
_FRESH_S = 30.0  # a segment that another process may have written a moment ago is left alone


class JournalPacking:
    """One segment at a time, in a thread. The newest full one stays as it is, for clients that missed a little."""

    def __init__(self, *, record: RunRecord, keeper: JournalKeeper, ownership: Ownership) -> None:
        self._record = record
        self._keeper = keeper
        self._ownership = ownership
        self._indexed_bytes = 0
        self._put_off: dict[int, float] = {}  # segments that could not be read, and when to try again

    async def run(self) -> None:
        """Pack and save until cancelled."""
        with contextlib.suppress(OSError):  # untidy, and no harm
            self._keeper.at_the_disk(self._sweep)
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                while (waiting := self._waiting()) and self._ownership.held(look=True):
                    if not self._settled(waiting[0]):
                        break
                    # Two threads that both compute take turns slowly. When history comes faster than it is packed, the
                    # loop itself packs: rank 0 then waits with its records, and memory stays bounded.
                    await self._pack(waiting[0], in_thread=len(waiting) < _BACKLOG)
                    if len(waiting) < _BACKLOG:
                        await self._save_index(_GROWN)
            except DiskHangs:
                continue
            except OSError as error:
                log.warning("the journal cannot be packed, it stays larger than it need be: %s", error)
                await asyncio.sleep(_AGAIN_S)

    async def finish(self) -> None:
        """After the journal was closed: pack all of it and save the index, for whoever opens the run later."""
        try:
            for number in self._keeper.full_segments():
                # The next attempt may have brought a hub of its own meanwhile, which writes a segment of its own.
                if number > self._keeper.newest_segment or not self._ownership.held(look=True):
                    return
                await self._pack(number, in_thread=True)
            if self._ownership.held(look=True):
                await self._save_index(1.0)
        except OSError as error:
            log.warning("the journal was not packed at the end: %s", error)

    def _waiting(self) -> list[int]:
        """Segments to pack, oldest first: all full ones but the newest, and none that could not be read a while ago."""
        now = time.monotonic()
        return [number for number in self._keeper.full_segments()[:-1] if self._put_off.get(number, now) <= now]

    def _sweep(self) -> None:
        """What a hub that was killed while it packed left behind."""
        for pattern in ("*.col.*.tmp", ".index.*.new"):
            for left in self._keeper.directory.glob(pattern):
                left.unlink()

    def _settled(self, number: int) -> bool:
        """Whether no hub before us can still be writing it."""
        # A file server's clock may be ahead of ours.
        file = segment_file(self._keeper.directory, number)
        age_s = abs(time.time() - self._keeper.at_the_disk(file.stat).st_mtime)
        return self._keeper.wrote(number) or age_s > _FRESH_S

    async def _pack(self, number: int, *, in_thread: bool) -> None:
        """Pack one segment, or put it off while it cannot be read. Raises OSError where nothing can be written."""
        directory = self._keeper.directory
        try:
            if in_thread:
                places = await asyncio.to_thread(pack_segment, directory, number)
            else:
                places = await self._pack_in_turns(number)
        except UnreadableSegment as error:
            if number not in self._put_off:
                log.warning("%s", error.strerror)
            self._put_off[number] = time.monotonic() + _AGAIN_S
            return
        self._put_off.pop(number, None)
        self._keeper.index.forget(number)
        self._record.seal(places)

    async def _pack_in_turns(self, number: int) -> list[Sealed]:
        """Pack here in the loop, and let everybody else, the heartbeat first of all, have a turn now and then."""
        steps = packing_steps(self._keeper.directory, number)
        try:
            turn_ends = time.monotonic() + _TURN_S
            while True:
                next(steps)
                if time.monotonic() > turn_ends:
                    await asyncio.sleep(0)
                    turn_ends = time.monotonic() + _TURN_S
        except StopIteration as done:
            places: list[Sealed] = done.value
            return places
        finally:
            steps.close()  # a cancelled one leaves no half file

    async def _save_index(self, grown: float) -> None:
        """Save what replaying the packed segments would build, and what else is known, if all of that is on disk.

        An index that knew more than the journal would make rank 0 forget what nothing but the index holds.
        """
        directory = self._keeper.directory
        sizes = self._keeper.at_the_disk(lambda: packed_sizes(directory, self._covered()))
        total = sum(size for _, size in sizes)
        if not (total > self._indexed_bytes * grown or grown == 1.0) or not self._keeper.safe_to_index:
            return
        saved = self._record.save(sizes, self._keeper.index.gone)
        if not self._keeper.closed and not await asyncio.to_thread(self._keeper.sync):
            return
        await asyncio.to_thread(write_index, directory, saved)
        self._indexed_bytes = total

    def _covered(self) -> list[int]:
        """The packed segments from the first one on without a hole, and none of a hub after this one."""
        covered: list[int] = []
        for number in segments(self._keeper.directory):
            if number > self._keeper.newest_segment or not packed_file(self._keeper.directory, number).exists():
                break
            covered.append(number)
        return covered
