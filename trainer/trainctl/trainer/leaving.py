"""The end of a run that the hub did not hear to the end: what is left goes into the run's directory."""

import logging
import time
from pathlib import Path

from trainctl.trainer.link import Link
from trainctl.wire.left_behind import Head, leave
from trainctl.wire.messages import LinkBye, RunState

log = logging.getLogger(__name__)


def leave_behind(link: Link, directory: Path, *, run: RunState, bye: LinkBye) -> None:
    """Write down how the run ended, and what the hub did not take. Never raises what a disk does.

    A disk that has no room for the rows may have some for the ending, and for how many rows there were.
    """
    left = link.left()
    doubtful = [(number, weight) for number, weight, encoded in left if not encoded]
    head = Head(hello=link.hello(), run=run, bye=bye, time=time.time(), doubtful=doubtful)
    count = link.waiting()
    missed = f"did not take the last {count} rows and events" if count else "was not told of the run's end"
    said = f"trainctl: the hub {missed} before this process ended"
    try:
        path = leave(directory, head, (encoded for _, _, encoded in left if encoded))
    except OSError as error:
        log.warning("%s; the rest cannot be kept in %s (%s): the hub has what the link holds", said, directory, error)
    else:
        log.warning("%s: %s has the rest, for the hub and for whoever opens the run's directory", said, path)
        return
    every = [(number, weight) for number, weight, _ in left]
    alone = Head(hello=head.hello, run=run, bye=bye, time=head.time, doubtful=every)
    try:
        leave(directory, alone, ())
    except OSError:
        log.warning("trainctl: nor can it be written down how the run ended: it may be told as lost")
