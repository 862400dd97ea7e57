"""The hub's log, written by a thread: hub.log lies in the run's directory too, and hangs with it."""

import logging
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Any


def log_aside() -> QueueListener:
    """Log to stderr from here on; `stop` writes what is left."""
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(logging.Formatter("%(asctime)s hub[%(process)d] %(levelname)s %(message)s"))
    waiting: SimpleQueue[Any] = SimpleQueue()
    listener = QueueListener(waiting, to_stderr)
    listener.start()
    root = logging.getLogger()
    root.addHandler(QueueHandler(waiting))
    root.setLevel(logging.INFO)
    return listener
