"""Packed segments: a full segment of the journal rewritten by columns, losing nothing, at a fraction of the size.

The wire sends a few rows at a time, so most of a recorded segment is field names. Packing joins consecutive `Rows` of
one incarnation into one `PackedRows`: steps, times and names once, each metric's values together. Everything else is
kept as the envelopes it came in, deflated. The frames stand in the order in which they are to be applied.

How numbers are stored is in numbers.py; what does not shrink is stored as it is.
"""

import contextlib
import errno
import os
import secrets
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from trainctl.store.frames import PACKED_HEADER, Damage, frame, frame_size, packed_file, segment_file, segment_frames
from trainctl.store.numbers import LEVEL, pack_integers, pack_times, shuffle
from trainctl.store.packed import (
    Packed,
    PackedColumn,
    PackedDamage,
    PackedEnvelopes,
    PackedRows,
    Sealed,
    UnreadableSegment,
    places_of,
    sealed_of,
    well_formed,
)
from trainctl.wire import codec
from trainctl.wire.messages import Column, Envelope, RolledBack, Rows, StateChanged
from trainctl.wire.rundir import fsync_dir

ROWS_LIMIT = 4096
CELLS_LIMIT = 128 * 1024
_OTHERS_BYTES = 256 * 1024


class _PackedAlready(Exception):
    """Another hub packed the segment."""


@dataclass
class _Gathered:
    """One metric's values so far: where in the block each chunk begins."""

    starts: list[int] = field(default_factory=list)
    chunks: list[Column] = field(default_factory=list)

    def packed(self, name: str, count: int, known: dict[tuple[str, bytes, bytes], int]) -> PackedColumn:
        wide = any(chunk.dtype == "f8" for chunk in self.chunks)
        dtype: Literal["f4", "f8"] = "f8" if wide else "f4"
        if len({chunk.dtype for chunk in self.chunks}) == 1:
            values = np.frombuffer(b"".join(chunk.data for chunk in self.chunks), f"<{dtype}")
        else:
            with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN
                values = np.concatenate(
                    [np.frombuffer(chunk.data, f"<{chunk.dtype}").astype("<f8") for chunk in self.chunks]
                )
        rows = b"" if len(values) == count else pack_integers(self._rows())
        raw = values.tobytes()
        key = (dtype, raw, rows)
        if key in known:
            return PackedColumn(name=name, dtype=dtype, like=known[key])
        known[key] = len(known)
        deflated = zlib.compress(shuffle(values), LEVEL)
        small = len(deflated) < 0.95 * len(raw)
        return PackedColumn(name=name, dtype=dtype, data=deflated if small else raw, deflated=small, rows=rows)

    def _rows(self) -> NDArray[np.int64]:
        widths = [len(chunk.data) // int(chunk.dtype[1]) for chunk in self.chunks]
        return np.concatenate([np.arange(start, start + n) for start, n in zip(self.starts, widths, strict=True)])


class Packer:
    """Takes decoded envelopes in order and yields payloads of a packed segment, in the order to apply them."""

    def __init__(self) -> None:
        self._head: Envelope | None = None  # the first envelope of the block that is being gathered
        self._last: Envelope | None = None
        self._steps: list[int] = []
        self._times: list[float] = []
        self._widths: list[int] = []
        self._seqs: list[int] = []
        self._links: list[int] = []
        self._metrics: dict[str, _Gathered] = {}
        self._others: list[bytes] = []
        self._others_bytes = 0

    def feed(self, envelope: Envelope, payload: bytes) -> Iterator[Packed]:
        body = envelope.body
        if isinstance(body, Rows) and (columns := well_formed(body)):
            if not self._continues(envelope, len(body.steps), len(columns)):
                yield from self.flush()
            self._gather(envelope, body, columns)
            return
        starts = isinstance(body, StateChanged) and body.state == "starting"
        if starts or isinstance(body, RolledBack | Rows):
            # Which rows belong to which branch depends on the order; and each stream keeps its own.
            yield from self.flush()
        yield from self.keep(payload)

    def keep(self, payload: bytes) -> Iterator[Packed]:
        """A payload that is not to be looked into."""
        self._others.append(payload)
        self._others_bytes += len(payload)
        if self._others_bytes > _OTHERS_BYTES:
            yield from self._envelopes()

    def flush(self) -> Iterator[Packed]:
        """What was gathered so far. A branch begins with an event, so events go before the rows that follow them."""
        yield from self._envelopes()
        yield from self._rows()

    def _continues(self, envelope: Envelope, rows: int, columns: int) -> bool:
        head, body = self._head, envelope.body
        assert isinstance(body, Rows)
        if head is None:
            return True
        assert isinstance(head.body, Rows)
        same = (head.epoch, head.attempt, head.body.incarnation) == (envelope.epoch, envelope.attempt, body.incarnation)
        total = len(self._steps) + rows
        return same and total <= ROWS_LIMIT and total * max(columns, len(self._metrics)) <= CELLS_LIMIT

    def _gather(self, envelope: Envelope, body: Rows, columns: list[Column]) -> None:
        if self._head is None:
            self._head = envelope
        self._last = envelope
        start = len(self._steps)
        for column in columns:
            into = self._metrics.setdefault(column.name, _Gathered())
            into.starts.append(start)
            into.chunks.append(column)
        self._steps.extend(body.steps)
        self._times.extend(body.times)
        self._widths.append(len(body.steps))
        self._seqs.append(envelope.seq)
        self._links.append(envelope.link)

    def _rows(self) -> Iterator[Packed]:
        head, last = self._head, self._last
        if head is None or last is None:
            return
        assert isinstance(head.body, Rows)
        count = len(self._steps)
        known: dict[tuple[str, bytes, bytes], int] = {}
        columns: list[PackedColumn] = []
        for name, gathered in self._metrics.items():
            columns.append(gathered.packed(name, count, known))
        yield PackedRows(
            seqs=pack_integers(np.array(self._seqs, "i8")),
            links=pack_integers(np.array(self._links, "i8")),
            epoch=head.epoch,
            attempt=head.attempt,
            incarnation=head.body.incarnation,
            link=last.link,
            time=last.time,
            count=count,
            envelopes=pack_integers(np.array(self._widths, "i8")),
            steps=pack_integers(np.array(self._steps, "i8")),
            times=pack_times(np.array(self._times, "f8")),
            columns=columns,
        )
        self._head = self._last = None
        self._steps, self._times, self._widths, self._seqs, self._links = [], [], [], [], []
        self._metrics = {}

    def _envelopes(self) -> Iterator[Packed]:
        if self._others:
            yield PackedEnvelopes(data=zlib.compress(msgspec.msgpack.encode(self._others), 6))
            self._others, self._others_bytes = [], 0


def pack_segment(directory: Path, number: int) -> list[Sealed]:
    """Rewrite one full segment by columns and remove the recorded one. May run in a thread. Raises OSError, and then
    the recorded one stands: `UnreadableSegment` where the file system does not give all of its bytes."""
    steps = packing_steps(directory, number)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            sealed: list[Sealed] = done.value
            return sealed


def packing_steps(directory: Path, number: int) -> Generator[None, None, list[Sealed]]:
    """`pack_segment` a block at a time, for whoever has other work to do in between.

    The packed file is whole and on disk before the recorded one goes, so a crash leaves one of them, or both, of which
    readers take the packed one. A segment that another hub packed, before or meanwhile, stays as that hub made it.
    """
    target = packed_file(directory, number)
    if target.exists():
        return places_of(directory, number)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(6)}.tmp")
    sealed: list[Sealed] = []
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            offset = file.write(PACKED_HEADER)
            for packed in _packed(directory, number):
                payload = msgspec.msgpack.encode(packed)
                if isinstance(packed, PackedRows):
                    sealed.append(sealed_of(packed, number, offset))
                file.write(frame(payload))
                offset += frame_size(payload)
                yield
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            raise _PackedAlready
        partial.replace(target)
    except _PackedAlready:
        partial.unlink(missing_ok=True)
        return places_of(directory, number)
    except BaseException:
        with contextlib.suppress(OSError):  # the reason to fail is the first error
            partial.unlink()
        raise
    fsync_dir(directory)
    segment_file(directory, number).unlink(missing_ok=True)
    return sealed


def _packed(directory: Path, number: int) -> Iterator[Packed]:
    packer, decode, damage = Packer(), codec.envelope_decoder(), list[Damage]()
    for found in segment_frames(directory, number, None, damage):
        if found.packed:
            raise _PackedAlready  # what it holds are no envelopes: packed once more it would say nothing to anybody
        try:
            envelope = decode(found.payload)
        except codec.DecodeError:
            # Whole by its checksum: a newer version may have written it. For that one the order counts.
            yield from packer.flush()
            yield from packer.keep(found.payload)
            continue
        assert isinstance(envelope, Envelope)
        yield from packer.feed(envelope, found.payload)
    yield from packer.flush()
    if unread := next((each for each in damage if each.why), None):
        raise UnreadableSegment(errno.EIO, f"{unread}; it is left as it is")
    if damage:
        yield PackedDamage(damage=damage)
