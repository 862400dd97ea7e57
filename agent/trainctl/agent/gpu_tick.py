"""What the GPU poller answers, and how it is framed on the pipe: four bytes of length, then MessagePack."""

from typing import Final, Literal

import msgspec

from trainctl.wire.messages import GpuReading, Message

_LENGTH: Final = 4
_LIMIT: Final = 1024 * 1024


class GpuTick(Message, frozen=True, kw_only=True):
    """One answer. `kind` says whether the poller goes on: after "down" and "absent" (no GPU here) it leaves."""

    kind: Literal["polled", "down", "absent"]
    state: str
    gpus: list[GpuReading] = msgspec.field(default_factory=list)


def frame(tick: GpuTick) -> bytes:
    body = msgspec.msgpack.encode(tick)
    return len(body).to_bytes(_LENGTH, "big") + body


class TickReader:
    """Puts ticks together again from what the pipe happens to deliver."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._decode = msgspec.msgpack.Decoder(GpuTick).decode

    def feed(self, data: bytes) -> list[GpuTick]:
        """Return the ticks that are now whole. Raises ValueError on what no poller of ours would write."""
        self._buffer += data
        ticks = []
        while len(self._buffer) >= _LENGTH:
            length = int.from_bytes(self._buffer[:_LENGTH], "big")
            if length > _LIMIT:
                raise ValueError(f"a tick of {length} bytes")
            if len(self._buffer) < _LENGTH + length:
                break
            try:
                ticks.append(self._decode(bytes(self._buffer[_LENGTH : _LENGTH + length])))
            except msgspec.MsgspecError as error:
                raise ValueError(f"no tick: {error}") from None
            del self._buffer[: _LENGTH + length]
        return ticks
