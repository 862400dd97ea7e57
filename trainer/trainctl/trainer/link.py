"""Rank 0's end of the link to the hub: one AF_UNIX SOCK_SEQPACKET socket that never blocks, and the hub's process.

What was not acknowledged as written to disk is kept for a minute, in bounded memory, and sent again to a hub that came
back. A hub that is frozen for longer, or under a run that logs more than the memory holds, loses the oldest, counted.
"""

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

from trainctl.trainer.forks import no_fork
from trainctl.trainer.packets import halves
from trainctl.wire import codec
from trainctl.wire.messages import (
    Event,
    FromRank,
    LinkAck,
    LinkHello,
    LinkRecord,
    LinkWelcome,
    Ranks,
    Rows,
    ToRank,
)
from trainctl.wire.paths import link_socket
from trainctl.wire.rundir import RunDir

log = logging.getLogger(__name__)

KEEP_S = 60.0
# Of the memory that is free when the link is made a fiftieth, within these: a minute of 4 MB/s of encoded rows at most.
KEEP_BYTES = (64 * 1024 * 1024, 256 * 1024 * 1024)
_KEEP_SHARE = 50
_SEND_BUFFER = 4 * 1024 * 1024
_PACKET_LIMIT = 128 * 1024  # a larger packet may not fit the socket's buffer at all, and would never be sent
_RECEIVE = codec.DATA_LIMIT
_RESPAWN_S = (0.2, 10.0)
_DOUBTFUL_LIMIT = 50_000  # beyond it they are counted together


class HubProcess:
    """The hub as a child in a session of its own: it outlives this process, and is started again when it dies."""

    def __init__(self, *, run_id: str, name: str, directory: Path) -> None:
        self._command = [sys.executable, "-P", "-m", "trainctl.hub"]
        self._command += ["--run-dir", str(directory), "--run-id", run_id, "--name", name]
        self._log = RunDir(directory).hub_log
        self._child: subprocess.Popen[bytes] | None = None
        self._next_start = 0.0
        self._pause_s = _RESPAWN_S[0]

    def ensure(self, now: float) -> None:
        """Start the hub unless ours lives or was started a moment ago. Raises OSError."""
        if self._child is not None and self._child.poll() is None:
            return
        if now < self._next_start:
            return
        self._next_start = now + self._pause_s
        self._pause_s = min(self._pause_s * 2, _RESPAWN_S[1])
        with no_fork(), contextlib.ExitStack() as stack:
            output: int | object = subprocess.DEVNULL
            with contextlib.suppress(OSError):  # a read-only run directory must not keep the hub from running
                output = stack.enter_context(self._log.open("ab"))
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,  # type: ignore[arg-type]
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"TRAINCTL_HUB": "1"},
            )

    def settled(self) -> None:
        """The hub answers: start it at once the next time."""
        self._pause_s = _RESPAWN_S[0]

    def reap(self) -> None:
        if self._child is not None:
            self._child.poll()


def keep_bytes() -> int:
    """How much memory what waits for the hub may take."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        free = 0
    return max(KEEP_BYTES[0], min(KEEP_BYTES[1], free // _KEEP_SHARE))


# A record that is not known to be on disk: (number, when it was made, how many rows or events it holds, encoded).
# Plain tuples, which the garbage collector stops looking at: a minute of them waits here.
_Kept: TypeAlias = tuple[int, float, int, bytes]


class _Note(NamedTuple):
    """The newest message of a kind that replaces itself; it goes out behind record `after`."""

    after: int
    encoded: bytes


class Link:
    """Sends numbered records and unnumbered messages to the hub. Used by the sender thread alone.

    A record is kept until the hub has it on disk, or for `keep_s`. One that was never written to the socket and is not
    kept any longer is lost, and counted. One that was written may yet be read by a hub that is only frozen: whether it
    was lost is known from what the hub has when it speaks again.
    """

    def __init__(
        self,
        *,
        run_id: str,
        hub: HubProcess,
        hello: Callable[[], LinkHello],
        keep_s: float = KEEP_S,
        keep_bytes: int = KEEP_BYTES[0],
    ) -> None:
        self._path = str(link_socket(run_id))
        self._hub = hub
        self.hello = hello
        self._keep_s = keep_s
        self._keep_bytes = keep_bytes
        self._decode = codec.to_rank_decoder()
        self._socket: socket.socket | None = None
        self._welcomed = False
        self._kept: deque[_Kept] = deque()
        self._kept_bytes = 0
        self._unsent: deque[_Kept] = deque()  # of those kept, what the socket has not taken
        # (number, weight, of it for want of memory) written, not kept, not known to have come
        self._doubtful: deque[tuple[int, int, int]] = deque()
        self._notes: dict[type, _Note] = {}
        self._next = 1
        self._written = 0  # the newest record that some connection's socket took
        self.lost = 0  # rows and events that no hub will ever have
        self.crowded = 0  # those of them that were let go before their minute was over, because memory was full
        self.packets = 0  # received
        self.oversize = 0  # the same, because no packet holds them
        self.connects = 0

    @property
    def connected(self) -> bool:
        return self._socket is not None and self._welcomed

    @property
    def newest(self) -> int:
        """The number of the newest record, 0 before the first."""
        return self._next - 1

    def on_disk(self, number: int) -> bool:
        """Whether the hub has every record up to `number` on disk, as far as they are not lost."""
        return not self._kept or self._kept[0][0] > number

    def record(self, body: Rows | Ranks | Event, now: float) -> None:
        """Number a record, keep it until the hub has it on disk, and queue it; as several where no packet holds it."""
        encoded = codec.encode(LinkRecord(link=self._next, body=body))
        weight = len(body.steps) if isinstance(body, Rows) else 1
        if len(encoded) > _PACKET_LIMIT:
            if (parts := halves(body)) is None:
                self.oversize += weight
                return
            for part in parts:
                self.record(part, now)
            return
        record = (self._next, now, weight, encoded)
        self._next += 1
        self._kept.append(record)
        self._kept_bytes += len(encoded)
        if self.connected:
            self._unsent.append(record)
        self.expire(now)

    def expire(self, now: float) -> None:
        """Let go of what was kept for long enough, whether the hub has it or not."""
        while self._kept and (now - self._kept[0][1] > self._keep_s or self._kept_bytes > self._keep_bytes):
            number, made, weight, encoded = self._kept.popleft()
            self._kept_bytes -= len(encoded)
            crowded = weight if now - made <= self._keep_s else 0
            if self._unsent and self._unsent[0][0] == number:
                self._unsent.popleft()
                self._lose_rows(weight, crowded)
            elif number <= self._written:
                if len(self._doubtful) >= _DOUBTFUL_LIMIT:
                    _, more, more_crowded = self._doubtful.pop()
                    weight, crowded = weight + more, crowded + more_crowded
                self._doubtful.append((number, weight, crowded))
            else:
                self._lose_rows(weight, crowded)

    def _lose_rows(self, weight: int, crowded: int) -> None:
        self.lost += weight
        self.crowded += crowded

    def tell(self, message: FromRank) -> None:
        """Queue a message that replaces the one of its kind before it: it is not kept for a hub that is away."""
        if self.connected:
            before = self._notes.get(type(message))
            after = before.after if before is not None else self._next - 1
            self._notes[type(message)] = _Note(after, codec.encode(message))

    def tick(self, now: float) -> list[ToRank]:
        """Connect if need be, send what fits, return what came. Never blocks, never raises."""
        self.expire(now)
        try:
            if self._socket is None:
                self._connect(now)
            received = self._receive()
            self._flush()
        except OSError as error:
            self._lose(error)
            return []
        return received

    def waiting(self) -> int:
        """Rows and events that are not known to be on disk."""
        return sum(weight for _, _, weight, _ in self._kept)

    def drained(self) -> bool:
        """Everything that was recorded is on disk."""
        return not self._kept and not self._notes

    def fileno(self) -> int:
        """For select; -1 while there is no connection."""
        return self._socket.fileno() if self._socket is not None else -1

    def left(self) -> list[tuple[int, int, bytes]]:
        """What is not known to be on disk: number, rows or events, and encoded; the last is empty where it is not kept
        any longer, and the hub has it if it reads what the socket took."""
        doubtful = [(number, weight, b"") for number, weight, _ in self._doubtful]
        return doubtful + [(number, weight, encoded) for number, _, weight, encoded in self._kept]

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self, now: float) -> None:
        with no_fork():  # a forked child closes the link that it can see
            candidate = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            candidate.setblocking(False)
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            try:
                candidate.connect(self._path)
            except OSError:
                candidate.close()
            else:
                self._socket = candidate
        if self._socket is None:
            self._hub.ensure(now)
            return
        self._welcomed = False
        self._notes = {LinkHello: _Note(0, codec.encode(self.hello()))}

    def _receive(self) -> list[ToRank]:
        received: list[ToRank] = []
        while self._socket is not None:
            try:
                packet = self._socket.recv(_RECEIVE)
            except BlockingIOError:
                break
            if not packet:
                raise ConnectionResetError("the hub closed the link")
            self.packets += 1
            try:
                message = self._decode(packet)
            except codec.DecodeError as error:
                log.warning("trainctl: the hub sent what is no message: %s", error)
                continue
            match message:
                case LinkWelcome(have=have):
                    self._resume(have)
                case LinkAck(link=link):
                    self._forget(link)
                case _:
                    received.append(message)  # type: ignore[arg-type]
        return received

    def _resume(self, have: int) -> None:
        self._welcomed = True
        self.connects += 1
        self._hub.settled()
        self._forget(have)
        # Whoever welcomes us reads no older connection any more: what was written there and is not here is lost.
        for _, weight, crowded in self._doubtful:
            self._lose_rows(weight, crowded)
        self._doubtful.clear()
        self._unsent = deque(self._kept)

    def _forget(self, link: int) -> None:
        while self._kept and self._kept[0][0] <= link:
            self._kept_bytes -= len(self._kept.popleft()[3])
        while self._doubtful and self._doubtful[0][0] <= link:
            self._doubtful.popleft()

    def _flush(self) -> None:
        while self._socket is not None:
            kind = self._due()
            if kind is not None:
                packet = self._notes[kind].encoded
            elif self._unsent:
                packet = self._unsent[0][3]
            else:
                return
            try:
                self._socket.send(packet)
            except BlockingIOError:
                return
            if kind is not None:
                del self._notes[kind]
            else:
                self._written = max(self._written, self._unsent.popleft()[0])

    def _due(self) -> type | None:
        """The kind of the note that goes before the next record, if one does."""
        waits_for = self._unsent[0][0] if self._unsent else self._next
        return next((kind for kind, note in self._notes.items() if note.after < waits_for), None)

    def _lose(self, error: OSError) -> None:
        log.info("trainctl: the link to the hub was lost: %s", error)
        self.close()
        self._welcomed = False
        self._unsent.clear()
        self._notes.clear()
        self._hub.reap()


def wait_readable(link: Link, timeout_s: float) -> None:
    """Sleep until the hub says something, or for `timeout_s`."""
    handle = link.fileno()
    if handle < 0:
        time.sleep(timeout_s)
        return
    poller = select.poll()  # not select(): a training process may hold more than 1024 descriptors
    poller.register(handle, select.POLLIN)
    poller.poll(timeout_s * 1000)
