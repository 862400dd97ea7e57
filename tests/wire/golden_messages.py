"""One of every message of the protocol, built from the types themselves, and the file of its bytes.

usage: python tests/wire/golden_messages.py            say what differs from golden.json
       python tests/wire/golden_messages.py --write    write golden.json anew

Each message is there twice: with every field set, and with the fewest. A field that is added with a default changes the
first, and must leave the second as it is.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args

import msgspec
from msgspec import inspect

from trainctl.wire import codec
from trainctl.wire.commands import Action, Command
from trainctl.wire.messages import Beat, Body, Card, Envelope, FromRank, Reply, Request, ToRank, stream_of

GOLDEN = Path(__file__).with_name("golden.json")
CONVERSATIONS: dict[str, object] = {
    "published": Union[Envelope, Beat],  # noqa: UP007 - a value, not an annotation
    "request": Request,
    "reply": Reply,
    "from rank": FromRank,
    "to rank": ToRank,
}


def messages() -> Iterator[tuple[str, msgspec.Struct]]:
    """Every message with its name: `CONVERSATION / TYPE [/ VARIANT] / full | least`."""
    for conversation, union in CONVERSATIONS.items():
        for kind in get_args(union):
            for name, made in _of(kind):
                yield f"{conversation} / {name}", made
    for name, made in _of(Card):
        yield f"card / {name}", made


def _of(kind: type[msgspec.Struct]) -> Iterator[tuple[str, msgspec.Struct]]:
    """A message of a type, once for every variant of what it carries."""
    carried = next(((field.name, variants) for field in _fields(kind) if (variants := _carried(field.type))), None)
    for full in (True, False):
        extent = "full" if full else "least"
        if carried is None:
            yield f"{kind.__name__} / {extent}", _struct(kind, full=full)
            continue
        field, variants = carried
        for variant in variants:
            inner: msgspec.Struct = _struct(variant, full=full)
            if field == "command":
                inner = msgspec.structs.replace(_struct(Command, full=full), action=inner)
            yield f"{kind.__name__} / {variant.__name__} / {extent}", _struct(kind, full=full, given={field: inner})


def _carried(kind: inspect.Type) -> list[type[msgspec.Struct]]:
    """The structs of which a field holds one; a command counts by its action."""
    if isinstance(kind, inspect.StructType) and kind.cls is Command:
        return list(get_args(Action))
    if isinstance(kind, inspect.UnionType):
        structs = [option.cls for option in kind.types if isinstance(option, inspect.StructType)]
        return structs if len(structs) > 1 else []
    return []


def _fields(kind: type[msgspec.Struct]) -> tuple[inspect.Field, ...]:
    found = inspect.type_info(kind)
    assert isinstance(found, inspect.StructType)
    return found.fields


def _struct(kind: type[msgspec.Struct], *, full: bool, given: dict[str, Any] | None = None) -> Any:
    values = dict(given or {})
    if isinstance(body := values.get("body"), get_args(Body)) and kind is Envelope:
        values["stream"] = stream_of(body)
    for number, field in enumerate(_fields(kind), 1):
        if field.name not in values and field.name != "v" and (full or field.required):
            values[field.name] = _value(field.type, field, number, full=full)
    return kind(**values)


def _value(kind: inspect.Type, field: inspect.Field, number: int, *, full: bool) -> Any:
    """Something of a type that is told apart from its neighbours and from the field's default."""
    match kind:
        case inspect.UnionType():
            return _value(_some(kind), field, number, full=full)
        case inspect.StructType():
            return _struct(kind.cls, full=full)
        case inspect.ListType():
            return [_value(kind.item_type, field, number, full=full)] if full else []
        case inspect.DictType(value_type=inspect.UnionType() as of):
            options = {type(option).__name__.removesuffix("Type").lower(): option for option in of.types}
            return {name: _value(option, field, number, full=full) for name, option in options.items()} if full else {}
        case inspect.DictType():
            return {"key": _value(kind.value_type, field, number, full=full)} if full else {}
        case inspect.LiteralType():
            return next(value for value in sorted(kind.values) if value != field.default)
        case inspect.StrType():
            return field.name.replace("_", "-")
        case _:
            return _number(kind, field, number)


def _some(union: inspect.UnionType) -> inspect.Type:
    """A number where there is one, never None."""
    options = [option for option in union.types if not isinstance(option, inspect.NoneType)]
    return next((option for option in options if isinstance(option, inspect.FloatType)), options[0])


def _number(kind: inspect.Type, field: inspect.Field, number: int) -> object:
    match kind:
        case inspect.NoneType():
            return None
        case inspect.BoolType():
            return field.default is not True
        case inspect.IntType():
            return number + 40
        case inspect.FloatType():
            return number + 0.5
        case inspect.BytesType():
            return bytes([number, 0, 127, 255])
        case _:
            raise NotImplementedError(f"no sample value for {kind}: teach tests/wire/golden_messages.py")


def encoded(name: str, message: msgspec.Struct) -> bytes:
    """As it goes over the wire; a card is a JSON file."""
    return msgspec.json.encode(message) if name.startswith("card") else codec.encode(message)


def plain(value: object) -> object:
    """What a MessagePack library gives, as JSON can hold it: bytes become `{"hex": …}`."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value


def golden_of(name: str, message: msgspec.Struct) -> dict[str, object]:
    data = encoded(name, message)
    value = msgspec.json.decode(data) if name.startswith("card") else plain(msgspec.msgpack.decode(data))
    return {"hex": data.hex(), "value": value}


def broken(name: str, kept: dict[str, Any]) -> str | None:
    """Why bytes that were golden once are not understood as before; None if they are."""
    try:
        decoded = _decoder(name)(bytes.fromhex(kept["hex"]))
    except (codec.DecodeError, msgspec.MsgspecError) as error:
        return f"they are refused: {error}"
    now = golden_of(name, decoded)["value"]
    lost = list(_missing(kept["value"], now))
    return f"this is lost or changed: {', '.join(lost)}" if lost else None


def _decoder(name: str) -> Any:
    conversation = name.split(" / ", maxsplit=1)[0]
    if conversation == "card":
        return lambda data: msgspec.json.decode(data, type=Card)
    if conversation == "published":
        return codec.beat_decoder() if "Beat" in name else codec.envelope_decoder()
    return {
        "request": codec.request_decoder,
        "reply": codec.reply_decoder,
        "from rank": codec.from_rank_decoder,
        "to rank": codec.to_rank_decoder,
    }[conversation]()


def _missing(kept: object, now: object, path: str = "") -> Iterator[str]:
    """Paths of what was there and is not any more, or is something else."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for key, value in kept.items():
            yield from _missing(value, now.get(key, "nothing"), f"{path}.{key}".strip("."))
    elif isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        for index, (one, other) in enumerate(zip(kept, now, strict=True)):
            yield from _missing(one, other, f"{path}[{index}]")
    elif kept != now:
        yield path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    made = {name: golden_of(name, message) for name, message in messages()}
    if parser.parse_args().write:
        before = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        for name, kept in before.items():
            if (why := broken(name, kept)) is not None:
                print(f"{name} breaks everybody who speaks this version ({why}); written all the same", file=sys.stderr)
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(golden)}" for name, golden in made.items())
        GOLDEN.write_text(f"{{\n{lines}\n}}\n")
        return 0
    kept = json.loads(GOLDEN.read_text())
    changed = [name for name in made.keys() | kept.keys() if made.get(name) != kept.get(name)]
    print("\n".join(sorted(changed)) or "nothing differs")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
