"""The hub's end of the link: an AF_UNIX SOCK_SEQPACKET socket, one MessagePack message a packet."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
from collections import deque
from pathlib import Path

from trainctl.wire import codec
from trainctl.wire.messages import FromRank, LinkRecord, Rows, ToRank

log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("3i")
_FAIRNESS = 64
_UNSENT_LIMIT = 10_000


class LinkTaken(Exception):
    """Another hub of this run answers on this machine."""


class RankLink:
    """One connection from rank 0."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._buffer = bytearray(codec.DATA_LIMIT)
        self._decode = codec.from_rank_decoder()
        self._unsent: deque[bytes] = deque()
        self.received = 0  # how often a packet was waited for
        self._misfits = 0
        self._dead: asyncio.Event | None = None
        self._pidfd = -1
        self.closed = False

    @property
    def refused(self) -> int:
        """Packets that were no messages."""
        return self._decode.refused + self._misfits

    def peer(self) -> tuple[int, int]:
        """Process and user at the other end, as the kernel says."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(raw)
        return pid, uid

    async def receive(self) -> FromRank | None:
        """The next message, or None when the other end closed. Packets that are no messages are counted and skipped."""
        loop = asyncio.get_running_loop()
        while not self.closed:
            self.received += 1
            if self.received % _FAIRNESS == 0:
                await asyncio.sleep(0)  # reading what is there never suspends, and others want to run
            try:
                size = await loop.sock_recv_into(self._socket, self._buffer)
            except ConnectionResetError:
                continue  # it died with our packets unread: its own last ones are still to be read
            except OSError as error:
                log.warning("the link broke: %s", error)
                return None
            if size == 0:
                return None
            if (message := self._read(memoryview(self._buffer)[:size])) is not None:
                return message
        return None

    def _read(self, packet: memoryview) -> FromRank | None:
        """The message in a packet, or None where it is none."""
        try:
            message: FromRank = self._decode(packet)  # type: ignore[assignment]
            if isinstance(message, LinkRecord) and isinstance(message.body, Rows):
                self._check(message.body)
        except codec.DecodeError as error:
            if self.refused & (self.refused - 1) == 0:  # the 1st, 2nd, 4th, 8th: whoever sends garbage fills no disk
                log.warning("rank 0 sent what is no message, %d so far: %r", self.refused, str(error))
            return None
        return message

    def _check(self, rows: Rows) -> None:
        """Raises `DecodeError` for rows that every reader of the journal would stumble over."""
        if len(rows.steps) != len(rows.times):
            self._misfits += 1
            raise codec.DecodeError(f"{len(rows.steps)} steps have {len(rows.times)} times")

    def send(self, message: ToRank) -> None:
        """Send, now or as soon as rank 0 reads; never waits."""
        if self.closed:
            return
        if len(self._unsent) >= _UNSENT_LIMIT:
            log.warning("rank 0 does not read its link: %s is dropped", type(message).__name__)
            return
        self._unsent.append(codec.encode(message))
        self._flush()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._unsent:
            try:
                self._socket.send(self._unsent[0])
            except BlockingIOError:
                loop.add_writer(self._socket, self._flush)
                return
            except OSError:
                self._unsent.clear()  # it is gone; the reader notices
                break
            self._unsent.popleft()
        loop.remove_writer(self._socket)

    def watch(self, pid: int) -> asyncio.Event | None:
        """An event that is set when process `pid` ends, or None where that cannot be watched."""
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno != errno.ESRCH:
                log.warning("process %d cannot be watched: %s", pid, error)
                return None
            ended = asyncio.Event()
            ended.set()
            return ended
        self._dead = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._pidfd, self._dead.set)
        return self._dead

    def stop_watching(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            loop = asyncio.get_running_loop()
            loop.remove_writer(self._socket)
            loop.remove_reader(self._socket)
            self._socket.close()


class LinkListener:
    """Waits for rank 0 at the run's own path."""

    def __init__(self, path: Path) -> None:
        """Raises `LinkTaken` where a hub answers there, OSError where nothing can be bound."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if _answers(path):
                raise LinkTaken(f"another hub answers at {path}")
            path.unlink(missing_ok=True)
            self._socket.bind(str(path))
            path.chmod(0o600)
            self._socket.listen(8)
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self._inode = path.stat().st_ino

    async def accept(self) -> RankLink:
        """The next connection from a process of our own user; others are turned away."""
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._socket)
            link = RankLink(connection)
            pid, uid = link.peer()
            if uid == os.getuid():
                return link
            log.warning("process %d of user %d was turned away from the link", pid, uid)
            link.close()

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(OSError):  # it may have been removed with its directory
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()


def _answers(path: Path) -> bool:
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    probe.settimeout(1.0)
    try:
        probe.connect(str(path))
    except OSError as error:
        # A full backlog is a live hub that is busy.
        return error.errno == errno.EAGAIN or isinstance(error, TimeoutError)
    finally:
        probe.close()
    return True


class RankLine:
    """The way to rank 0, while there is one."""

    def __init__(self) -> None:
        self.link: RankLink | None = None
        self.attempt = 0

    @property
    def linked(self) -> bool:
        return self.link is not None

    def send(self, message: ToRank) -> bool:
        """Send to rank 0; false where there is none."""
        if self.link is None:
            return False
        self.link.send(message)
        return True
