"""The client's end of one source: find the address that answers, say hello, ask, follow."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

import zmq
import zmq.asyncio
import zmq.utils.monitor

from trainctl.wire import codec
from trainctl.wire.keys import KeyPair
from trainctl.wire.messages import PROTOCOL, ErrorReply, Hello, Reply, ReplyBase, Request, Welcome
from trainctl.wire.sockets import client_socket, new_context

R = TypeVar("R", bound=ReplyBase)

_SAME_VERSION = "install the same trainctl-cockpit on both sides"
_ANY_REPLY: tuple[type, ...] = (ReplyBase,)


class PeerError(Exception):
    """Base of what can go wrong when asking a source.

    PeerError
     ├── Unreachable     nobody answers at any of the addresses
     ├── KeyRefused      somebody answers, and does not know our key or is not who the card says
     ├── NoAnswer        the source was there and did not answer in time
     └── Refused         the source said no, with a code, a sentence and a hint
    """


class Unreachable(PeerError):
    pass


class KeyRefused(PeerError):
    pass


class NoAnswer(PeerError):
    pass


class Refused(PeerError):
    def __init__(self, error: ErrorReply) -> None:
        super().__init__(error.message)
        self.code, self.message, self.hint = error.code, error.message, error.hint


class Peer:
    """A connection to a source's ROUTER. Survives the source's restart at the same address; use from one loop."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        socket: zmq.asyncio.Socket,
        address: str,
        server_key: str,
        keys: KeyPair,
    ) -> None:
        self._context = context
        self._socket = socket
        self._decode = codec.reply_decoder()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Queue[Reply]] = {}
        self._reader = asyncio.create_task(self._read())
        self.address = address
        self.server_key = server_key
        self.keys = keys
        self.welcome: Welcome

    @classmethod
    async def connect(
        cls,
        addresses: Sequence[str],
        server_key: str,
        keys: KeyPair,
        *,
        timeout_s: float = 3.0,
        name: str = "trainctl",
    ) -> "Peer":
        """Connect to the first address that answers hello.

        Raises `Unreachable`, `KeyRefused`, `Refused` (version, role), or ValueError on a malformed key.
        """
        attempts = [asyncio.create_task(cls._one(address, server_key, keys, timeout_s, name)) for address in addresses]
        errors: list[BaseException] = []
        winner: Peer | None = None
        try:
            for finished in asyncio.as_completed(attempts):
                try:
                    winner = await finished
                except (PeerError, ValueError) as error:
                    errors.append(error)
                else:
                    return winner
        finally:
            for attempt in attempts:
                attempt.cancel()
            for left in await asyncio.gather(*attempts, return_exceptions=True):
                if isinstance(left, Peer) and left is not winner:
                    left.close()
        errors.sort(key=lambda error: isinstance(error, Unreachable))  # what says more comes first
        raise errors[0] if errors else Unreachable("the card names no address")

    @classmethod
    async def _one(cls, address: str, server_key: str, keys: KeyPair, timeout_s: float, name: str) -> "Peer":
        context = new_context()
        try:
            socket = client_socket(context, zmq.DEALER, keys, server_key)
        except ValueError:
            context.term()
            raise
        monitor = socket.get_monitor_socket()
        peer = cls(context, socket, address, server_key, keys)
        watcher = asyncio.create_task(_handshake_refused(monitor))
        greeting = asyncio.create_task(
            peer.ask(Hello(req=0, versions=[PROTOCOL], client=name), Welcome, timeout_s=timeout_s)
        )
        try:
            socket.connect(address)
            await asyncio.wait({watcher, greeting}, return_when=asyncio.FIRST_COMPLETED)
            if not greeting.done():
                raise KeyRefused(watcher.result())
            peer.welcome = _understood(greeting.result())
        except NoAnswer:
            peer.close()
            raise Unreachable(f"nobody answers at {address}") from None
        except zmq.ZMQError as error:
            peer.close()
            raise Unreachable(f"{address} is no address to connect to: {error}") from None
        except BaseException:
            peer.close()
            raise
        finally:
            for task in (watcher, greeting):
                task.cancel()
            try:
                await asyncio.gather(watcher, greeting, return_exceptions=True)
            except asyncio.CancelledError:
                peer.close()  # another address won while this one was tidying up
                raise
            finally:
                with contextlib.suppress(zmq.ZMQError):
                    socket.disable_monitor()
                monitor.close()
        return peer

    async def ask(self, request: Request, answer: type[R], *, timeout_s: float = 10.0) -> R:
        """Send one request (its `req` is set here) and return its one reply.

        Raises `NoAnswer`, or `Refused` with what the source said.
        """
        async with contextlib.aclosing(self.replies(request, timeout_s=timeout_s)) as replies:
            async for reply in replies:
                if isinstance(reply, answer):
                    return reply
                raise NoAnswer(f"expected {answer.__name__}, got {type(reply).__name__}")
        raise NoAnswer("the connection was closed")

    async def replies(self, request: Request, *, timeout_s: float | None = 10.0) -> AsyncGenerator[Reply, None]:
        """Send a request and yield every reply to it. `timeout_s` bounds the wait for each one.

        Raises `NoAnswer`, or `Refused` with what the source said.
        """
        number = next(self._numbers)
        queue: asyncio.Queue[Reply] = asyncio.Queue()
        self._waiting[number] = queue
        try:
            numbered = codec.encode(_with_number(request, number))
            async with asyncio.timeout(timeout_s):
                await self._socket.send(numbered)
            while True:
                async with asyncio.timeout(timeout_s):
                    reply = await queue.get()
                if isinstance(reply, ErrorReply):
                    raise Refused(reply)
                yield reply
        except TimeoutError:
            raise NoAnswer(f"no answer from {self.address} within {timeout_s} s") from None
        finally:
            del self._waiting[number]

    def subscriber(self) -> zmq.asyncio.Socket:
        """A SUB socket connected to the same source, with nothing subscribed yet. The caller closes it."""
        socket = client_socket(self._context, zmq.SUB, self.keys, self.server_key)
        host = self.address.rsplit(":", 1)[0]
        socket.setsockopt(zmq.RCVHWM, 50_000)
        socket.connect(f"{host}:{self.welcome.publish_port}")
        return socket

    def close(self) -> None:
        self._reader.cancel()
        self._socket.close(0)
        self._context.destroy(0)

    async def _read(self) -> None:
        while True:
            payload = await self._socket.recv()
            try:
                reply = self._decode(payload)
            except codec.DecodeError:
                continue  # counted by the decoder
            assert isinstance(reply, _ANY_REPLY)
            if (queue := self._waiting.get(reply.req)) is not None:  # type: ignore[attr-defined]
                queue.put_nowait(reply)  # type: ignore[arg-type]


def _understood(welcome: Welcome) -> Welcome:
    """Raises `Refused` where the source chose a version that we did not offer."""
    if welcome.version != PROTOCOL:
        text = f"the {welcome.kind} speaks protocol {welcome.version}, this client {PROTOCOL}"
        raise Refused(ErrorReply(req=welcome.req, code="version", message=text, hint=_SAME_VERSION))
    return welcome


def _with_number(request: Request, number: int) -> Request:
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    return type(request)(**(fields | {"req": number}))


async def _handshake_refused(monitor: zmq.asyncio.Socket) -> str:
    """Return why the CURVE handshake failed, once it did; wait for ever while it has not."""
    connected = False
    while True:
        event = await zmq.utils.monitor.recv_monitor_message(monitor)
        match event["event"]:
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                return "the source does not know this key: only its owner's and those in its owner's grants.json may in"
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                return "the other end is not the source that this key belongs to: check --server-key"
            case zmq.EVENT_CONNECTED:
                connected = True
            case zmq.EVENT_DISCONNECTED if connected:
                return "the other end hung up during the handshake: check --server-key"
            case _:
                pass
