"""Checking a checkpoint's files for a client, who may hear how far it is."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from trainctl.wire import checking
from trainctl.wire.checking import Verdict

_TELL_S = 0.25


async def check(directory: Path, tell: Callable[[int], None] | None = None) -> Verdict:
    """Hash a checkpoint's files and remember the outcome beside it; `tell` hears now and then of the bytes done."""
    done = 0

    def hashed(size: int) -> None:
        nonlocal done
        done += size

    working = asyncio.create_task(asyncio.to_thread(checking.check, directory, hashed))
    while tell is not None and not working.done():
        tell(done)
        await asyncio.wait({working}, timeout=_TELL_S)
    return await working
