"""Messages survive the wire, any MessagePack library reads them, and no bytes can do harm."""

import tracemalloc

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainctl.wire import codec
from trainctl.wire.commands import REGISTRY, Command, LrScale, LrSet, Pause, Rollback, SetTunable, args_of, check
from trainctl.wire.messages import CommandRequest, Envelope, Note, Rows


def request(action: object) -> bytes:
    return codec.encode(CommandRequest(req=1, command=Command(id="a1", action=action)))  # type: ignore[arg-type]


def test_a_message_comes_back_as_it_went_and_plain_msgpack_reads_it() -> None:
    note = Note(time=1.5, step=3, incarnation=2, actor="mk", text="hello")
    sent = Envelope(source="r", epoch=1, stream="events", seq=7, time=2.0, body=note)
    assert codec.envelope_decoder()(codec.encode(sent)) == sent
    assert msgpack.unpackb(codec.encode(sent))["body"] == {
        "type": "note", "time": 1.5, "step": 3, "incarnation": 2, "actor": "mk", "text": "hello"
    }  # fmt: skip


def test_unknown_fields_are_ignored_and_unknown_messages_are_not() -> None:
    decode = codec.request_decoder()
    assert decode(msgpack.packb({"type": "nodes", "req": 4, "new": [1, 2]})).req == 4  # type: ignore[attr-defined]
    for bad in ({"type": "nonsense", "req": 1}, {"req": 1}, [1, 2], {"type": "nodes", "req": "one"}):
        with pytest.raises(codec.DecodeError):
            decode(msgpack.packb(bad))
    assert decode.refused == 4


@pytest.mark.parametrize(
    "action", [{"factor": -1.0}, {"factor": 0.0}, {"factor": "x"}, {"factor": 1.0, "group": -1}, {}], ids=str
)
def test_a_learning_rate_that_cannot_be_is_refused_where_it_is_decoded(action: dict[str, object]) -> None:
    command = {"id": "a1", "action": {"type": "lr scale"} | action}
    with pytest.raises(codec.DecodeError):
        codec.request_decoder()(msgpack.packb({"type": "do", "req": 1, "command": command}))


def test_nan_passes_decoding_and_is_caught_by_the_check() -> None:
    decoded = codec.request_decoder()(request(SetTunable(name="clip", value=float("nan"))))
    assert check(decoded.command.action) == "value is nan: give a finite number"  # type: ignore[attr-defined]
    assert check(LrScale(factor=float("nan"))) == "factor is nan: give a finite number"


def test_a_rate_that_no_optimizer_can_use_is_refused() -> None:
    assert check(LrScale(factor=1e300)) == "factor is 1e+300: give a number up to 1e+15"
    assert check(LrSet(value=1e300)) == "value is 1e+300: give a number up to 1e+15"
    assert check(Rollback(target="last", lr_scale=1e300)) == "lr_scale is 1e+300: give a number up to 1e+15"
    assert check(SetTunable(name="x", value=1e300)) is None, "what a script makes of its own values is its own"
    assert check(LrScale(factor=0.5)) is None


def test_every_command_in_the_registry_has_its_own_name_and_a_role() -> None:
    assert set(REGISTRY) >= {
        "pause",
        "resume",
        "lr scale",
        "lr set",
        "lr release",
        "set",
        "checkpoint save",
        "rollback",
    }
    assert all(spec.role in {"operator", "admin"} for spec in REGISTRY.values())
    assert args_of(SetTunable(name="clip", value=2.0)) == {"name": "clip", "value": 2.0}
    assert args_of(Pause()) == {}


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    for decode in (codec.request_decoder(), codec.envelope_decoder(), codec.from_rank_decoder()):
        with pytest.raises(codec.DecodeError):
            decode(data)


def test_deep_and_large_messages_cost_an_error_and_not_memory() -> None:
    decode = codec.request_decoder()
    hostile = [b"\x81\xa1a" * 20_000, b"\x91" * 60_000, b"\xdf" + b"\xff" * 4, b"\xdd" + b"\xff" * 4, bytes(70_000)]
    tracemalloc.start()
    for data in hostile:
        with pytest.raises(codec.DecodeError):
            decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_rows_refuse_no_value() -> None:
    rows = Rows(attempt=1, incarnation=1, steps=[1], times=[0.0], columns=[])
    assert codec.decoder(Rows, 100)(codec.encode(rows)) == rows
