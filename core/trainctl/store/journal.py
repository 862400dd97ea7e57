"""The journal: the recorded wire, an append-only sequence of encoded envelopes in segments (store/frames.py).

One writer, no locks, no mmap: shared file systems are the normal case. Every opening begins a new segment, so that
no two processes ever write into one file. A tail that was torn by a crash is cut at the last good frame when the
journal is opened for writing, and passed over when it is only read. Either way it is told.
"""

import contextlib
import errno
import os
import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainctl.store.frames import (
    HEADER,
    Damage,
    Frame,
    frame,
    packed_file,
    read_frames,
    segment_file,
    segment_frames,
    segments,
)
from trainctl.store.tails import cut_torn_tail, key_decoder
from trainctl.wire.codec import DATA_LIMIT
from trainctl.wire.rundir import fsync_dir

__all__ = [
    "SEGMENT_BYTES",
    "Damage",
    "Frame",
    "JournalIndex",
    "JournalWriter",
    "read_frames",
    "read_journal",
]

SEGMENT_BYTES = 8 * 1024 * 1024
_BLOCK = 64


def read_journal(directory: Path, damage: list[Damage] | None = None) -> Iterator[bytes]:
    """The encoded envelopes of a journal that was never packed, oldest first; tolerant of torn tails and flipped
    bytes. Raises OSError."""
    for found in read_frames(directory, damage):
        yield found.payload


@dataclass
class _Blocks:
    """Where every 64th envelope of a stream stands: enough to find any, at a few bytes for each."""

    first_seqs: list[int] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0
    last_seq: int = 0
    gone: int = 0  # up to here single envelopes are no longer kept
    epoch: int = 0


class JournalIndex:
    """Finds envelopes by stream and sequence number in a journal that is being written or was read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._streams: dict[str, _Blocks] = {}

    def note(self, stream: str, seq: int, segment: int, offset: int, epoch: int = 0) -> None:
        """Remember where an envelope stands. Numbers of a stream come in growing order; others are ignored.

        A newer epoch may count from an older number, when its hub could not read all that there was: what was said
        under those numbers before is then not to be had one by one any more.
        """
        blocks = self._streams.setdefault(stream, _Blocks())
        if epoch > blocks.epoch:
            if seq <= blocks.last_seq:
                blocks.first_seqs, blocks.places, blocks.count = [], [], 0
                blocks.gone, blocks.last_seq = seq - 1, seq - 1
            blocks.epoch = epoch
        if seq <= blocks.last_seq:
            return
        if not blocks.places or blocks.count % _BLOCK == 0 or segment != blocks.places[-1][0]:
            blocks.first_seqs.append(seq)
            blocks.places.append((segment, offset))
            blocks.count = 0
        blocks.count += 1
        blocks.last_seq = seq

    def forget(self, segment: int) -> None:
        """A segment was packed: its envelopes, and all before them, can no longer be had one by one."""
        for blocks in self._streams.values():
            kept = next((at for at, place in enumerate(blocks.places) if place[0] > segment), len(blocks.places))
            if kept:
                blocks.gone = blocks.first_seqs[kept] - 1 if kept < len(blocks.places) else blocks.last_seq
                del blocks.first_seqs[:kept], blocks.places[:kept]
                blocks.count = blocks.count if blocks.places else 0

    def rewind(self, stream: str, seq: int) -> None:
        """The envelope of that number, and those after it, are about to be appended again."""
        blocks = self._streams.get(stream)
        if blocks is not None and blocks.gone < seq <= blocks.last_seq:
            kept = bisect_left(blocks.first_seqs, seq)
            del blocks.first_seqs[kept:], blocks.places[kept:]
            blocks.count, blocks.last_seq = 0, seq - 1

    def skip(self, stream: str, seq: int) -> None:
        """Envelopes up to `seq` are in packed segments."""
        blocks = self._streams.setdefault(stream, _Blocks())
        blocks.gone, blocks.last_seq = max(blocks.gone, seq), max(blocks.last_seq, seq)

    @property
    def gone(self) -> dict[str, int]:
        """The number, by stream, up to which envelopes are in packed segments."""
        return {stream: blocks.gone for stream, blocks in self._streams.items() if blocks.gone}

    def read(self, stream: str, first: int, last: int, limit_bytes: int = DATA_LIMIT) -> list[bytes]:
        """Encoded envelopes `first` to `last` of a stream, at most about `limit_bytes`; none if `first` was packed.

        Raises OSError.
        """
        blocks = self._streams.get(stream)
        if blocks is None or first <= blocks.gone:
            return []
        found: list[bytes] = []
        size = 0
        for at in range(max(0, bisect_right(blocks.first_seqs, first) - 1), len(blocks.first_seqs)):
            if blocks.first_seqs[at] > last or size > limit_bytes:
                break
            for seq, payload in self._block(blocks, at, stream):
                if first <= seq <= last:
                    found.append(payload)
                    size += len(payload)
        return found

    def _block(self, blocks: _Blocks, at: int, stream: str) -> Iterator[tuple[int, bytes]]:
        segment, offset = blocks.places[at]
        end = blocks.first_seqs[at + 1] if at + 1 < len(blocks.first_seqs) else blocks.last_seq + 1
        for found in segment_frames(self._directory, segment, offset):
            key = key_decoder.decode(found.payload)
            if key.stream != stream:
                continue
            if key.seq >= end:
                return
            yield key.seq, found.payload
            if key.seq == end - 1:
                return


class JournalWriter:
    """Appends encoded envelopes. What is appended is in the kernel's hands at once, and on disk after `sync`.

    Opening cuts a torn tail (`cut_bytes` says how much) and begins a new segment. Every method raises OSError; after a
    failed append the journal ends with the last whole frame, and the append may be tried again.
    """

    def __init__(
        self,
        directory: Path,
        segment_bytes: int = SEGMENT_BYTES,
        index: JournalIndex | None = None,
        after: int = 0,
    ) -> None:
        """The first segment has a number above `after` and above all that exist: no number is used twice."""
        self._directory = directory
        self._segment_bytes = segment_bytes
        self.index = index or JournalIndex(directory)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        existing = segments(directory)
        torn = bool(existing) and not packed_file(directory, existing[-1]).exists()
        self.cut_bytes = cut_torn_tail(directory, existing[-1]) if torn else 0
        self._segment = max([after, *existing[-1:]])
        self._fd = -1
        self._offset = 0
        self._full: deque[int] = deque()  # descriptors of full segments, until they are synced
        self._syncing = threading.Lock()
        self._end = (0, 0)  # segment and size, always of one moment
        self._proven: dict[int, int] = {}
        self._failed: OSError | None = None
        self._begin_segment()

    def append(self, encoded: bytes, stream: str, seq: int) -> None:
        """Write one envelope and index it."""
        if self._offset >= self._segment_bytes:
            self._begin_segment()
        framed = frame(encoded)
        self._write(framed)
        self.index.note(stream, seq, self._segment, self._offset)
        self._offset += len(framed)
        self._end = (self._segment, self._offset)

    def sync(self) -> None:
        """Put everything appended so far on disk. May run in another thread than `append` and `close`.

        Once it failed it fails for good: what was not written back is gone, although the next fsync would succeed.
        """
        with self._syncing:
            if self._fd < 0:
                raise OSError(errno.EBADF, "it was closed")
            if self._failed is not None:
                raise OSError(self._failed.errno, self._failed.strerror)
            segment, size = self._end
            handle = os.dup(self._fd)  # the next segment may begin meanwhile
            try:
                while self._full:
                    os.fsync(self._full[0])
                    os.close(self._full.popleft())
                os.fsync(handle)
            except OSError as error:
                self._failed = error
                raise
            finally:
                os.close(handle)
            self._proven[segment] = size
            for older in [number for number in list(self._proven) if number < segment]:
                del self._proven[older]

    def unproven(self) -> dict[int, int]:
        """Segments of this writer that may hold more than was synced, each with the bytes that were."""
        return dict(self._proven)

    @property
    def segment(self) -> int:
        """Number of the segment that is being written."""
        return self._segment

    @property
    def removed(self) -> bool:
        """Whether somebody deleted the segment that is being written: what is appended then vanishes with us.

        Raises OSError.
        """
        try:
            return os.fstat(self._fd).st_nlink == 0
        except OSError as error:
            if error.errno == errno.ESTALE:  # how a file server says so
                return True
            raise

    def close(self) -> None:
        """Sync and close; the writer is of no use afterwards. Waits for a sync that another thread is at."""
        if self._fd >= 0:
            try:
                self.sync()
            finally:
                with self._syncing:
                    for handle in [*self._full, self._fd]:
                        os.close(handle)
                    self._full.clear()
                    self._fd = -1

    def _begin_segment(self) -> None:
        number = max(self._segment, *segments(self._directory), 0) + 1  # a hub after us may have taken the next
        path = segment_file(self._directory, number)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if os.write(handle, HEADER) != len(HEADER):
                raise OSError(f"no room for a new journal segment in {self._directory}")
            fsync_dir(self._directory)
        except OSError:
            os.close(handle)
            with contextlib.suppress(OSError):  # the reason to fail is the first error; an empty segment does no harm
                path.unlink()
            raise
        if self._fd >= 0:
            self._full.append(self._fd)
        self._fd, self._segment, self._offset = handle, number, len(HEADER)
        self._proven[number] = len(HEADER)
        self._end = (number, len(HEADER))

    def _write(self, framed: bytes) -> None:
        written = 0
        try:
            while written < len(framed):
                written += os.write(self._fd, memoryview(framed)[written:])
        except OSError:
            # A full disk takes part of a frame: take it back, so that what follows later is readable.
            os.ftruncate(self._fd, self._offset)
            os.lseek(self._fd, self._offset, os.SEEK_SET)
            raise
