"""The JSON that scripts read: one schema number, and NaN and infinities as words, because JSON has none."""

import json
import math
from collections.abc import Mapping

import msgspec

from trainctl.wire.figures import not_finite

SCHEMA = 1


def jsonable(value: object) -> object:
    """Plain JSON data of a message, a mapping or a value."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else not_finite(value)
    if isinstance(value, msgspec.Struct):
        return {name: jsonable(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")


def dumps(fields: Mapping[str, object]) -> str:
    """One line of JSON with the schema number first."""
    return json.dumps({"schema": SCHEMA} | {key: jsonable(value) for key, value in fields.items()}, allow_nan=False)
