"""Whether commands can be agreed on now: told to the operator as an anomaly, and as capabilities that are off."""

from trainctl.trainer.control import Control
from trainctl.trainer.core import Core
from trainctl.trainer.exchange import Exchange
from trainctl.trainer.leader import Leader

GRACE_S = 3.0


class Reach:
    """Looked at once a second by rank 0's sender.

    A line that is mended within `GRACE_S` is nothing to tell of, nor is a rank that leaves its loop that much earlier.
    """

    def __init__(self, core: Core, leader: Leader | None, exchange: Exchange, control: Control | None = None) -> None:
        self._core = core
        self._leader = leader
        self._exchange = exchange
        self._control = control
        self._since: float | None = None
        self._told = False

    def look(self, now: float) -> None:
        """`now` is seconds of `time.monotonic`."""
        if (gone := self._control.gone if self._control is not None else None) is not None:
            self._without(gone, now)
            return
        cut = self._leader.problem if self._leader is not None else None
        silent_since = self._exchange.silent_since
        silent = silent_since is not None and now - silent_since >= GRACE_S
        problem = cut or ("the job's store does not answer rank 0" if silent else None)
        if problem is None:
            self._since = None
            self._answers()
            return
        self._since = self._since or now
        if self._core.unreachable is None and (silent or now - self._since >= GRACE_S):
            self._core.unreachable = problem
            self._core.tunables_changed.set()
            if cut is not None:  # of a store that is silent altogether the hub tells, which misses everybody's figures
                self._told = True
                text = "no command can be agreed on until it answers again, and each is refused meanwhile"
                goes_on = "training goes on" if self._core.hold is None else "the run stays paused"
                self._core.tell("control", f"{problem}: {text}; {goes_on}, abort --now ends it", "error")

    def _without(self, gone: int, now: float) -> None:
        """A rank left its loop, which cannot be mended: the ranks have no common boundary in this attempt any more."""
        self._since = self._since or now
        core, why = self._core, f"rank {gone} has left its loop: there is no further boundary"
        if core.unreachable == why or core.boundary.closed or now - self._since < GRACE_S:
            return
        core.unreachable = why
        core.tunables_changed.set()
        goes_on = "training goes on" if core.hold is None else "the run stays paused"
        core.tell("control", f"{why}, and each command is refused; {goes_on}, abort --now ends it", "warning")

    def _answers(self) -> None:
        if self._core.unreachable is None:
            return
        self._core.unreachable = None
        self._core.tunables_changed.set()
        if self._told:
            self._told = False
            self._core.tell("control", "commands can be agreed on again", "good")
