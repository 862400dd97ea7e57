"""Keeps the journal small and quick to open: full segments are packed, and the index is saved, while the hub lives."""

import asyncio
import contextlib
import logging
import time

from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.ownership import Ownership
from trainctl.store.frames import packed_file, segment_file, segments
from trainctl.store.packing import pack_segment
from trainctl.store.record import RunRecord
from trainctl.store.saved import packed_sizes, write_index

log = logging.getLogger(__name__)

_LOOK_S = 2.0
_AGAIN_S = 60.0
_GROWN = 1.05  # the index is saved again when the journal grew by so much: opening replays no more than that
_BACKLOG = 2
_FRESH_S = 30.0  # a segment that another process may have written a moment ago is left alone


class JournalPacking:
    """One segment at a time, in a thread. The newest full one stays as it is, for clients that missed a little."""

    def __init__(self, *, record: RunRecord, keeper: JournalKeeper, ownership: Ownership) -> None:
        self._record = record
        self._keeper = keeper
        self._ownership = ownership
        self._indexed_bytes = 0

    async def run(self) -> None:
        """Pack and save until cancelled."""
        self._sweep()
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                while self._ownership.held() and (waiting := self._keeper.full_segments()[:-1]):
                    if not self._settled(waiting[0]):
                        break
                    # Two threads that both compute take turns slowly. When history comes faster than it is packed, the
                    # loop itself packs: rank 0 then waits with its records, and memory stays bounded.
                    await self._pack(waiting[0], in_thread=len(waiting) < _BACKLOG)
                    if len(waiting) < _BACKLOG:
                        await self._save_index(_GROWN)
            except OSError as error:
                log.warning("the journal cannot be packed, it stays larger than it need be: %s", error)
                await asyncio.sleep(_AGAIN_S)

    async def finish(self) -> None:
        """After the journal was closed: pack all of it and save the index, for whoever opens the run later."""
        if not self._ownership.held():
            return
        try:
            for number in self._keeper.full_segments():
                await self._pack(number, in_thread=True)
            await self._save_index(1.0)
        except OSError as error:
            log.warning("the journal was not packed at the end: %s", error)

    def _sweep(self) -> None:
        """What a hub that was killed while it packed left behind."""
        directory = self._keeper.directory
        with contextlib.suppress(OSError):  # untidy, and no harm
            for pattern in ("*.col.*.tmp", ".index.*.new"):
                for left in directory.glob(pattern):
                    left.unlink()

    def _settled(self, number: int) -> bool:
        """Whether no hub before us can still be writing it."""
        # A file server's clock may be ahead of ours.
        age_s = abs(time.time() - segment_file(self._keeper.directory, number).stat().st_mtime)
        return self._keeper.wrote(number) or age_s > _FRESH_S

    async def _pack(self, number: int, *, in_thread: bool) -> None:
        directory = self._keeper.directory
        places = (
            await asyncio.to_thread(pack_segment, directory, number) if in_thread else pack_segment(directory, number)
        )
        self._keeper.index.forget(number)
        self._record.seal(places)

    async def _save_index(self, grown: float) -> None:
        directory = self._keeper.directory
        packed = [number for number in segments(directory) if packed_file(directory, number).exists()]
        sizes = packed_sizes(directory, packed)
        total = sum(size for _, size in sizes)
        if total > self._indexed_bytes * grown or grown == 1.0:
            saved = self._record.save(sizes, self._keeper.index.gone)
            await asyncio.to_thread(write_index, directory, saved)
            self._indexed_bytes = total
