"""The newest value of each metric at a boundary: also of those that the sender has not come to yet."""

import contextlib

import numpy as np

from trainctl.trainer.buffer import NotANumber, Rewind, StepMark
from trainctl.trainer.core import Core


def newest_metrics(core: Core) -> dict[str, float]:
    """For rank 0's training thread. A device's value counts once the sender has read it, for waiting would stop the
    device; `on_their_way` names those."""
    waiting = core.buffer.waiting()  # before what the sender has merged, so that nothing is missed in between
    found = dict(core.last_metrics)
    for entry in waiting:
        if isinstance(entry, Rewind):
            found = dict(entry.metrics)
        elif not isinstance(entry, StepMark):
            for name, value in list(entry[1].items()):  # at once: the sender may take some away
                if type(value) in {float, int, bool} or isinstance(value, np.number):
                    with contextlib.suppress(OverflowError, TypeError):  # too large, or complex
                        found[name] = float(value)
    return found


def on_their_way(core: Core) -> set[str]:
    """The metrics of which a newer value than the newest known one is still on its device."""
    found: set[str] = set()
    for entry in core.buffer.waiting():
        if isinstance(entry, Rewind):
            found = set()
        elif not isinstance(entry, StepMark):
            for name, value in list(entry[1].items()):
                (found.add if entry[2] and isinstance(value, NotANumber) else found.discard)(name)
    return found
