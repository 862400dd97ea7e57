"""The JSON that scripts read, as clients write it; its home is `wire.jsonable`, because the hub writes it too."""

from trainctl.wire.jsonable import SCHEMA, dumps, jsonable

__all__ = ["SCHEMA", "dumps", "jsonable"]
