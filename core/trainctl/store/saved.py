"""The saved index of a journal: all that replaying it would build, so that a long run opens at once.

    journal/index    8 bytes b"TCI" 0x00 and the format version, CRC-32 of the rest, MessagePack of a `SavedRun`

It is a view and never the truth: when it is missing, damaged, of another version or does not fit the packed segments
that it says it covers, the journal is replayed from its beginning, and nothing is lost but the time that takes.
"""

import logging
import struct
import zlib
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from trainctl.store.bounds import Bounds
from trainctl.store.chunks import BlockReader, Chunks
from trainctl.store.density import BASE
from trainctl.store.edges import Edges
from trainctl.store.frames import Damage, packed_file
from trainctl.store.rollups import Columns, Level
from trainctl.store.tracks import FAN, Track
from trainctl.store.unsealed import SavedEntries, SavedKinds
from trainctl.wire.messages import CommandUpdate, Event, LastValue, Message, NodeReading, RankFigures, RunState, Stream
from trainctl.wire.rundir import write_atomic

log = logging.getLogger(__name__)

FORMAT = 3
_READABLE = (2, FORMAT)  # 1 left out rows that packing had put behind events, and may lack them; 2 named all names
_HEADER = struct.Struct("<4sII")
_MAGIC = b"TCI\0"


class SavedColumn(Message, frozen=True, kw_only=True):
    dtype: Literal["<i8", "<i4", "<f8", "<f4"]
    data: bytes


SavedColumns = dict[str, SavedColumn]


class SavedTrack(Message, frozen=True, kw_only=True):
    name: str
    incarnation: int
    first_step: int
    last_step: int
    bounds: SavedColumns | None  # of a track whose steps went back
    edges: SavedColumns
    chunks: SavedColumns
    kept: list[SavedColumns]
    base: int = BASE
    levels: list[SavedColumns]
    hot_start: int
    hot: SavedColumns


class SavedBranch(Message, frozen=True, kw_only=True):
    incarnation: int
    after_step: int
    parent: int | None


class SavedMetrics(Message, frozen=True, kw_only=True):
    """`names` in the order in which they first came; `unsealed` are the (epoch, seq, rows, kind) that are in no
    block yet, and `kinds` the (incarnation, numbers in `names`) of metrics that came together."""

    names: list[str]
    last: dict[str, LastValue]
    branches: list[SavedBranch]
    tracks: list[SavedTrack]
    kinds: SavedKinds
    unsealed: SavedEntries


class SavedRun(Message, frozen=True, kw_only=True):
    """A `RunRecord`; `segments` are the (number, bytes) of the packed segments that need not be read again."""

    segments: list[tuple[int, int]]
    gone: dict[str, int]
    state: RunState
    heads: dict[str, int]
    epochs: dict[str, int]
    last_time: float
    links: list[tuple[int, Stream, int]]  # (attempt, stream, newest number)
    ranks: dict[int, RankFigures]
    nodes: dict[str, NodeReading]
    events: list[Event]
    commands: list[CommandUpdate]
    settled: list[str]
    checkpoint_incarnations: dict[str, int]
    damage: list[Damage]
    metrics: SavedMetrics
    event_places: tuple[tuple[int, int, int], ...] = ()  # of `events`, as runs: epoch, first number, how many
    events_forgotten: int = 0
    metric_epochs: tuple[tuple[int, int, int, int], ...] = ()  # epoch, first number; incarnation and step before it


_decoder = msgspec.msgpack.Decoder(SavedRun)


def index_file(directory: Path) -> Path:
    return directory / "index"


def packed_sizes(directory: Path, numbers: list[int]) -> list[tuple[int, int]]:
    return [(number, packed_file(directory, number).stat().st_size) for number in numbers]


def write_index(directory: Path, saved: SavedRun) -> int:
    """Put it in place of the one before; return its size. Raises OSError. May run in a thread."""
    payload = msgspec.msgpack.encode(saved)
    write_atomic(index_file(directory), _HEADER.pack(_MAGIC, FORMAT, zlib.crc32(payload)) + payload)
    return len(payload)


def read_index(directory: Path) -> SavedRun | None:
    """The saved index if there is one that fits the journal."""
    try:
        data = index_file(directory).read_bytes()
        magic, version, checksum = _HEADER.unpack_from(data)
        payload = memoryview(data)[_HEADER.size :]
        if magic != _MAGIC or version not in _READABLE or zlib.crc32(payload) != checksum:
            log.warning("the saved index in %s is damaged or of another version: the journal is replayed", directory)
            return None
        saved = _decoder.decode(payload)
        if packed_sizes(directory, [number for number, _ in saved.segments]) != saved.segments:
            return None
    except FileNotFoundError:
        return None
    except (OSError, struct.error, msgspec.MsgspecError) as error:
        log.warning("the saved index in %s cannot be read, the journal is replayed: %s", directory, error)
        return None
    return saved


# --- tracks


def save_columns(columns: Columns) -> SavedColumns:
    return {name: _save(column) for name, column in columns.items()}


def _save(column: NDArray[np.generic]) -> SavedColumn:
    little = column.astype(column.dtype.newbyteorder("<"), copy=False)
    kinds: dict[str, Literal["<i8", "<i4", "<f8", "<f4"]] = {"i8": "<i8", "i4": "<i4", "f8": "<f8", "f4": "<f4"}
    return SavedColumn(dtype=kinds[little.dtype.kind + str(little.dtype.itemsize)], data=little.tobytes())


def load_columns(saved: SavedColumns) -> Columns:
    return {name: np.frombuffer(column.data, column.dtype) for name, column in saved.items()}


def save_track(track: Track, incarnation: int) -> SavedTrack:
    return SavedTrack(
        name=track.name,
        incarnation=incarnation,
        first_step=track.first_step,
        last_step=track.last_step,
        bounds=None if track.bounds is None else save_columns(track.bounds.saved()),
        edges=save_columns(track.edges.saved()),
        chunks=save_columns(track.chunks.saved()),
        kept=[save_columns(columns) for columns in track.chunks.kept],
        base=track.base,
        levels=[save_columns(level.slice(0, level.size)) for level in track.levels],
        hot_start=track.hot_start,
        hot=save_columns({name: column.view for name, column in track.hot.items()}),
    )


def load_track(saved: SavedTrack, reader: BlockReader) -> Track:
    """Raises ValueError, KeyError or IndexError for what no track was saved as."""
    track = Track(saved.name, reader)
    track.restore(
        bounds=None if saved.bounds is None else Bounds(load_columns(saved.bounds)),
        edges=Edges(load_columns(saved.edges)),
        chunks=Chunks(load_columns(saved.chunks), [load_columns(columns) for columns in saved.kept]),
        base=saved.base,
        levels=[Level(saved.base * FAN**at, load_columns(columns)) for at, columns in enumerate(saved.levels)],
        hot_start=saved.hot_start,
        hot=load_columns(saved.hot),
        first_step=saved.first_step,
        last_step=saved.last_step,
    )
    _check(track)
    return track


def _check(track: Track) -> None:
    """Raises ValueError where the parts of a track do not belong together."""
    built = track.levels[0].size * track.base if track.levels else 0
    chunks = track.chunks
    sizes = [{column.size for column in track.hot.values()}, {len(chunks.starts), len(chunks.places)}]
    sizes += [{column.size for column in level.columns.values()} for level in track.levels]
    sizes += [{len(column) for column in kept.values()} for kept in chunks.kept]
    whole = (
        set(track.hot) == {"step", "time", "value"}
        and all(len(found) == 1 for found in sizes)
        and 0 <= track.hot_start <= min(chunks.size, built) <= chunks.size <= track.size
        and chunks.starts == sorted(chunks.starts)
        and track.base > 1
        and all(level.size <= track.size // level.width for level in track.levels)
        and (track.bounds is None or track.bounds.size * track.base == built)
        and all(0 <= at < len(chunks.kept) for segment, at in chunks.places if segment == 0)
    )
    if not whole:
        raise ValueError(f"{track.name} is saved as parts that do not belong together")
