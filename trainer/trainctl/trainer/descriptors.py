"""The sockets that torch opens for us at attach, so that a forked DataLoader worker can let go of them.

A worker that is forked holds every socket of its rank. When the rank is killed, those that it holds stay open: the port
of our gloo group's listener stays taken, and the other ranks and the job's store see no end of the connection. torch
has no call to close them, so they are found by comparing the process's descriptors before and after, and in the child
`/dev/null` is put in their place: whatever destructor runs there finds an open descriptor, and disturbs nobody.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path


class OwnSockets:
    """Sockets by number and inode: a number that was closed and given to something else is left alone."""

    def __init__(self) -> None:
        self._own: dict[int, int] = {}

    @contextlib.contextmanager
    def opening(self, *, to_port: int | None = None) -> Iterator[None]:
        """What opens in here is ours. Keep it short: a socket that another thread opens meanwhile counts, too.

        While training runs, other threads do; give the port that ours is connected `to_port`, and others stay theirs.
        """
        before = _sockets()
        try:
            yield
        finally:
            opened = {number: inode for number, inode in _sockets().items() if before.get(number) != inode}
            self._own |= {
                number: inode for number, inode in opened.items() if to_port is None or _port_of_peer(number) == to_port
            }

    def let_go(self) -> None:
        """In a forked child: close our sockets here, which leaves the parent's as they are."""
        open_here = _sockets()
        numbers = [number for number, inode in self._own.items() if open_here.get(number) == inode]
        self._own.clear()
        if not numbers:
            return
        with contextlib.suppress(OSError):  # no descriptor is free: the worker would fail anyway
            nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            for number in numbers:
                os.dup2(nothing, number, inheritable=False)
            os.close(nothing)


def _sockets() -> dict[int, int]:
    """Inodes of this process's sockets, by descriptor."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError):  # no /proc: then nothing is known to be ours
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # the listing's own, or closed meanwhile
                about = os.fstat(int(entry.name))
                if stat.S_ISSOCK(about.st_mode):
                    found[int(entry.name)] = about.st_ino
    return found


def _port_of_peer(number: int) -> int | None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as same:
        peer = same.getpeername()
        return int(peer[1]) if isinstance(peer, tuple) else None  # no tuple: a path
    return None
