"""Carries TCP from a port of its own, which it prints, to another one of this machine, until its input is closed.

usage: relay.py PORT

Stopped (SIGSTOP) it is a line that is cut: nothing gets through, nothing fails, and whoever waits for an answer blocks.
"""

import asyncio
import contextlib
import os
import sys


async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    sink.close()


async def main(port: int) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, back), carry(there, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # with lines that are open


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
