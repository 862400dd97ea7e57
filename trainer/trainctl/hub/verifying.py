"""Checking a checkpoint's files for a client, who may hear how far it is."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from trainctl.wire.manifest import DamagedCheckpoint, remember_check, verify

_TELL_S = 0.25


async def check(directory: Path, tell: Callable[[int], None] | None = None) -> tuple[bool, str]:
    """Hash a checkpoint's files and remember the outcome beside it; `tell` hears now and then of the bytes done."""
    done = 0

    def hashed(size: int) -> None:
        nonlocal done
        done += size

    working = asyncio.create_task(asyncio.to_thread(_check, directory, hashed))
    while tell is not None and not working.done():
        tell(done)
        await asyncio.wait({working}, timeout=_TELL_S)
    return await working


def _check(directory: Path, progress: Callable[[int], None]) -> tuple[bool, str]:
    try:
        manifest = verify(directory, progress)
    except DamagedCheckpoint as damage:
        ok, text = False, str(damage)
    else:
        ok, text = True, f"{len(manifest.files)} files have the sizes and hashes that the manifest says"
    remember_check(directory, ok=ok, text=text)
    return ok, text
