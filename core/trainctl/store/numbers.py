"""Columns of numbers as few bytes, losing nothing.

Integers are stored as deltas in the smallest type that holds them. Times are integers too, multiples of 2**-22 s, for
that is what a double of today's Unix time holds (any other is stored as doubles). Bytes of the same significance stand
together (byte shuffle, as in HDF5 and Blosc) before they are deflated.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

INTEGERS_LIMIT = 2**19  # rows in a block; no envelope within its limit has as many
LEVEL = 1  # of zlib: noise does not shrink more for more time
_WIDTHS = "bhiq"
_TICKS_A_SECOND = 2.0**22


def pack_integers(values: NDArray[np.int64]) -> bytes:
    """Type code, first value, deltas in the smallest type that holds them."""
    if not len(values):
        return b""
    deltas = np.diff(values)
    low, high = (int(deltas.min()), int(deltas.max())) if len(deltas) else (0, 0)
    for code in _WIDTHS:
        limits = np.iinfo(code)
        if limits.min <= low and high <= limits.max:
            break
    head = code.encode() + int(values[0]).to_bytes(8, "little", signed=True)
    return head + zlib.compress(shuffle(deltas.astype(f"<{code}")), LEVEL)


def unpack_integers(data: bytes, limit: int = INTEGERS_LIMIT) -> NDArray[np.int64]:
    """At most `limit` integers. Raises ValueError for more or for other bytes, and zlib.error."""
    if not data:
        return np.empty(0, "i8")
    code = chr(data[0])
    if code not in _WIDTHS:
        raise ValueError(f"{code!r} is no type of packed integers")
    dtype = np.dtype(f"<{code}")
    deltas = unshuffle(inflate(data[9:], limit * dtype.itemsize), dtype)
    values = np.empty(len(deltas) + 1, "i8")
    values[0] = int.from_bytes(data[1:9], "little", signed=True)
    np.cumsum(deltas, dtype="i8", out=values[1:])
    values[1:] += values[0]
    return values


def pack_times(times: NDArray[np.float64]) -> bytes:
    with np.errstate(all="ignore"):  # what does not fit is seen in the comparison
        ticks = (times * _TICKS_A_SECOND).astype("i8")
        exact = bool(np.array_equal(ticks / _TICKS_A_SECOND, times)) and bool(np.all(np.abs(times) < 2**40))
    return b"t" + pack_integers(ticks) if exact else b"d" + times.astype("<f8").tobytes()


def unpack_times(data: bytes, limit: int = INTEGERS_LIMIT) -> NDArray[np.float64]:
    if data[:1] == b"t":
        return unpack_integers(data[1:], limit) / _TICKS_A_SECOND
    return np.frombuffer(data[1:], "<f8").astype("f8")


def shuffle(values: NDArray[np.generic]) -> bytes:
    return values.view("u1").reshape(len(values), values.itemsize).T.tobytes()


def unshuffle(data: bytes, dtype: "np.dtype[np.generic]") -> NDArray[np.generic]:
    width = dtype.itemsize
    return np.frombuffer(data, "u1").reshape(width, len(data) // width).T.copy().view(dtype).reshape(-1)


def inflate(data: bytes, limit: int) -> bytes:
    """The inflated bytes, at most `limit`: whoever wrote a directory may have made few bytes claim to be gigabytes.

    Raises ValueError where there are more, zlib.error for what was not deflated.
    """
    engine = zlib.decompressobj()
    found = engine.decompress(data, limit + 1)
    if len(found) > limit:
        raise ValueError(f"a packed block holds more than {limit} bytes where it may not")
    if not engine.eof:
        raise zlib.error("deflated bytes end in their middle")
    return found
