"""The node's agent, seen from its first rank: found, or started, and started again when it dies."""

import contextlib
import fcntl
import os
import subprocess
import sys

import msgspec

from trainctl.trainer.forks import no_fork
from trainctl.wire.messages import Card, SourceAddress
from trainctl.wire.paths import cards_dir, socket_dir
from trainctl.wire.places import agent_lock

_CHECK_S = 2.0
_RESPAWN_S = 5.0


class NodeAgent:
    """Looks every two seconds whether this node has its agent."""

    def __init__(self, *, job: str, node: str) -> None:
        self._job = job
        self._node = node
        self._lock = agent_lock(job)
        self._child: subprocess.Popen[bytes] | None = None
        self._next_check = 0.0
        self._next_start = 0.0

    def ensure(self, now: float) -> None:
        """Start the agent where none lives. Raises OSError."""
        if now < self._next_check:
            return
        self._next_check = now + _CHECK_S
        if self._child is not None:
            self._child.poll()
        if now < self._next_start or self._lives():
            return
        self._next_start = now + _RESPAWN_S
        with no_fork(), (socket_dir() / "agent.log").open("ab") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "trainctl.agent", "--job", self._job, "--while-ranks"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def address(self) -> SourceAddress | None:
        """Where the agent listens, once it has said so."""
        path = cards_dir() / f"agent-{self._node}-{self._job}.json"
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            card = msgspec.json.decode(path.read_bytes(), type=Card)
            return SourceAddress(
                node=card.host, addresses=card.addresses, server_key=card.server_key, source=card.source
            )
        return None

    def _lives(self) -> bool:
        """Whether somebody holds the agent's lock."""
        with no_fork():  # a worker that inherits the handle would hold the lock for as long as it lives
            try:
                handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError:
                return False
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
            else:
                return False
            finally:
                os.close(handle)
