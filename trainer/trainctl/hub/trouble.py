"""Trouble with the run's directory: tell of it once, try again, tell that it is over."""

import logging

from trainctl.hub.board import RunBoard
from trainctl.hub.disk import Disk, DiskHangs
from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.ownership import Ownership
from trainctl.store.journal import Damage
from trainctl.wire.rundir import RunDir

log = logging.getLogger(__name__)

RETRY_S = 5.0
# What may be wrong with the journal, each with an end of its own or none.
_DAMAGED, _NOT_WRITTEN, _NOT_READ = "damaged", "not written", "not read"


class DiskTrouble:
    """Watches the journal and run.json; the clock is an argument."""

    def __init__(
        self, *, board: RunBoard, keeper: JournalKeeper, ownership: Ownership, run_dir: RunDir, disk: Disk
    ) -> None:
        self._board = board
        self._keeper = keeper
        self._ownership = ownership
        self._run_dir = run_dir
        self._disk = disk
        self._next_retry: float | None = None
        self._told = False
        self._unreadable = 0

    def tell_damage(self, found: list[Damage]) -> None:
        """What of the old journal could not be read. A torn tail is what a crash leaves and no news."""
        for damage in found:
            log.warning("%s", damage)
            if not damage.torn:
                self._board.anomaly("journal", f"{damage}; the rest of the history is whole", "warning", _DAMAGED)

    def tick(self, now: float) -> None:
        """Look, and try again what fails."""
        self._tell_unreadable()
        if self._keeper.deleted():
            self._board.info_gone()  # it went with the journal
        trouble = self._keeper.problem is not None or not self._board.info_written or not self._ownership.registered
        if trouble and self._next_retry is None:
            self._next_retry = now + RETRY_S
        elif trouble and self._next_retry is not None and now >= self._next_retry:
            self._next_retry = now + RETRY_S
            self._retry()
        elif not trouble:
            self._next_retry = None
        problem = self._keeper.problem
        if problem is not None and not self._told:
            self._told = True
            self._board.anomaly(
                "journal",
                f"the journal cannot be written ({problem}): history since now is only in the hub's memory and goes "
                f"with it; training goes on. Make {self._run_dir.path} writable, with room: the hub tries again",
                "error",
                _NOT_WRITTEN,
            )
        elif problem is None and self._told:
            self._told = False
            missing = self._keeper.lost or "no"
            text = f"the journal is written again; {missing} messages are missing"
            self._board.anomaly("journal", text, "good", _NOT_WRITTEN)

    def _tell_unreadable(self) -> None:
        """Packed blocks that decayed on disk after they were written are only found when somebody asks for them."""
        unreadable = self._board.unreadable_blocks
        if unreadable > self._unreadable:
            self._board.anomaly(
                "journal",
                f"{unreadable} blocks of the journal cannot be read any more: their values are missing in charts and "
                "history. Is the disk failing? The rest is whole",
                "error",
                _NOT_READ,
            )
        self._unreadable = max(unreadable, self._unreadable)

    def _retry(self) -> None:
        try:
            self._disk.do(self._run_dir.create)
            self._disk.do(self._ownership.register)
        except DiskHangs:
            return  # that is the lookout's to tell
        except OSError as error:
            log.warning("the run's directory cannot be written: %s", error)
            return
        self._keeper.retry()
        self._board.write_info()
