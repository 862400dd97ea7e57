"""What may be said of the GPUs, given when the poller was asked and what it answered. Pure: the clock is an argument.

    no poller ──started──▶ starting ──answered──▶ answering ⇄ unresponsive
        ▲                     │                      │             │
        └────────ended────────┴──────────────────────┴─────────────┘

A poller that does not answer is waited for, for as long as it takes: it hangs in the driver, a second one would hang
beside it, and killing it there has been seen to freeze the GPU. Meanwhile its last good values are not shown.
"""

import time
from dataclasses import dataclass
from typing import Final

from trainctl.agent.backoff import Backoff
from trainctl.agent.gpu_tick import GpuTick
from trainctl.wire.messages import GpuReading

PATIENCE_S: Final = 3.0
STARTING_PATIENCE_S: Final = 30.0  # without persistence mode the driver initialises every GPU first
SELDOM_S: Final = 60.0
_STEADY_S: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class GpuPicture:
    """`state` as in `NodeReading.gpu_state`."""

    state: str
    gpus: list[GpuReading]


class GpuWatch:
    """Decides when to start the poller, when it counts as unresponsive, and what is shown."""

    def __init__(self) -> None:
        self._retry = Backoff(first_s=1.0, limit_s=SELDOM_S)
        self._started_at: float | None = None
        self._asked_at: float | None = None
        self._asked_time = 0.0
        self._last: GpuTick | None = None
        self._without = "starting"

    @property
    def waiting(self) -> bool:
        """An answer is owed: do not ask again."""
        return self._asked_at is not None

    def may_start(self, now: float) -> bool:
        return self._started_at is None and self._retry.due(now)

    def started(self, now: float) -> None:
        self._started_at, self._asked_at, self._last = now, None, None

    def asked(self, now: float, wall_time: float) -> None:
        self._asked_at, self._asked_time = now, wall_time

    def answered(self, tick: GpuTick) -> None:
        self._asked_at, self._last = None, tick

    def ended(self, now: float, how: str) -> None:
        """The poller's process is gone; `how` says by what."""
        told, lived_s = self._last, now - (self._started_at if self._started_at is not None else now)
        self._started_at = self._asked_at = self._last = None
        if lived_s >= _STEADY_S:
            self._retry.worked()
        if told is None or told.kind == "polled":
            self._without = f"the GPU poller {how}; it is started again"
            self._retry.failed(now)
        else:
            self._without = told.state
            self._retry.failed(now, at_least_s=SELDOM_S if told.kind == "absent" else 0.0)

    def picture(self, now: float) -> GpuPicture:
        if self._asked_at is not None:
            patience_s = PATIENCE_S if self._last else STARTING_PATIENCE_S
            if now - self._asked_at > patience_s:
                since = time.strftime("%H:%M:%S", time.gmtime(self._asked_time))
                return GpuPicture(state=f"unresponsive since {since} UTC", gpus=[])
        if self._last is None:
            return GpuPicture(state=self._without, gpus=[])
        return GpuPicture(state=self._last.state, gpus=self._last.gpus)
