"""How finely a metric is rolled up, and what of it stays in memory, by how many of its values a block has. Pure.

Where a chart asks for columns of fewer values than the finest bucket has, it reads the values, a block from disk for
the few that are in it. A metric that comes every fiftieth step has 80 in a block: a first chart of a long run would
read all of its blocks, some 0.3 ms each. Finer buckets for such a metric keep that at some 40 blocks for 400 columns.
So does a run of fifty tasks that logs the losses of eight at each step: each has a sixth of the rows of a block.
"""

from typing import Final

from trainctl.store.packing import CELLS_LIMIT, ROWS_LIMIT

BASE: Final = 256  # values of the finest bucket that is kept, of a metric that comes with every step
# Values in a full block, and what is enough for them: an eighth.
_FINER: Final = ((2048, BASE), (1024, 128), (512, 64), (256, 32), (0, 16))
_KEPT: Final = 128  # values, 2.5 KB: to read them would take a block, and their place costs memory as well
_RARE: Final = 16  # rows for each value: of wide blocks, which have few rows, not all is kept


def base_of(count: int, rows: int, metrics: int) -> int:
    """The finest bucket of a metric that has `count` values in its first block, of so many `rows` and `metrics`.

    Such a block may be short (a hub began, a branch began): what counts is what a full one would have.
    """
    expected = count * min(ROWS_LIMIT, CELLS_LIMIT // metrics) // rows
    return next(base for least, base in _FINER if expected >= least)


def stays(count: int, rows: int) -> bool:
    """Whether a block of `rows` has so few values of a metric that they rather stay in memory."""
    return count < _KEPT and count * _RARE <= rows
