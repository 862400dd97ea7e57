"""CPU, load and memory of this machine, through psutil and the cgroup's limit."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from trainctl.wire.memory_limit import MemoryLimit

_SHORTEST_S: Final = 0.05  # the kernel counts CPU time in hundredths of a second: a shorter span says nothing


@dataclass(frozen=True, kw_only=True)
class NodeSample:
    """`cpu` in percent of all cores since the sample before, None while there is no earlier one."""

    cpu: float | None
    load: float
    memory_used_bytes: int
    memory_total_bytes: int


class NodeSampler:
    """Samples are meant a tick apart; one that follows another at once repeats its CPU figure."""

    def __init__(self) -> None:
        psutil.cpu_percent(None)
        self._sampled_at = time.monotonic()
        self._cpu: float | None = None
        total = psutil.virtual_memory().total
        self._limit = MemoryLimit.find(total, membership=Path("/proc/self/cgroup").read_text())

    def sample(self) -> NodeSample:
        now = time.monotonic()
        if now - self._sampled_at >= _SHORTEST_S:
            self._cpu, self._sampled_at = psutil.cpu_percent(None), now
        memory = psutil.virtual_memory()
        used, total = memory.total - memory.available, memory.total
        if self._limit is not None and (limited := self._limit.used_bytes()) is not None:
            used, total = limited, self._limit.limit_bytes
        return NodeSample(cpu=self._cpu, load=os.getloadavg()[0], memory_used_bytes=used, memory_total_bytes=total)
