"""Files of a checkpoint as the background writes them: in pieces, hashed on the way, synced as they grow.

It is torch.distributed.checkpoint's own writer and format; only the file underneath is ours. A sync of all at the end
would keep the disk busy for seconds at once, and so anything of training that waits for the same disk.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from trainctl.trainer.checkpoint.background import Pace

# Both calls let go of the interpreter's lock for as long as a piece takes: about a millisecond.
_PIECE_BYTES = 1024 * 1024
_SYNC_BYTES = 32 * 1024 * 1024
_SMALL_BYTES = 64 * 1024


class PacedFile(io.RawIOBase):
    """A new file that is written from its beginning to its end. Raises OSError as any file does, but for writing once.

    torch's zip writer ends its archive from a destructor when a write has failed, and an error in there would end the
    process: so after the first one what is written is thrown away, and whoever asks for descriptor or hash is told.
    """

    def __init__(self, path: Path, pace: Pace) -> None:
        super().__init__()
        self._file = path.open("wb", buffering=0)
        self._pace = pace
        self._digest = hashlib.sha256()
        self._small = bytearray()  # headers and small tensors, until they make a piece
        self._size = 0
        self._unsynced = 0
        self._failed: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Take all of it: unlike other raw files, this one never stops half-way."""
        with memoryview(data).cast("B") as view:
            size = len(view)
            if size < _SMALL_BYTES:
                self._small += view
                if len(self._small) >= _PIECE_BYTES:
                    self.flush()
            else:
                self.flush()
                self._put(view)
        self._size += size
        self._pace.rest()
        return size

    def flush(self) -> None:
        if not self.closed and self._small:
            small, self._small = self._small, bytearray()
            with memoryview(small) as view:
                self._put(view)

    def _put(self, view: memoryview) -> None:
        if self._failed is not None:
            return
        try:
            self._put_pieces(view)
        except OSError as error:
            self._failed = error
            raise

    def _put_pieces(self, view: memoryview) -> None:
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            written = 0
            while written < len(piece):
                written += self._file.write(piece[written:]) or 0
            self._digest.update(piece)
            self._unsynced += len(piece)
            if self._unsynced >= _SYNC_BYTES:
                os.fdatasync(self._file.fileno())
                self._unsynced = 0
            self._pace.rest()

    def tell(self) -> int:
        return self._size

    def fileno(self) -> int:
        self._whole()  # who asks is going to sync
        return self._file.fileno()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()
            super().close()

    @property
    def hashed(self) -> tuple[int, str]:
        """Size and SHA-256 of what was written; ask after the last write."""
        self._whole()
        return self._size, self._digest.hexdigest()

    def _whole(self) -> None:
        self.flush()
        if self._failed is not None:
            raise self._failed


class PacedFileSystem(FileSystem):
    """`hashed`: size and hash by the name of every file that was written to its end."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace
        self.hashed: dict[str, tuple[int, str]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with PacedFile(Path(path), self._pace) as file:
            yield file
            self.hashed[Path(path).name] = file.hashed


class PacedWriter(FileSystemWriter):
    """torch.distributed.checkpoint's writer over such files, one a rank."""

    def __init__(self, directory: Path, pace: Pace) -> None:
        super().__init__(directory, thread_count=1, sync_files=False)
        self.files = PacedFileSystem(pace)
        self.fs = self.files
