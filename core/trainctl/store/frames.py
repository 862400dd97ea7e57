"""Segments of a journal on disk, as frames: what is written, what can still be read, what is lost.

    NNNNNNNN.seg   recorded: a header, then one frame an envelope
    NNNNNNNN.col   packed from the segment of the same number, which is then removed (store/packing.py)
    header         8 bytes: b"TCJ" 0x00 (packed: b"TCP" 0x00), then the format version as uint32 little-endian
    frame          0xC1 0xC1 (a byte that MessagePack never uses), uint32 length of the payload,
                   uint32 CRC-32 of the payload (both little-endian), payload

After damage in the middle, reading goes on with the next whole frame, which the mark helps to find. It is told.
"""

import contextlib
import io
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from trainctl.wire.codec import DATA_LIMIT

FORMAT = 1
HEADER = struct.pack("<4sI", b"TCJ\0", FORMAT)
PACKED_HEADER = struct.pack("<4sI", b"TCP\0", FORMAT)
_MARK = b"\xc1\xc1"
_FRAME = struct.Struct("<2sII")
# Larger than any envelope that the wire lets through, so a length beyond it can only be damage.
FRAME_LIMIT = 4 * DATA_LIMIT
# A mark and a length that can be: what looks like marks all over is passed over as fast as it is read.
_PLAUSIBLE = re.compile(rb"\xc1(?=\xc1[\0-\xff]{2}[\0-\x40]\0)")
_PATIENCE = 16  # times the bytes behind a damage, to look for whole frames among them


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One payload and where it stands. `packed`: it holds several envelopes (packing.py), else it is one envelope."""

    payload: bytes
    segment: int
    offset: int
    packed: bool = False


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Bytes of a segment that could not be read. `torn` is what a crash leaves at the end, anything else is decay.

    `why`: the whole segment is missing, or the file system did not give its bytes, which may pass.
    """

    segment: int
    offset: int
    bytes: int
    torn: bool
    why: str = ""

    def __str__(self) -> str:
        where = f"journal segment {self.segment:08d}"
        if self.why:
            return f"{where} {self.why}: what it holds is not shown"
        what = "ends in the middle of a record" if self.torn else "is damaged"
        return f"{where} {what} at byte {self.offset}: {self.bytes} bytes are lost"


def missing_segment(number: int) -> Damage:
    return Damage(segment=number, offset=0, bytes=0, torn=False, why="is missing")


def segment_file(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}.seg"


def packed_file(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}.col"


def segments(directory: Path) -> list[int]:
    """Numbers of the segments in a journal, packed or not, oldest first; none where the directory does not exist."""
    names = {path.stem for pattern in ("*.seg", "*.col") for path in directory.glob(pattern) if path.stem.isdigit()}
    return sorted(int(name) for name in names)


def recorded_segments(directory: Path) -> list[int]:
    """Numbers of the segments that are not packed, oldest first."""
    found = {int(path.stem) for path in directory.glob("*.seg") if path.stem.isdigit()}
    return sorted(number for number in found if not packed_file(directory, number).exists())


def frame(payload: bytes) -> bytes:
    """A payload as it is written."""
    return _FRAME.pack(_MARK, len(payload), zlib.crc32(payload)) + payload


def frame_size(payload: bytes) -> int:
    return _FRAME.size + len(payload)


def read_frames(directory: Path, damage: list[Damage] | None = None, *, after: int = 0) -> Iterator[Frame]:
    """Every readable frame of the segments after number `after`, oldest first. What cannot be read, for whatever
    reason, is appended to `damage`. Raises OSError when the directory itself cannot be read."""
    lost: list[Damage] = [] if damage is None else damage
    present = [number for number in segments(directory) if number > after]
    expected = after + 1
    for number in present:
        lost += [missing_segment(missing) for missing in range(expected, number)]
        expected = number + 1
        found: list[Damage] = []
        yield from segment_frames(directory, number, None, found)
        # Whoever opens a journal cuts the torn tail of its newest segment: anywhere else it is decay.
        lost += [replace(each, torn=each.torn and number == present[-1]) for each in found]


def segment_frames(
    directory: Path, number: int, start: int | None = None, damage: list[Damage] | None = None
) -> Iterator[Frame]:
    """The readable frames of one segment from byte `start` on. A packed segment stands for the recorded one."""
    lost: list[Damage] = [] if damage is None else damage
    try:
        yield from _frames(directory, number, start, lost)
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
        lost.append(Damage(segment=number, offset=0, bytes=0, torn=False, why=why))


def _frames(directory: Path, number: int, start: int | None, lost: list[Damage]) -> Iterator[Frame]:
    file, packed = _open(directory, number)
    with contextlib.closing(file):
        header = PACKED_HEADER if packed else HEADER
        if file.read(len(header)) != header:
            size = os.fstat(file.fileno()).st_size
            lost.append(Damage(segment=number, offset=0, bytes=size, torn=size < len(header)))
            return
        offset = file.seek(len(header) if start is None else start)
        rest, base = None, 0
        while head := file.read(_FRAME.size):
            payload = _payload(head, file)
            if payload is not None:
                yield Frame(payload=payload, segment=number, offset=offset, packed=packed)
                offset += _FRAME.size + len(payload)
                continue
            if rest is None:  # what is behind the first damage is looked into in memory, once
                file.seek(offset)
                rest, base = _Rest(file.read()), offset
                file = io.BytesIO(rest.data)
            at = offset - base
            following = rest.next_frame(at)
            torn = following is None and not packed and not rest.whole(at)
            size = (len(rest.data) if following is None else following) - at
            lost.append(Damage(segment=number, offset=offset, bytes=size, torn=torn))
            if following is None:
                return
            offset = base + file.seek(following)


def read_packed(directory: Path, number: int, offset: int) -> bytes | None:
    """The payload at one place of a packed segment, or None where it cannot be read any more."""
    try:
        with packed_file(directory, number).open("rb") as file:
            file.seek(offset)
            return _payload(file.read(_FRAME.size), file)
    except OSError:
        return None


def _open(directory: Path, number: int) -> tuple[BinaryIO, bool]:
    try:
        return packed_file(directory, number).open("rb"), True
    except FileNotFoundError:
        pass
    try:
        return segment_file(directory, number).open("rb"), False
    except FileNotFoundError:
        # Packed between the two looks: the packed file is whole before the recorded one goes.
        return packed_file(directory, number).open("rb"), True


def _payload(head: bytes, file: BinaryIO) -> bytes | None:
    """The payload that follows a frame's head in `file`, or None where the two do not belong together."""
    if len(head) < _FRAME.size:
        return None
    mark, length, checksum = _FRAME.unpack(head)
    if mark != _MARK or not 0 < length <= FRAME_LIMIT:
        return None
    payload = file.read(length)
    return payload if len(payload) == length and zlib.crc32(payload) == checksum else None


class _Rest:
    """The bytes of a segment from its first damage on."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._patience = _PATIENCE * len(data) + FRAME_LIMIT

    def whole(self, at: int) -> bool:
        """Whether a frame of the length that its head says is there: then its bytes changed, and no crash cut it."""
        return self._length(at) is not None

    def next_frame(self, at: int) -> int | None:
        """Where the first whole frame behind `at` begins, or None: nothing more can be read.

        What was made to look like frames everywhere, each longer than it is worth, is given up.
        """
        view = memoryview(self.data)
        for found in _PLAUSIBLE.finditer(self.data, at + 1):
            length = self._length(found.start())
            if length is None:
                continue
            self._patience -= length
            start = found.start() + _FRAME.size
            if zlib.crc32(view[start : start + length]) == _FRAME.unpack_from(self.data, found.start())[2]:
                return found.start()
            if self._patience <= 0:
                return None
        return None

    def _length(self, at: int) -> int | None:
        """Of the payload that a frame here would have, None where there is no room for one."""
        if len(self.data) - at < _FRAME.size:
            return None
        mark, length, _ = _FRAME.unpack_from(self.data, at)
        return length if mark == _MARK and 0 < length <= min(FRAME_LIMIT, len(self.data) - at - _FRAME.size) else None
