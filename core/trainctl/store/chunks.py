"""Where the values of a metric are that were packed, and the blocks they are read from."""

from collections import OrderedDict
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from trainctl.store.blocks import Block
from trainctl.store.frames import read_packed
from trainctl.store.packed import UNUSABLE, PackedRows, decode_packed
from trainctl.store.rollups import Columns, Growing

CACHED_BYTES = 48 * 1024 * 1024  # of blocks as they are on disk a third, of what was unpacked of them the rest
_ROWS_BYTES: Final = 16  # steps and times, which a block keeps for the next metric
_CACHED_BLOCKS: Final = 64


class BlockReader:
    """Reads packed rows at their places in a journal, and keeps those that were read last."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._blocks: OrderedDict[tuple[int, int], tuple[Block | None, int]] = OrderedDict()
        self._block_bytes = 0
        self._columns: OrderedDict[tuple[int, int, str], Columns] = OrderedDict()
        self._bytes = 0
        self.unreadable: set[tuple[int, int]] = set()

    def metric(self, segment: int, offset: int, name: str) -> Columns | None:
        """`step`, `time` and `value` of one metric in one block, or None where it decayed."""
        key = (segment, offset, name)
        found = self._columns.get(key)
        if found is not None:
            self._columns.move_to_end(key)
            return found
        block = self._block(segment, offset)
        if block is None:
            return None
        try:
            steps, times, values = block.metric(name)
        except UNUSABLE:
            self.unreadable.add((segment, offset))
            return None
        found = {"step": steps, "time": times, "value": values}
        self._columns[key] = found
        self._bytes += sum(column.nbytes for column in found.values())
        while self._bytes > CACHED_BYTES * 2 // 3:
            _, oldest = self._columns.popitem(last=False)
            self._bytes -= sum(column.nbytes for column in oldest.values())
        return found

    def _block(self, segment: int, offset: int) -> Block | None:
        place = (segment, offset)
        if place in self._blocks:
            self._blocks.move_to_end(place)
            return self._blocks[place][0]
        payload = read_packed(self._directory, segment, offset) if self._directory is not None else None
        block = None
        if payload is not None:
            try:
                packed = decode_packed(payload)
                block = Block(packed) if isinstance(packed, PackedRows) else None
            except msgspec.MsgspecError:
                block = None
        if block is None:
            self.unreadable.add(place)
        size = 0 if block is None or payload is None else len(payload) + _ROWS_BYTES * block.packed.count
        self._blocks[place] = block, size
        self._block_bytes += size
        while self._block_bytes > CACHED_BYTES // 3 or len(self._blocks) > _CACHED_BLOCKS:
            _, (_, gone) = self._blocks.popitem(last=False)
            self._block_bytes -= gone
        return block


class Chunks:
    """Where the values of a track are that are not hot: parallel columns, one entry a block.

    A place is (segment, offset), or (0, n) for the n-th stretch of those that are kept in memory.
    """

    __slots__ = ("_kept", "places", "size", "starts")

    def __init__(self, saved: Columns | None = None, kept: list[Columns] | None = None) -> None:
        self.starts: list[int] = saved["start"].tolist() if saved is not None else []
        self.places: list[tuple[int, int]] = (
            list(zip(saved["segment"].tolist(), saved["offset"].tolist(), strict=True)) if saved is not None else []
        )
        self.size = int(saved["size"][0]) if saved is not None else 0
        self._kept = [
            {name: Growing(column.dtype.str, column) for name, column in columns.items()} for columns in kept or []
        ]

    @property
    def kept(self) -> list[Columns]:
        """The stretches in memory, each `step`, `time` and `value`."""
        return [self.kept_at(at) for at in range(len(self._kept))]

    def kept_at(self, at: int) -> Columns:
        return {name: column.view for name, column in self._kept[at].items()}

    @property
    def in_memory(self) -> int:
        """How many values are kept."""
        return sum(columns["step"].size for columns in self._kept)

    def append(self, count: int, segment: int, offset: int) -> None:
        self.starts.append(self.size)
        self.places.append((segment, offset))
        self.size += count

    def keep(self, columns: Columns) -> None:
        """They go on with the stretch before them, so that what comes rarely costs its values and no places."""
        count = len(columns["step"])
        if self.places and self.places[-1][0] == 0:
            self.size += count
        else:
            self._kept.append({name: Growing(column.dtype.str) for name, column in columns.items()})
            self.append(count, 0, len(self._kept) - 1)
        for name, column in self._kept[-1].items():
            column.extend(columns[name])

    def saved(self) -> Columns:
        return {
            "start": np.array(self.starts, "<i8"),
            "segment": np.array([segment for segment, _ in self.places], "<i8"),
            "offset": np.array([offset for _, offset in self.places], "<i8"),
            "size": np.array([self.size], "<i8"),
        }
