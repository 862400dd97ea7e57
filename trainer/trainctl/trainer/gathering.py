"""Nobody applies a command before every rank is at its boundary: a rank may leave its loop after it said *ready*.

Its data may run out, it may break out of its loop, or it shadows the collectives of others in torch's `Join`. So the
boundary itself has a decision:

    rank R   is there   `h/N/R`
    one key  decides    `m/N`: GO, by rank 0 when all are there; ABORT by a rank that leaves, or that has waited for
                        `GATHER_S` (or five of its steps). Written once by compare-and-set; all obey what they read
"""

import gc
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

from trainctl.trainer.agreement import ABORT, DOUBT_S, GO
from trainctl.trainer.meeting import StoreSilent

GATHER_S = 30.0
GATHER_STEPS = 5
_POLL_S = (0.001, 0.05)
_AGAIN_S = 1.0
_NOT_COLLECTING = threading.Lock()


class Talk(Protocol):
    """A rank's calls on the store, one at a time. Each raises `StoreSilent`."""

    def put(self, key: str, content: bytes) -> None: ...

    def has(self, keys: Sequence[str]) -> bool: ...

    def decide(self, key: str, content: bytes) -> bytes | None: ...


class Gathering:
    """One rank at the boundary of proposal `number`."""

    def __init__(self, talk: Talk, *, number: int, rank: int, ranks: int, limit_s: float) -> None:
        self._talk = talk
        self._key = f"m/{number}"
        self._own = f"h/{number}/{rank}"
        self._all = [f"h/{number}/{other}" for other in range(ranks)]
        self._leads = rank == 0
        self._limit_s = limit_s
        self.heard = time.monotonic()  # when the store last answered
        self._given_up = False
        self._decision: bytes | None = None
        self._over = threading.Event()

    def wait(self) -> bool | None:
        """Whether all are there; None when the store was silent for `DOUBT_S`, so that nobody here can know.

        A thread asks, for a store that is cut off does not fail: it blocks for as long as TCP does.
        """
        threading.Thread(target=self._ask, name="trainctl-gathers", daemon=True).start()
        while not self._over.wait(_AGAIN_S):
            if time.monotonic() - self.heard > DOUBT_S:
                self._given_up = True
                return None
        return self._decision == GO

    def _ask(self) -> None:
        began = time.monotonic()
        arrived = False
        while not self._given_up:
            try:
                if not arrived:
                    self._talk.put(self._own, b"here")
                    arrived = True
                self._look(time.monotonic() - began)
            except StoreSilent:
                time.sleep(_AGAIN_S)
                continue
            self.heard = time.monotonic()
            if self._decision is not None:
                self._over.set()
                return
            time.sleep(min(max((time.monotonic() - began) / 20, _POLL_S[0]), _POLL_S[1]))

    def _look(self, waited_s: float) -> None:
        if self._leads and self._talk.has(self._all):
            self._decision = self._talk.decide(self._key, GO) or ABORT
        elif waited_s > self._limit_s or self._talk.has([self._key]):
            self._decision = self._talk.decide(self._key, ABORT) or ABORT  # or what is there already


def call_off(talk: Talk, number: int) -> bytes:
    """This rank will not come: nobody applies what was not decided. Returns what holds. Raises `StoreSilent`."""
    return talk.decide(f"m/{number}", ABORT) or ABORT


def not_all_came(step: int, limit_s: float) -> str:
    return (
        f"not every rank came to the boundary of step {step}: one has left its loop, or takes over {limit_s:.0f} s to "
        "come (trainctl status shows where each is); nothing was changed on any rank"
    )


def frame_of(thread: int) -> FrameType | None:
    """What a thread executes now.

    Until CPython 3.11.9 a garbage collection in the middle of `sys._current_frames` could release the interpreter's
    lock while another one was held that every new thread needs, and the process stood still for ever
    (python/cpython 106883; 3.12 collects elsewhere). So there is none meanwhile.
    """
    if sys.version_info >= (3, 11, 9):
        return sys._current_frames().get(thread)
    with _NOT_COLLECTING:
        collects = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames().get(thread)
        finally:
            if collects:
                gc.enable()


def in_shadow(thread: int) -> bool:
    """Whether a thread is past its own data inside torch's `Join`, where it only shadows the others' collectives."""
    module: Any = sys.modules.get("torch.distributed.algorithms.join")
    if module is None:
        return False
    code = module.Join.__exit__.__code__
    frame = frame_of(thread)  # reads only, and only when a command is under way
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def watch(event: "threading.Event", gone: Callable[[], str | None], every_s: float) -> str | None:
    """Wait for an event; what `gone` says where it says something first."""
    while not event.wait(every_s):
        if (why := gone()) is not None:
            return why
    return None
