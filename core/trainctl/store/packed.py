"""What a packed segment is made of: its payloads, what may be in them, and where a block of rows stands."""

import errno
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec

from trainctl.store.frames import FRAME_LIMIT, Damage, segment_frames
from trainctl.store.numbers import inflate, unpack_integers
from trainctl.wire.messages import Column, Message, Rows

_CLAIM_LIMIT = 2**21  # cells that a block can have at most: one envelope of many short values stays whole
_STEP_LIMIT = 2**60


class UnreadableSegment(OSError):
    """The file system does not give the bytes of a segment. It may do so later."""


class PackedColumn(Message, frozen=True, kw_only=True):
    """One metric in a block. `rows` names those that have a value, unless all have. `like`: the same as that column."""

    name: str
    dtype: Literal["f4", "f8"]
    data: bytes = b""
    deflated: bool = False
    rows: bytes = b""
    like: int | None = None


class PackedRows(Message, frozen=True, kw_only=True, tag="rows"):
    """Envelopes of the metrics stream: `seqs` and `links` are their numbers, `envelopes` how many rows each had."""

    seqs: bytes
    links: bytes
    epoch: int
    attempt: int
    incarnation: int
    link: int
    time: float
    count: int
    envelopes: bytes
    steps: bytes
    times: bytes
    columns: list[PackedColumn]


class PackedEnvelopes(Message, frozen=True, kw_only=True, tag="envelopes"):
    """Other envelopes as they were recorded: a deflated MessagePack array of byte strings."""

    data: bytes


class PackedDamage(Message, frozen=True, kw_only=True, tag="damage"):
    """What could not be read when the segment was packed."""

    damage: list[Damage]


# What decoding and unpacking raise for bytes that nobody packed like this.
UNUSABLE: Final = (msgspec.MsgspecError, zlib.error, ValueError, KeyError, IndexError)

Packed: TypeAlias = PackedRows | PackedEnvelopes | PackedDamage
_decode = msgspec.msgpack.Decoder(Packed).decode
_decode_list = msgspec.msgpack.Decoder(list[bytes]).decode


def decode_packed(payload: bytes) -> Packed:
    """A frame of a packed segment. Raises msgspec.MsgspecError, for a block that claims too much as well."""
    packed: Packed = _decode(payload)
    if isinstance(packed, PackedRows) and not 0 < packed.count * max(1, len(packed.columns)) <= _CLAIM_LIMIT:
        raise msgspec.ValidationError(f"a block of {packed.count} rows of {len(packed.columns)} metrics")
    return packed


def envelopes_of(packed: PackedEnvelopes) -> list[bytes]:
    """Raises msgspec.MsgspecError, ValueError or zlib.error for what nobody packed like this."""
    return _decode_list(inflate(packed.data, 2 * FRAME_LIMIT))


def well_formed(rows: Rows) -> list[Column]:
    """The columns that fit their rows; of several with one name the first. What is not in here is recorded nowhere."""
    if not rows.steps or len(rows.steps) != len(rows.times) or max(map(abs, rows.steps)) > _STEP_LIMIT:
        return []
    found: dict[str, Column] = {}
    for column in rows.columns:
        if len(column.data) == (4 if column.dtype == "f4" else 8) * len(rows.steps):
            found.setdefault(column.name, column)
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """A block that is on disk: where, and what of the history it holds: `rows` of them, and `counts` values of each
    metric, which are fewer where it does not come with every row."""

    segment: int
    offset: int
    epoch: int
    seqs: tuple[int, ...]
    incarnation: int
    rows: int
    counts: dict[str, int]

    @property
    def last(self) -> int:
        return self.seqs[-1]


def sealed_of(packed: PackedRows, segment: int, offset: int) -> Sealed:
    counts: dict[str, int] = {}
    for column in packed.columns:
        like = column if column.like is None else _original(packed, column.like)
        counts[column.name] = packed.count if not like.rows else len(unpack_integers(like.rows, packed.count))
    return Sealed(
        segment=segment,
        offset=offset,
        epoch=packed.epoch,
        seqs=tuple(unpack_integers(packed.seqs, packed.count).tolist()),
        incarnation=packed.incarnation,
        rows=packed.count,
        counts=counts,
    )


def _original(packed: PackedRows, like: int) -> PackedColumn:
    return [column for column in packed.columns if column.like is None][like]


def places_of(directory: Path, number: int) -> list[Sealed]:
    """Where the blocks of rows of a packed segment are, but for those that decayed. Raises `UnreadableSegment`."""
    damage, places = list[Damage](), list[Sealed]()
    for found in segment_frames(directory, number, None, damage):
        try:
            packed = decode_packed(found.payload)
            if isinstance(packed, PackedRows):
                places.append(sealed_of(packed, number, found.offset))
        except UNUSABLE:
            continue  # it is told to whoever reads it
    if unread := next((each for each in damage if each.why), None):
        raise UnreadableSegment(errno.EIO, f"{unread}; it is left as it is")
    return places
