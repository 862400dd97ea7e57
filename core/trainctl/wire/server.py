"""The server that hub and agent share: XPUB for telemetry, ROUTER for requests, CURVE and ZAP in front of both.

It numbers, publishes, keeps the newest envelopes for backfill, beats once a second, checks who asks and may ask.
What the answers are is the handler's business.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Protocol, cast

import msgspec
import zmq
import zmq.asyncio
import zmq.utils.monitor

from trainctl.wire import codec
from trainctl.wire.commands import Role, spec_of
from trainctl.wire.keys import Actor, Authority, KeyPair, new_keys
from trainctl.wire.messages import (
    BEAT_TOPIC,
    PROTOCOL,
    STREAMS,
    AuditRequest,
    Backfill,
    BackfillRequest,
    Beat,
    Body,
    CheckpointsRequest,
    CommandQuery,
    CommandRequest,
    Envelope,
    ErrorReply,
    EventsRequest,
    Hello,
    HistoryRequest,
    NodesRequest,
    Reply,
    Request,
    RunState,
    SnapshotRequest,
    Stream,
    TunablesRequest,
    VerifyRequest,
    Welcome,
    stream_of,
)
from trainctl.wire.retained import Retained
from trainctl.wire.sockets import client_socket, new_context, server_socket, start_authenticator

log = logging.getLogger(__name__)

BEAT_INTERVAL_S = 1.0
_BEATS_APART_S = 0.005
_SUBSCRIBES = b"\x01"  # how XPUB says it
_RETAINED = 20_000
_UNREAD_REPLIES = 100  # of one client that asks and does not read, each of up to `codec.REPLY_LIMIT` bytes
_SELF_TEST_S = 5.0
_BACKFILL_BYTES = codec.DATA_LIMIT - 64 * 1024

# Deny by default: a request that is not listed is refused. Commands ask the registry instead.
_NEEDED: dict[type, Role] = {
    Hello: "viewer",
    SnapshotRequest: "viewer",
    BackfillRequest: "viewer",
    HistoryRequest: "viewer",
    EventsRequest: "viewer",
    CheckpointsRequest: "viewer",
    TunablesRequest: "viewer",
    NodesRequest: "viewer",
    CommandQuery: "viewer",
    VerifyRequest: "operator",
    AuditRequest: "operator",
}


class InsecureServer(RuntimeError):
    """The server let in a key that nobody granted, so it does not start."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Where a request came from; `Server.reply` needs it."""

    route: bytes
    req: int
    actor: Actor


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who the source is."""

    kind: str  # "hub" or "agent"
    source: str
    name: str
    epoch: int


class Handler(Protocol):
    """What a source does with requests that the server does not answer itself."""

    async def handle(self, request: Request, caller: Caller) -> Reply | None:
        """Answer, or return None and answer later with `Server.reply`. Raise `Refusal` to say no."""

    def recorded(self, stream: Stream, first: int, last: int) -> list[bytes] | None:
        """Encoded envelopes older than the server keeps, oldest first; None if they are gone."""

    def run_state(self) -> RunState | None:
        """What goes with the heartbeat."""


class Refusal(Exception):
    """A request is answered with an error."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


class Server:
    """One source's two sockets. Use it from one asyncio loop; `start`, then `serve` until cancelled, then `close`."""

    def __init__(
        self,
        *,
        identity: Identity,
        keys: KeyPair,
        authority: Authority,
        handler: Handler,
        heads: dict[str, int] | None = None,
        retained: int = _RETAINED,
    ) -> None:
        self.identity = identity
        self._keys = keys
        self._authority = authority
        self._handler = handler
        self._context = new_context()
        self._publisher = server_socket(self._context, zmq.XPUB, keys)
        self._router = server_socket(self._context, zmq.ROUTER, keys)
        self._publisher.setsockopt(zmq.SNDHWM, 10_000)
        self._publisher.setsockopt(zmq.XPUB_VERBOSE, 1)  # tell of every subscriber, not of the first to a topic
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.SNDHWM, _UNREAD_REPLIES)
        self._authenticator = start_authenticator(self._context, lambda key: authority.who(key) is not None)
        self._decode = codec.request_decoder()
        self.heads: dict[str, int] = dict.fromkeys(STREAMS, 0) | (heads or {})
        self._kept = {stream: Retained(retained) for stream in STREAMS}
        self._tasks: set[asyncio.Task[None]] = set()
        self._beats_wanted = asyncio.Event()
        self.port = 0
        self.publish_port = 0

    @property
    def refused(self) -> int:
        """Messages that were no messages of ours."""
        return self._decode.refused

    async def start(self, host: str = "*", ports: tuple[int, int] = (0, 0)) -> None:
        """Bind both sockets, the given ports if they are free, and prove that a stranger's key is refused.

        Raises `InsecureServer`, or zmq.ZMQError where nothing can be bound.
        """
        self.port = _bind(self._router, host, ports[0])
        self.publish_port = _bind(self._publisher, host, ports[1])
        await self._refuses_strangers(zmq.DEALER, host, self.port)
        await self._refuses_strangers(zmq.SUB, host, self.publish_port)

    async def serve(self) -> None:
        """Answer and beat until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._answer())
            group.create_task(self._beat())
            group.create_task(self._greet_subscribers())

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._authenticator.stop()
        self._router.close()
        self._publisher.close()
        self._context.term()

    # --- publishing

    def number(self, body: Body, *, attempt: int = 0, link: int = 0) -> tuple[Envelope, bytes]:
        """Give a body the next number of its stream; return the envelope and its bytes, not yet sent."""
        stream = stream_of(body)
        self.heads[stream] += 1
        envelope = Envelope(
            source=self.identity.source,
            epoch=self.identity.epoch,
            stream=stream,
            seq=self.heads[stream],
            time=time.time(),
            body=body,
            attempt=attempt,
            link=link,
            v=PROTOCOL,
        )
        return envelope, codec.encode(envelope)

    def send(self, envelope: Envelope, encoded: bytes) -> None:
        """Publish what `number` made. Never waits: a subscriber that is too slow loses it and backfills."""
        self._kept[envelope.stream].append(envelope.seq, encoded)
        self._send(envelope.stream.encode(), encoded)

    def publish(self, body: Body) -> Envelope:
        """Number and send in one step, for sources that record nothing."""
        envelope, encoded = self.number(body)
        self.send(envelope, encoded)
        return envelope

    def beat(self) -> None:
        """Beat now, because something changed that nobody should wait a second for."""
        self._beats_wanted.set()

    async def _beat(self) -> None:
        while True:
            beat = Beat(
                source=self.identity.source,
                epoch=self.identity.epoch,
                time=time.time(),
                heads=dict(self.heads),
                run=self._handler.run_state(),
                v=PROTOCOL,
            )
            self._send(BEAT_TOPIC, codec.encode(beat))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_INTERVAL_S):
                    await self._beats_wanted.wait()
                    await asyncio.sleep(_BEATS_APART_S)  # one for all who want it now, however many they are
            self._beats_wanted.clear()

    def _send(self, topic: bytes, payload: bytes) -> None:
        _post(self._publisher, [topic, payload])

    async def _greet_subscribers(self) -> None:
        """Beat for whoever subscribes to the heartbeat, last of all topics: it waits for the proof."""
        while True:
            message = await self._publisher.recv()
            if message == _SUBSCRIBES + BEAT_TOPIC:
                self.beat()

    # --- answering

    def reply(self, caller: Caller, reply: Reply) -> None:
        """Send a reply; one to a client that left is dropped, one that no client would take becomes an error."""
        encoded = codec.encode(reply)
        if len(encoded) > codec.REPLY_LIMIT:
            encoded = codec.encode(
                ErrorReply(
                    req=reply.req,
                    code="too_large",
                    message=f"the answer has {len(encoded)} bytes, and at most {codec.REPLY_LIMIT} may be sent",
                    hint="ask for less at once: fewer metrics, points or lines",
                )
            )
        _post(self._router, [caller.route, encoded])

    async def _answer(self) -> None:
        while True:
            frames = await self._router.recv_multipart(copy=False)
            if len(frames) != 2:
                self._decode.refused += 1
                continue
            route, payload = frames
            actor = self._authority.who(_user_id(payload))
            if actor is None:
                continue  # granted when it connected, revoked since
            try:
                request = self._decode(payload.bytes)
            except codec.DecodeError as error:
                number = _number_of(payload.bytes)
                refusal = _refusal_of(number, error)
                self.reply(Caller(route=route.bytes, req=number, actor=actor), refusal)
                continue
            caller = Caller(route=route.bytes, req=request.req, actor=actor)  # type: ignore[attr-defined]
            task = asyncio.create_task(self._handle(request, caller))  # type: ignore[arg-type]
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _handle(self, request: Request, caller: Caller) -> None:
        try:
            self._authorise(request, caller)
            match request:
                case Hello():
                    reply: Reply | None = self._welcome(request, caller)
                case BackfillRequest():
                    reply = self._backfill(request)
                case _:
                    reply = await self._handler.handle(request, caller)
        except Refusal as refusal:
            reply = ErrorReply(req=caller.req, code=refusal.code, message=refusal.message, hint=refusal.hint)
        except Exception:
            log.exception("a %s request failed", type(request).__name__)
            reply = ErrorReply(
                req=caller.req,
                code="internal",
                message=f"the {self.identity.kind} failed to answer",
                hint=f"training is not affected; the reason is in the {self.identity.kind}'s log",
            )
        if reply is not None:
            self.reply(caller, reply)

    def _authorise(self, request: Request, caller: Caller) -> None:
        if isinstance(request, CommandRequest):
            needed = spec_of(request.command.action).role
        else:
            found = _NEEDED.get(type(request))
            if found is None:
                raise Refusal("not_allowed", f"{type(request).__name__} is not open to anybody")
            needed = found
        if not caller.actor.may(needed):
            raise Refusal(
                "not_allowed",
                f"{caller.actor.name} is {caller.actor.role} here, and this needs {needed}",
                "ask the owner of the run to grant it: trainctl keys grant",
            )

    def _welcome(self, request: Hello, caller: Caller) -> Welcome:
        if PROTOCOL not in request.versions:
            raise Refusal(
                "version",
                f"this {self.identity.kind} speaks protocol {PROTOCOL}, the client {request.versions}",
                "install the same trainctl-cockpit on both sides",
            )
        return Welcome(
            req=request.req,
            version=PROTOCOL,
            kind=self.identity.kind,  # type: ignore[arg-type]
            source=self.identity.source,
            name=self.identity.name,
            epoch=self.identity.epoch,
            publish_port=self.publish_port,
            role=caller.actor.role,
            actor=caller.actor.name,
        )

    def _backfill(self, request: BackfillRequest) -> Backfill:
        found = self._kept[request.stream].range(request.first, request.last)
        if found is None:
            found = self._handler.recorded(request.stream, request.first, request.last)
        if found is None:
            return Backfill(req=request.req, envelopes=[], gone=True)
        return Backfill(req=request.req, envelopes=_cut(found, _BACKFILL_BYTES))

    # --- self-test

    async def _refuses_strangers(self, kind: int, host: str, port: int) -> None:
        stranger = client_socket(self._context, kind, new_keys(), self._keys.public)
        failed, succeeded = zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_SUCCEEDED
        monitor = stranger.get_monitor_socket(failed | succeeded)
        try:
            target = "127.0.0.1" if host == "*" else host
            stranger.connect(f"tcp://{target}:{port}")
            async with asyncio.timeout(_SELF_TEST_S):
                event = await zmq.utils.monitor.recv_monitor_message(monitor)
        except TimeoutError:
            raise InsecureServer(f"port {port} did not refuse an unknown key within {_SELF_TEST_S} s") from None
        finally:
            stranger.disable_monitor()
            monitor.close()
            stranger.close()
        if event["event"] != failed:
            raise InsecureServer(f"port {port} let an unknown key in")


def _bind(socket: zmq.asyncio.Socket, host: str, port: int) -> int:
    for wanted in (port, 0) if port else (0,):
        try:
            socket.bind(f"tcp://{host}:{wanted or '*'}")
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE or not wanted:
                raise
        else:
            return int(str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rsplit(":", 1)[1].rstrip("\0"))
    raise AssertionError("unreachable: binding any port either works or raises")


def _refusal_of(number: int, error: codec.DecodeError) -> ErrorReply:
    """What whoever sent an unreadable request is told."""
    if isinstance(error, codec.TooLarge):
        hint = "ask for less at once: fewer metrics in a request, and the others in further ones"
        return ErrorReply(req=number, code="too_large", message=str(error), hint=hint)
    return ErrorReply(req=number, code="bad_request", message=str(error))


class _Numbered(msgspec.Struct):
    req: int = 0


def _number_of(payload: bytes) -> int:
    """The number of a request that is otherwise wrong, so that whoever sent it hears so; 0 if it has none.

    Of one that is too large all is read, because half a message has no fields; what is not asked for is skipped and
    never built, and no frame has more than a few megabytes.
    """
    try:
        return msgspec.msgpack.decode(payload, type=_Numbered).req
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return 0


def _post(socket: zmq.asyncio.Socket, frames: list[bytes]) -> None:
    """Send now or not at all. What fails (a client that left, a full queue) is what numbers and backfill are for."""
    sent = cast("asyncio.Future[object]", socket.send_multipart(frames, flags=zmq.NOBLOCK))
    # With NOBLOCK the future is done already; its exception is looked at, or asyncio complains that nobody did.
    sent.add_done_callback(lambda done: done.cancelled() or done.exception())


def _user_id(frame: zmq.Frame) -> str:
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def _cut(encoded: list[bytes], limit: int) -> list[bytes]:
    size = 0
    for count, item in enumerate(encoded):
        size += len(item) + 8
        if size > limit and count:
            return encoded[:count]
    return encoded
