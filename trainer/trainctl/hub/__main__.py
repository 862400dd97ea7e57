"""`python -P -m trainctl.hub`: options, signals, exit code."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from logging.handlers import QueueListener
from pathlib import Path

from trainctl.hub.allocator import give_back_at_once
from trainctl.hub.link import LinkListener, LinkTaken
from trainctl.hub.log_thread import log_aside
from trainctl.hub.service import Hub, Options
from trainctl.wire.paths import UnsafePath, link_socket
from trainctl.wire.rundir import RUN_ID
from trainctl.wire.server import InsecureServer

log = logging.getLogger("trainctl.hub")

_NICE = 19


def _options(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="trainctl.hub", description="The hub of one run; rank 0 starts it.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--linger-s", type=float, default=60.0, help="how long to stay after the run ended")
    given = parser.parse_args(arguments)
    if not RUN_ID.match(given.run_id):
        parser.error(f"{given.run_id!r} is no run id")
    return Options(run_dir=given.run_dir, run_id=given.run_id, name=given.name, linger_s=given.linger_s)


async def _serve(options: Options, told: QueueListener) -> int:
    loop = asyncio.get_running_loop()
    try:
        listener = LinkListener(link_socket(options.run_id))
    except LinkTaken as taken:
        log.info("%s: leaving", taken)
        return 0
    hub = Hub(options, listener)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, hub.stop, signal.Signals(number).name)
    await hub.run()
    if hub.sinks_left_behind:
        # A library that hangs would keep the interpreter from ending, by its threads or its exit handlers.
        told.stop()
        os._exit(0)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run a hub until its run is over; 0 then, 1 when it cannot serve."""
    options = _options(arguments)
    give_back_at_once()
    told = log_aside()
    os.nice(max(0, _NICE - os.nice(0)))
    try:
        return asyncio.run(_serve(options, told))
    except (UnsafePath, InsecureServer, OSError) as error:
        log.error("the hub cannot serve, training goes on without it: %s", error)
        return 1
    finally:
        told.stop()


if __name__ == "__main__":
    sys.exit(main())
