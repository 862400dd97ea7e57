"""Ends ranks: SIGTERM, and after a grace SIGKILL, by pidfds of processes that are proved to be the ranks.

A process is signalled when it is this user's and started when the rank's place file says; both are looked at after its
pidfd was opened, so that neither a foreign process nor a recycled pid is ever hit. Whatever cannot be proved lives on,
and is told of.
"""

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from trainctl.wire.messages import EndedRank
from trainctl.wire.places import Place, process_started

# A killed process whose device driver or file system does not let go of it may stay for ever.
GONE_AFTER_KILL_S: Final = 5.0


class NotOurs(Exception):
    """A process that must not be signalled; the text says why."""


async def end_ranks(places: Sequence[Place], grace_s: float) -> list[EndedRank]:
    """End these ranks side by side; takes at most `grace_s` + `GONE_AFTER_KILL_S`."""
    return list(await asyncio.gather(*(_end(place, grace_s) for place in places)))


async def _end(place: Place, grace_s: float) -> EndedRank:
    try:
        pidfd = open_rank(place)
    except NotOurs as why:
        return EndedRank(rank=place.rank, pid=place.pid, how="left", reason=str(why))
    if pidfd is None:
        return EndedRank(rank=place.rank, pid=place.pid, how="gone")
    try:
        _send(pidfd, signal.SIGTERM)
        _send(pidfd, signal.SIGCONT)  # one that is stopped would keep the SIGTERM for later
        if await _gone(pidfd, grace_s):
            return EndedRank(rank=place.rank, pid=place.pid, how="SIGTERM")
        _send(pidfd, signal.SIGKILL)
        if await _gone(pidfd, GONE_AFTER_KILL_S):
            return EndedRank(rank=place.rank, pid=place.pid, how="SIGKILL")
    except OSError as error:
        return EndedRank(rank=place.rank, pid=place.pid, how="left", reason=f"it cannot be signalled: {error.strerror}")
    finally:
        os.close(pidfd)
    reason = f"it is still there {GONE_AFTER_KILL_S:.0f} s after SIGKILL: the kernel is waiting for a device or a file"
    return EndedRank(rank=place.rank, pid=place.pid, how="left", reason=reason)


def open_rank(place: Place) -> int | None:
    """A pidfd of the rank's very process, or None when it is gone. Raises `NotOurs`; the caller closes."""
    try:
        pidfd = os.pidfd_open(place.pid)
    except ProcessLookupError:
        return None
    except OSError as error:
        raise NotOurs(f"this machine gives no safe hold of a process (pidfd_open: {error.strerror})") from None
    try:
        # Looked at after the pidfd was opened: from then on the pid cannot change hands unnoticed.
        same = process_started(place.pid) == place.started
        owner = Path(f"/proc/{place.pid}").stat().st_uid
    except OSError:
        same, owner = False, os.getuid()
    if not same:
        os.close(pidfd)
        return None
    if owner != os.getuid():
        os.close(pidfd)
        raise NotOurs(f"process {place.pid} belongs to user {owner}")
    return pidfd


def _send(pidfd: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return  # it is gone, as was wanted: the pidfd says so


async def _gone(pidfd: int, within_s: float) -> bool:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(within_s):
            await ended.wait()
    except TimeoutError:
        return False
    else:
        return True
    finally:
        loop.remove_reader(pidfd)
