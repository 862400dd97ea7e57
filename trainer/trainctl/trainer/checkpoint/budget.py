"""How much host memory a rank may keep states in, where nobody says: a share of what is free on its node."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from trainctl.wire.memory_limit import MemoryLimit

# The rest is for the script: loaders, the page cache that feeds them, and what it allocates later.
SHARE = 0.25


def free_bytes(meminfo: Path = Path("/proc/meminfo"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """What the kernel could give to this process without swapping, as its cgroup limits it; 0 where it is not told."""
    figures: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in {"MemTotal", "MemAvailable"}:
                figures[name] = int(value.split()[0]) * 1024
    free = figures.get("MemAvailable", 0)
    with contextlib.suppress(OSError):
        limit = MemoryLimit.find(figures.get("MemTotal", 0), membership=membership.read_text())
        if limit is not None and (used := limit.used_bytes()) is not None:
            free = min(free, max(0, limit.limit_bytes - used))
    return free


def shared_budget(local_ranks: int, free: Callable[[], int] = free_bytes) -> Callable[[int], int]:
    """A budget for `MemoryTier`: this rank's part of the share, told anew whenever it wants to grow.

    What the ranks hold already is no longer free, so it is added again, on the assumption that they hold alike.
    """

    def allowed(held_bytes: int) -> int:
        return int(SHARE * (free() / local_ranks + held_bytes))

    return allowed


def fixed_budget(budget_bytes: int) -> Callable[[int], int]:
    """A budget that the script gave, in bytes for each rank."""
    return lambda _held_bytes: budget_bytes
