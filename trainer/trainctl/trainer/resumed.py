"""Between a resume and the first batch: what the script tracks only then is restored as it is tracked.

Each rank does that by itself, out of the checkpoint that all ranks verified together at the resume: a script may track
something on one rank only, so nothing in here may wait for another rank.
"""

import dataclasses
import logging

from trainctl.trainer.checkpoint import Loaded
from trainctl.trainer.checkpoint.load import left_out
from trainctl.trainer.checkpoint.restore import restore_tracked
from trainctl.trainer.checkpoint.rng import capture_rng, restore_rng
from trainctl.trainer.core import Core
from trainctl.trainer.data_place import open_data

log = logging.getLogger(__name__)


class Resumed:
    """What a committed checkpoint still holds for the script, until training begins again."""

    def __init__(self, core: Core, loaded: Loaded, *, skip: int = 0) -> None:
        """`skip`: micro-batches of each rank that a rollback to this checkpoint left out, and are left out again."""
        self._core = core
        self._skip = skip
        # What was committed is let go: it is as large as the state itself.
        self._loaded = dataclasses.replace(loaded, shared={}, tensors={})
        self._restored = False

    def tell_notes(self) -> None:
        """What is not as it was, to the log and to the operator. What is not tracked yet may be so before the loop."""
        untracked = {left_out(name) for name in self._loaded.later}
        for text in self._loaded.notes:
            if text not in untracked:
                self.tell(text)

    def restore(self, name: str) -> None:
        """Give what is tracked under `name` its state. Raises `CheckpointError` where that cannot be read any more."""
        checkpointer = self._core.checkpointer
        assert checkpointer is not None
        if restore_tracked(self._loaded, name, checkpointer.state.tracked[name]):
            self._restored = True
        else:
            self.tell(f"tracked.{name} is not in the checkpoint and stays as it is")
        self._loaded.restore_rng()  # taking a state may draw

    def begin(self, *, drawn: bool = False) -> None:
        """The loop begins. The data are opened anew where the loader may read what was tracked (a curriculum).

        The random state is the checkpoint's then, whatever the script seeded or drew meanwhile; unless a step has
        `drawn` from it already, which would draw the same numbers twice.
        """
        checkpointer, feed = self._core.checkpointer, self._core.feed
        assert checkpointer is not None
        tracked = {f"tracked.{name}" for name in checkpointer.state.tracked}
        for name in self._loaded.later.keys() - tracked:
            self.tell(left_out(name))
        own = capture_rng()
        if self._restored and feed is not None and (place := self._loaded.value("loader")) is not None:
            feed.load_state_dict(place)
            open_data(feed, self._loaded, skip=self._skip)
        restore_rng(own)
        if not drawn:
            self._loaded.restore_rng()

    def tell(self, text: str) -> None:
        """Say to the log and to the operator what is, or is not, as it was."""
        core = self._core
        if core.place.leads:
            log.warning("trainctl: resumed from %s: %s", self._loaded.id, text)
            core.note("resume", f"{self._loaded.id}: {text}")
