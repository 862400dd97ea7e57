"""The bytes of every message are what they were, and any MessagePack library reads them as documented."""

import json
import re
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from golden_messages import GOLDEN, broken, encoded, golden_of, messages, plain

from trainctl.wire import messages as wire
from trainctl.wire.commands import Act

NAMED = dict(messages())
KEPT: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text())
DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()

CHANGED = """
The bytes of {name!r} changed. {verdict}
After that: python tests/wire/golden_messages.py --write, and say in docs/protocol.md what the field means.
"""
ADDED = "What was sent before is still understood, so this is a field that was added with a default: that is allowed."
BROKEN = (
    "Programs of this version of the protocol are broken by it ({why}). Give the new field a default, or leave the old "
    "one alone; if it must be, raise PROTOCOL and write down what happens between the two versions."
)


@pytest.mark.parametrize("name", sorted(NAMED.keys() | KEPT.keys()))
def test_todays_bytes_are_the_golden_ones_and_are_read_as_documented(name: str) -> None:
    assert name in KEPT, f"{name!r} has no golden bytes: python tests/wire/golden_messages.py --write"
    assert name in NAMED, f"{name!r} is not sent any more: programs of this version still expect it"
    kept, message = KEPT[name], NAMED[name]
    why = broken(name, kept)
    verdict = CHANGED.format(name=name, verdict=BROKEN.format(why=why) if why else ADDED)
    assert encoded(name, message).hex() == kept["hex"], verdict
    assert why is None, verdict
    data = bytes.fromhex(kept["hex"])
    read = json.loads(data) if name.startswith("card") else plain(msgpack.unpackb(data))
    assert read == kept["value"]


def tagged() -> list[type[msgspec.Struct]]:
    """Every type that goes over the wire under a name of its own."""
    found = [kind for kind in vars(wire).values() if isinstance(kind, type) and issubclass(kind, wire.Message)]
    return [kind for kind in found if kind.__struct_config__.tag is not None]


def test_no_message_lacks_golden_bytes() -> None:
    words = {word for name in KEPT for word in name.split(" / ")}
    assert {kind.__name__ for kind in tagged()} <= words
    assert {kind.__name__ for kind in Act.__subclasses__()} <= words


def test_a_message_with_every_field_has_every_field_on_the_wire() -> None:
    for name, message in NAMED.items():
        if name.endswith("full"):
            expected = set(message.__struct_fields__) - {"v"} | ({"type"} if message.__struct_config__.tag else set())
            assert KEPT[name]["value"].keys() == expected, name


def test_the_document_names_every_message_and_every_field() -> None:
    words = set(re.findall(r"[A-Za-z_?][A-Za-z0-9_?-]*", DOCUMENT))
    tags = {str(kind.__struct_config__.tag) for kind in tagged()}
    fields = {field for kind in [*wire_structs(), *Act.__subclasses__()] for field in kind.__struct_fields__}
    assert sorted(tags - words) == []
    assert [kind for kind in Act.__subclasses__() if f"`{kind.__struct_config__.tag}`" not in DOCUMENT] == []
    assert sorted(fields - words) == []
    assert f"# The protocol, version {wire.PROTOCOL}\n" in DOCUMENT


def wire_structs() -> list[type[msgspec.Struct]]:
    return [kind for kind in vars(wire).values() if isinstance(kind, type) and issubclass(kind, wire.Message)]


def test_what_breaks_others_is_told_from_what_was_added() -> None:
    name = "reply / ErrorReply / full"
    assert broken(name, KEPT[name]) is None
    more = msgpack.packb({"type": "error", "req": 41, "code": "code", "message": "message", "hint": "hint", "new": 1})
    assert "new" in str(broken(name, {"hex": more.hex(), "value": plain(msgpack.unpackb(more))}))
    less = msgpack.packb({"type": "error", "req": 41})
    assert "refused" in str(broken(name, {"hex": less.hex(), "value": {}}))
    assert golden_of(name, NAMED[name]) == KEPT[name]
