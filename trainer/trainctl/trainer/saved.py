"""What a finished save means: the checkpoint's own event, and the outcome of the command that asked for it."""

import logging
import threading
import time
from typing import Final

from trainctl.trainer.core import Core, RunningSave
from trainctl.trainer.outcomes import update_of
from trainctl.wire.commands import Command
from trainctl.wire.manifest import pin
from trainctl.wire.messages import CheckpointSaved, Event
from trainctl.wire.rundir import RunDir

log = logging.getLogger(__name__)

_PATIENCE_S: Final = 0.2


class Saved:
    """A save that is done. The mark of a pinned one is made beside the sender, which a file server must not stop."""

    def __init__(self, core: Core, save: RunningSave) -> None:
        self._core = core
        self._save = save
        self._pinned = False
        self._pinning: threading.Thread | None = None
        wanted = isinstance(save.command, Command) and getattr(save.command.action, "pin", False)
        if wanted and save.pending.result().error is None:
            self._pinning = threading.Thread(target=self._pin, name="trainctl-pin", daemon=True)
            self._pinning.start()
            self._pinning.join(_PATIENCE_S)

    @property
    def settled(self) -> bool:
        """Whether it is known if it is pinned."""
        return self._pinning is None or not self._pinning.is_alive()

    def events(self) -> list[Event]:
        """What is to be told once it is settled."""
        return _events(self._core, self._save, pinned=self._pinned)

    def _pin(self) -> None:
        save = self._save
        try:
            pin(RunDir(self._core.identity.directory).checkpoints / save.id, pinned=True)
            self._pinned = True
        except OSError as error:
            log.warning("trainctl: checkpoint %s was saved and could not be pinned: %s", save.id, error)


def _events(core: Core, save: RunningSave, *, pinned: bool) -> list[Event]:
    result = save.pending.result()
    saved = CheckpointSaved(
        time=time.time(),
        step=save.step,
        incarnation=save.incarnation,
        id=save.id,
        bytes=result.bytes,
        stall_s=result.stall_s,
        write_s=result.write_s,
        metrics=save.metrics,
        pinned=pinned,
        note=save.note,
        error=result.error,
    )
    events: list[Event] = [saved]
    if save.command is not None:
        state, after = ("failed", None) if result.error else ("applied", save.id)
        events.append(
            update_of(
                save.command,
                save.actor,
                state,
                save.step,
                core.boundary,
                save.incarnation,
                core.place.world_size,
                after=after,
                reason=result.error,
            )
        )
    return events
