"""A real server over real sockets, with a handler that knows one request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from trainctl.wire.keys import Authority, KeyPair, source_keys, user_keys
from trainctl.wire.messages import Nodes, NodesRequest, Reply, Request, RunState, Stream
from trainctl.wire.peer import Peer
from trainctl.wire.server import Caller, Handler, Identity, Refusal, Server


class Echo:
    """Answers `nodes`, and has recorded nothing."""

    async def handle(self, request: Request, caller: Caller) -> Reply | None:
        if isinstance(request, NodesRequest):
            return Nodes(req=caller.req, nodes=[])
        raise Refusal("not_supported", "this is a test")

    def recorded(self, stream: Stream, first: int, last: int) -> list[bytes] | None:
        return None

    def run_state(self) -> RunState | None:
        return None


@asynccontextmanager
async def serving(grants: Path | None = None, handler: Handler | None = None) -> AsyncIterator[Server]:
    server = Server(
        identity=Identity(kind="agent", source="a1", name="node-a", epoch=1),
        keys=source_keys(),
        authority=Authority(user_keys().public, grants),
        handler=handler or Echo(),
    )
    await server.start("127.0.0.1")
    task = asyncio.create_task(server.serve())
    try:
        yield server
        assert not task.done(), "it serves to the end"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.close()


async def connect(server: Server, keys: KeyPair, server_key: str | None = None) -> Peer:
    addresses = [f"tcp://127.0.0.1:{server.port}"]
    return await Peer.connect(addresses, server_key or source_keys().public, keys, timeout_s=10)
