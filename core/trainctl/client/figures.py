"""Numbers and texts as people read them; their home is `wire.figures`, because the hub tells of events too."""

from trainctl.wire.figures import (
    duration,
    file_size,
    memory,
    not_finite,
    number,
    plain,
    quantity,
    scalar,
    scientific,
    two_decimals,
)

__all__ = [
    "duration",
    "file_size",
    "memory",
    "not_finite",
    "number",
    "plain",
    "quantity",
    "scalar",
    "scientific",
    "two_decimals",
]
