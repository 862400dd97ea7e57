"""Keep the hub's memory near what it holds, over weeks."""

import contextlib
import ctypes
from typing import Final

# malloc.h: parameters of mallopt(3), which glibc alone has.
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_OWN_PAGES_BYTES: Final = 128 * 1024


def give_back_at_once() -> None:
    """Let every large block have pages of its own, which go back to the system when it is freed; where that is known.

    To pack a segment takes megabytes for a moment. glibc learns from the first ones that are freed to keep blocks of
    their size in the heap, and gives nothing back below what lies behind them and stays.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES_BYTES)
        mallopt(_M_ARENA_MAX, 2)
