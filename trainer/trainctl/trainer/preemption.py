"""The machine will be taken away: whichever rank learns of it, rank 0 proposes one checkpoint and a stop for all.

A rank learns of it by a file that `trainctl run` of its node writes, or by a signal of its own (srun without torchrun).
It tells rank 0 by a key of the job's store, so that all this works while the hub is down. Rank 0 sends the command to
its own leader, in the name of `preemption`, until it is applied.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from trainctl.trainer.control import Control
from trainctl.trainer.core import Core
from trainctl.trainer.exchange import WARNING_KEY
from trainctl.trainer.leader import Leader
from trainctl.trainer.meeting import StoreSilent
from trainctl.wire.commands import FINAL_COMMAND_STATES, Command, Stop
from trainctl.wire.messages import CommandUpdate, Event, LinkCommand
from trainctl.wire.places import has_ended, is_rank, process_started
from trainctl.wire.preemption import (
    ACTOR,
    FILE_VARIABLE,
    SIGNAL_VARIABLE,
    Heard,
    Left,
    beside,
    read_warned,
    record_preempted,
    signal_number,
    write_note,
)

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_AGAIN_S = 1.0
_TRIES = 10


class Signalled:
    """A signal handler that only notes that it was called: nothing else is safe in the middle of anything.

    But for a SIGTERM by which an operator ends the ranks, as `by_operator` says, or torchrun those that are left where
    `a_rank_is_gone`: that one ends this rank, as it would without us. `abort --now` saves nothing, and after it nobody
    is to be told of a preemption; and without all ranks there is no checkpoint, for which torchrun would wait in vain.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.by_operator: Callable[[], bool] = lambda: False
        self.a_rank_is_gone: Callable[[], bool] = lambda: False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGTERM and (self.by_operator() or self.a_rank_is_gone()):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.name = signal.Signals(number).name


def listen(given: str | None) -> Signalled | None:
    """Take the configured signal, where the script has no handler of its own; None where nothing is taken.

    `given` is `Run.attach(preempt_signal=)`, else TRAINCTL_PREEMPT_SIGNAL counts. Raises ValueError for no signal.
    """
    number = signal_number(os.environ.get(SIGNAL_VARIABLE, "") if given is None else given)
    if number is None:
        return None
    name = signal.Signals(number).name
    if threading.current_thread() is not threading.main_thread():
        log.warning("trainctl: %s is not listened to: Run.attach was not called by the main thread", name)
        return None
    before = signal.getsignal(number)
    if before is signal.SIG_IGN and FILE_VARIABLE in os.environ:
        return None  # `trainctl run` hears it for us
    if before is not signal.SIG_DFL and not isinstance(before, Signalled):
        log.warning("trainctl: %s is not listened to: the script has its own way with it", name)
        return None
    heard = Signalled()
    signal.signal(number, heard)
    signal.siginterrupt(number, False)  # libraries in the middle of a system call need not know of it
    return heard


def gone_of(core: Core) -> Callable[[], bool]:
    """Whether the run is held, and a rank of this node that runs now has ended since.

    One that is not seen from here, in a container of its own, does not count.
    """
    started: dict[int, float] = {}
    for place in core.rank_places:
        if place.node == core.place.node and is_rank(place.pid, place.rank):
            with contextlib.suppress(OSError):
                started[place.pid] = process_started(place.pid)
    return lambda: core.hold is not None and any(has_ended(pid, since) for pid, since in started.items())


@contextlib.contextmanager
def heard_while_paused(signalled: Signalled | None) -> Iterator[None]:
    """SIGTERM while the run is held becomes a checkpoint and a stop, unless the script has its own way with it.

    In a pause there is nothing in flight that a save would have to wait for, and what was trained up to it may be worth
    days; without us the signal would end the rank. An operator's `abort --now` and `restart` do end it.
    """
    main = threading.current_thread() is threading.main_thread()
    if signalled is None or not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signalled)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Reading(Protocol):
    """Where rank 0 finds the warning of another rank, without waiting for the store."""

    def has(self, keys: Sequence[str], /) -> bool: ...

    def get_all(self, keys: Sequence[str], /) -> list[bytes | None]: ...


class Preemption:
    """One rank's part; for its sender thread, except `left`, which is for the training thread."""

    def __init__(
        self,
        core: Core,
        *,
        control: Control | None,
        reading: Reading | None,
        leader: Leader | None,
        signalled: Signalled | None,
    ) -> None:
        self._core = core
        self._control = control
        self._reading = reading
        self._leader = leader
        self._signalled = signalled
        path = os.environ.get(FILE_VARIABLE)
        self._file = Path(path) if path and core.place.local_rank == 0 else None
        self._reason: str | None = None
        self._passed_on = False
        self._silent = False
        self._next_look = 0.0
        self._tries = 0
        self._open: str | None = None  # the command that was proposed and has no outcome yet
        self._try_at = 0.0

    def tick(self, now: float) -> None:
        """Look for a warning, and see to it that something comes of it; `now` is monotonic."""
        if self._reason is None:
            self._reason = self._warning()
        if self._reason is None and self._leader is not None and now >= self._next_look:
            self._next_look = now + _LOOK_S
            self._reason = self._of_another_rank()
        if self._reason is None:
            return
        if self._leader is not None:
            self._propose(now)
        elif not self._passed_on:
            self._pass_on()

    def hear(self, event: Event) -> None:
        """An event of rank 0 goes out: it may be the outcome of our own command."""
        if isinstance(event, CommandUpdate) and event.id == self._open and event.state in FINAL_COMMAND_STATES:
            self._open = None
            if event.state == "unknown":
                self._silent = True

    def left(self, reason: str) -> None:
        """The loop was left because of a warning, and what was to be saved is saved or is not: `reason` says it."""
        core = self._core
        step = core.boundary.completed
        with contextlib.suppress(OSError):  # then `trainctl run` ends with 1 and not 75, and the checkpoint stands
            if self._file is not None:
                write_note(beside(self._file, "left"), Left(step=step, reason=reason))
        if core.place.leads and core.identity.problem is None:
            with contextlib.suppress(OSError):
                record_preempted(core.identity.directory, attempt=core.identity.attempt, step=step, reason=reason)

    def _warning(self) -> str | None:
        if self._signalled is not None and (name := self._signalled.name) is not None:
            return f"{name} on {self._core.place.node}"
        if self._file is None or (warned := read_warned(self._file)) is None:
            return None
        problem = self._problem()
        with contextlib.suppress(OSError):  # then `trainctl run` waits a while for a word, and goes on without
            write_note(beside(self._file, "heard"), Heard(problem=problem))
        return warned.reason

    def _problem(self) -> str | None:
        able = self._core.capabilities.get("stop", True)
        return None if able is True else str(able)

    def _pass_on(self) -> None:
        if self._control is None:
            self._passed_on = True
            return
        try:
            self._control.put(WARNING_KEY, str(self._reason).encode())
        except StoreSilent:
            log.warning("trainctl: a warning (%s) cannot be passed on: the job's store does not answer", self._reason)
        self._passed_on = True

    def _of_another_rank(self) -> str | None:
        if self._reading is None or self._silent:
            return None
        try:
            if not self._reading.has([WARNING_KEY]):
                return None
            (found,) = self._reading.get_all([WARNING_KEY])
        except StoreSilent:
            self._silent = True
            return None
        return found.decode(errors="replace") if found is not None else None

    def _propose(self, now: float) -> None:
        core = self._core
        done = core.ending is not None or core.boundary.closed or self._open is not None
        if done or self._silent or now < self._try_at or self._tries >= _TRIES:
            return
        if (problem := self._problem()) is not None:
            self._tries = _TRIES
            core.complain("preemption", f"{self._reason}: the run cannot be stopped at a boundary: {problem}")
            return
        self._tries += 1
        self._try_at = now + _AGAIN_S
        name = f"{ACTOR}-{core.identity.attempt}" + (f".{self._tries}" if self._tries > 1 else "")
        log.warning("trainctl: %s: one checkpoint, then the run stops", self._reason)
        self._open = name
        assert self._leader is not None
        command = Command(id=name, action=Stop(preempted=self._reason))
        self._leader.submit(LinkCommand(command=command, actor=ACTOR, accepted=time.time()))


def farewell(core: Core) -> str:
    """Why a preempted run ended, and where it can go on; once running saves are over."""
    words = str(core.preempted)
    if core.hold is not None:
        words += f", while paused by {core.hold.by}: the next attempt is not paused"
    save = core.newest_save
    if save is None or not save.pending.done():
        return f"{words}; no checkpoint was saved: {core.capabilities.get('checkpoint')}"
    error = save.pending.result().error
    return f"{words}; checkpoint {save.id}" if error is None else f"{words}; the checkpoint failed: {error}"
