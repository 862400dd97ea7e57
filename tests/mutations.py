"""Bytes that a broken or hostile program could send: messages of the protocol, damaged in every way that is cheap."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

_GOLDEN = Path(__file__).with_name("wire") / "golden.json"
GOLDEN_BYTES = [
    bytes.fromhex(golden["hex"])
    for name, golden in json.loads(_GOLDEN.read_text()).items()
    if not name.startswith("card")
]
# Headers of MessagePack that promise far more than follows, types that the protocol does not use, and deep nesting.
_LIES = [
    b"\xdd\xff\xff\xff\xff",  # an array of 4 billion
    b"\xdf\xff\xff\xff\xff",  # a map of 4 billion
    b"\xdb\xff\xff\xff\xff",  # a text of 4 GB
    b"\xc6\xff\xff\xff\xff",  # bytes of 4 GB
    b"\xc9\xff\xff\xff\xff\x05",  # an extension type
    b"\xd6\xff\x00\x00\x00\x00",  # a timestamp, which is an extension type too
    b"\xc1",  # never used
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",  # the largest integer
    b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00",  # the smallest
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",  # NaN
    b"\xa2\xed\xa0",  # half a surrogate, not UTF-8
    b"\x91" * 1000,
    b"\x81\xa1a" * 1000,
]


def hostile(seed: int, count: int) -> Iterator[bytes]:
    """`count` damaged messages, the same ones for the same seed."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(GOLDEN_BYTES))
        for _ in range(chance.choice((1, 1, 1, 2, 5))):
            _damage(data, chance)
        yield bytes(data)


def _damage(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    match chance.randrange(7):
        case 0 if data:
            data[at % len(data)] = chance.randrange(256)
        case 1 if data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        case 2:
            del data[at:]
        case 3:
            del data[at : at + chance.randrange(1, 9)]
        case 4:
            data[at:at] = chance.choice(_LIES)
        case 5:
            data[at : at + 1] = chance.choice(_LIES)
        case _:
            other = chance.choice(GOLDEN_BYTES)
            begin = chance.randrange(len(other))
            data[at:at] = other[begin : begin + chance.randrange(1, 64)]
