"""Command line, lock and exit code of the agent."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence

import zmq

from trainctl.agent.job_lock import AlreadyRunning, JobLock
from trainctl.agent.lifetime import LINGER_S
from trainctl.agent.options import JOB_VARIABLES, Options
from trainctl.agent.service import run_agent
from trainctl.wire.paths import UnsafePath
from trainctl.wire.server import InsecureServer


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Exits with 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="trainctl agent", description="Publish what this node and its GPUs do.")
    parser.add_argument("--job", help="watch the ranks of this run or cluster job only (default: the cluster's job)")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between readings")
    parser.add_argument("--bind", default="*", metavar="HOST", help="listen on this address only")
    parser.add_argument("--prometheus", type=int, metavar="PORT", help="serve /metrics on 127.0.0.1:PORT as well")
    parser.add_argument("--while-ranks", action="store_true", help="end after the last rank on this node")
    parser.add_argument(
        "--linger", type=float, default=LINGER_S, metavar="S", help="with --while-ranks: stay so long after the last"
    )
    parser.add_argument("--no-gpus", action="store_true", help="do not ask NVML")
    given = parser.parse_args(arguments)
    try:
        return Options(
            job=given.job or next(filter(None, map(os.environ.get, JOB_VARIABLES)), None),
            interval_s=given.interval,
            bind=given.bind,
            prometheus=given.prometheus,
            while_ranks=given.while_ranks,
            linger_s=given.linger,
            gpus=not given.no_gpus,
        )
    except ValueError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent; return its exit code: 0 done or not needed, 1 could not start, 2 wrong usage."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        lock = JobLock(options.job_name)
    except AlreadyRunning as other:
        print(other, file=sys.stderr)
        return 0
    except OSError as error:
        print(f"the agent cannot start: {error}", file=sys.stderr)
        return 1
    try:
        asyncio.run(run_agent(options))
    except (UnsafePath, InsecureServer, zmq.ZMQError) as error:
        print(f"the agent cannot start: {error}; training goes on without readings of this node", file=sys.stderr)
        return 1
    finally:
        lock.close()
    return 0
