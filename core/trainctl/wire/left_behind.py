"""What rank 0 still had when its process ended and the hub took no more: a file in the run's directory.

    left-000001     of attempt 1: `Head`, and then the records of the link that are not known to be on disk

A hub that is frozen, or only starting, cannot be waited for by a process that ends. It reads the file before it says
that a run is lost, and so does whoever opens the directory. Records are numbered: what came over the link as well
counts once. A frame is its length and its CRC-32, little-endian, and MessagePack; the first one is the head.
"""

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from trainctl.wire import codec
from trainctl.wire.messages import FINAL_STATES, LinkBye, LinkHello, LinkRecord, Number, Rows, RunState
from trainctl.wire.rundir import write_atomic

_NAME: Final = re.compile(r"left-(\d{6,9})\Z")
_FRAME: Final = struct.Struct("<II")
_HEAD_LIMIT: Final = 16 * codec.DATA_LIMIT


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """How the run ended, as rank 0 would have said it to a hub that listens.

    `run` is what it would have said of itself last, with what was dropped until then. `doubtful` are records that are
    not in the file, by number, with how many rows or events each holds: of these the hub has what the link brought it,
    and the others are lost.
    """

    hello: LinkHello
    run: RunState
    bye: LinkBye
    time: float
    doubtful: list[tuple[Number, Number]] = []

    @property
    def attempt(self) -> int:
        return self.hello.info.attempt

    def tells_the_end(self, known: RunState) -> bool:
        """Whether a run of which this is known ended as told here: nothing newer is known, and no end but `lost`."""
        if known.attempt != self.attempt:
            return known.attempt < self.attempt
        return known.state == "lost" or known.state not in FINAL_STATES

    def ended(self, have: int) -> tuple[RunState, int]:
        """What was true at the end, and how many rows and events are lost beyond those that rank 0 knew to be;
        `have` is the newest number that came over the link."""
        lost = sum(weight for number, weight in self.doubtful if number > have)
        dropped = dict(self.run.dropped)
        dropped["link"] = dropped.get("link", 0) + lost
        return msgspec.structs.replace(self.run, dropped=dropped), lost


def leave(directory: Path, head: Head, records: Iterable[bytes]) -> Path:
    """Write down what is left, encoded `LinkRecord`s, whole or not at all. Raises OSError."""
    path = directory / f"left-{head.attempt:06d}"
    write_atomic(path, _frames((codec.encode(head), *records)))
    return path


def left_in(directory: Path, up_to: int | None = None) -> list[Path]:
    """The files of what was left, of attempt `up_to` and those before it, oldest first. Raises OSError."""
    found = []
    for path in directory.iterdir():
        named = _NAME.match(path.name)
        if named is not None and (up_to is None or int(named[1]) <= up_to):
            found.append((int(named[1]), path))
    return [path for _, path in sorted(found)]


class Left:
    """One such file, opened. What decayed, or is none of it, is passed over with what follows."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, or `codec.DecodeError` for a file that does not even have a head."""
        self.path = path
        self._frames = _read(path)
        head = codec.decoder(Head, _HEAD_LIMIT)(next(self._frames, b""))
        assert isinstance(head, Head)
        self.head = head

    def records(self) -> Iterator[LinkRecord]:
        """What is left, in order. Raises OSError."""
        decode = codec.decoder(LinkRecord, codec.DATA_LIMIT)
        for payload in self._frames:
            with contextlib.suppress(codec.DecodeError):
                record = decode(payload)
                assert isinstance(record, LinkRecord)
                if not isinstance(record.body, Rows) or len(record.body.steps) == len(record.body.times):
                    yield record

    def close(self) -> None:
        self._frames.close()


def _frames(payloads: Iterable[bytes]) -> Iterator[bytes]:
    for payload in payloads:
        yield _FRAME.pack(len(payload), zlib.crc32(payload))
        yield payload


def _read(path: Path) -> Generator[bytes, None, None]:
    # Not through a link that somebody else may have put there, and never a pipe that waits for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        while len(start := file.read(_FRAME.size)) == _FRAME.size:
            size, checksum = _FRAME.unpack(start)
            if size > _HEAD_LIMIT:
                return
            payload = file.read(size)
            if len(payload) < size or zlib.crc32(payload) != checksum:
                return
            yield payload
