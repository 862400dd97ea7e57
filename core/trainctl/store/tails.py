"""The ends of recorded segments: torn by a crash, or not on disk although they were written."""

import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec

from trainctl.store.frames import HEADER, Damage, recorded_segments, segment_file, segment_frames


class Key(msgspec.Struct):
    """The part of an envelope that the index needs; the rest is skipped without being built."""

    stream: str
    seq: int
    link: int = 0
    attempt: int = 0


key_decoder = msgspec.msgpack.Decoder(Key)


def cut_torn_tail(directory: Path, number: int) -> int:
    """Truncate the newest segment after its last good frame; return the bytes that went. Decay in it is kept."""
    damage: list[Damage] = []
    for _ in segment_frames(directory, number, None, damage):
        pass
    torn = damage[-1] if damage and damage[-1].torn else None
    if torn is None or torn.offset == 0:
        return 0
    with segment_file(directory, number).open("r+b") as file:
        file.truncate(torn.offset)
        os.fsync(file.fileno())
    return torn.bytes


class Unsynced(OSError):
    """The file system lost, or may have lost, what is behind the last good sync: `envelopes` are what it still gives of
    it (`encoded`, `stream`, `seq`, `link`, `attempt`), `doubtful` the bytes of each segment that are beyond doubt."""

    def __init__(self, error: OSError, envelopes: list[dict[str, Any]], doubtful: dict[int, int]) -> None:
        super().__init__(error.errno, error.strerror)
        self.envelopes, self.doubtful = envelopes, doubtful


def sync_recorded(directory: Path) -> None:
    """Put on disk what a hub that is gone appended and may not have synced. Raises `Unsynced`, or OSError."""
    numbers = recorded_segments(directory)
    for at, number in enumerate(numbers):
        handle = os.open(segment_file(directory, number), os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            # Those behind it as well: a reader takes the numbers of a stream only as they grow.
            again = numbers[at:]
            raise Unsynced(error, _envelopes(directory, again), dict.fromkeys(again, len(HEADER))) from None
        finally:
            os.close(handle)


def _envelopes(directory: Path, numbers: list[int]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number in numbers:
        for each in segment_frames(directory, number):
            with contextlib.suppress(msgspec.MsgspecError):  # of no version we know
                found.append(msgspec.structs.asdict(key_decoder.decode(each.payload)) | {"encoded": each.payload})
    return found


def cut_back(directory: Path, number: int, size: int) -> None:
    """Take from a recorded segment what was appended behind `size` bytes, if it was not packed. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), segment_file(directory, number).open("r+b") as file:
        file.write(HEADER)
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())
