"""ZeroMQ sockets with the options that a program which must not hang or leak needs.

Every reason is measured: `linger` -1 hangs at exit with an unreachable peer; without ZAP_ENFORCE_DOMAIN a server
without a handler takes any key; heartbeats notice a peer that is gone without a goodbye.

Only publishers send heartbeats. Where a socket whose queue is full (its program does not read) loses its peer, libzmq
4.3.5 aborts the process at its next own heartbeat (`Assertion failed: !_io_error`, libzmq 4364): 3 of 15 runs of a
client that was cut off while it did not read. A publisher reads next to nothing; clients have the source's beats and
their time-outs, and a ROUTER learns from TCP of clients that are gone.
"""

from collections.abc import Callable

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from trainctl.wire.keys import KeyPair

ZAP_DOMAIN = "trainctl"


def new_context() -> zmq.asyncio.Context:
    context = zmq.asyncio.Context()
    context.set(zmq.BLOCKY, 0)
    return context


def _common(socket: zmq.asyncio.Socket) -> None:
    socket.linger = 0
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    socket.setsockopt(zmq.MAXMSGSIZE, 4 * 1024 * 1024)


def server_socket(context: zmq.asyncio.Context, kind: int, keys: KeyPair) -> zmq.asyncio.Socket:
    """A ROUTER or XPUB that only answers keys which the ZAP handler lets in."""
    socket = context.socket(kind)
    _common(socket)
    if kind == zmq.XPUB:
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
        socket.setsockopt(zmq.HEARTBEAT_TTL, 10_000)
    socket.curve_server = True
    socket.curve_secretkey = keys.secret.encode()
    socket.curve_publickey = keys.public.encode()
    socket.zap_domain = ZAP_DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    return socket


def client_socket(context: zmq.asyncio.Context, kind: int, keys: KeyPair, server_key: str) -> zmq.asyncio.Socket:
    """A DEALER or SUB that only talks to the holder of `server_key`. Raises ValueError on a malformed key."""
    socket = context.socket(kind)
    try:
        _common(socket)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        socket.curve_secretkey = keys.secret.encode()
        socket.curve_publickey = keys.public.encode()
        socket.curve_serverkey = server_key.encode()
    except (zmq.ZMQError, ValueError) as error:
        socket.close()
        raise ValueError(f"not a CURVE key (40 characters of Z85): {error}") from None
    return socket


class _Credentials:
    """Answers ZAP. Guarded, because an exception in here would end the handler and hang every later client."""

    def __init__(self, allowed: Callable[[str], bool]) -> None:
        self._allowed = allowed

    def callback(self, domain: str, key: bytes) -> bool:
        del domain
        try:
            return self._allowed(key.decode("ascii"))
        except Exception:  # noqa: BLE001 - whatever it was, the answer to a stranger is no
            return False


def start_authenticator(context: zmq.asyncio.Context, allowed: Callable[[str], bool]) -> AsyncioAuthenticator:
    """Serve ZAP in this context: `allowed(public_key)` decides. The key becomes the frames' `User-Id`."""
    authenticator = AsyncioAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(ZAP_DOMAIN, _Credentials(allowed))
    return authenticator
