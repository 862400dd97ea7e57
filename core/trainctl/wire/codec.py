"""Encode and decode, with limits.

msgspec writes plain MessagePack maps, so that any MessagePack library reads them (docs/decisions/0003).
Decoding goes straight into typed structs: nothing is built that the type does not ask for, so a megabyte of empty
maps from a stranger costs an error and not 72 MB.
"""

from typing import Final, TypeVar

import msgspec

from trainctl.wire import messages

CONTROL_LIMIT: Final = 64 * 1024
DATA_LIMIT: Final = 1024 * 1024
REPLY_LIMIT: Final = 2 * DATA_LIMIT

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode


class DecodeError(ValueError):
    """The other side sent bytes that are no message of this protocol."""


class TooLarge(DecodeError):
    """The same, because they are more than the limit."""


class Decoder(msgspec.Struct):
    """Decodes one type with a size limit and counts what it refused."""

    inner: msgspec.msgpack.Decoder  # type: ignore[type-arg]
    limit: int
    refused: int = 0

    def __call__(self, data: bytes | memoryview) -> object:
        """Raises `DecodeError`; nothing else, whatever the bytes are."""
        if len(data) > self.limit:
            self.refused += 1
            raise TooLarge(f"a message of {len(data)} bytes is over the limit of {self.limit}")
        try:
            decoded: object = self.inner.decode(data)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
            self.refused += 1
            raise DecodeError(f"not a valid message: {error}") from None
        return decoded


def decoder(message_type: object, limit: int) -> Decoder:
    """A decoder of its own for one reader, so that its refusals are counted apart."""
    return Decoder(inner=msgspec.msgpack.Decoder(message_type), limit=limit)


def envelope_decoder() -> Decoder:
    return decoder(messages.Envelope, DATA_LIMIT)


def beat_decoder() -> Decoder:
    return decoder(messages.Beat, DATA_LIMIT)


def request_decoder() -> Decoder:
    return decoder(messages.Request, CONTROL_LIMIT)


def reply_decoder() -> Decoder:
    return decoder(messages.Reply, REPLY_LIMIT)


def from_rank_decoder() -> Decoder:
    return decoder(messages.FromRank, DATA_LIMIT)


def to_rank_decoder() -> Decoder:
    return decoder(messages.ToRank, DATA_LIMIT)
