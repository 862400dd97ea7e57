"""What the hub's tests stand on: a real hub process, and a rank 0 that speaks the link and trains nothing."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from trainctl.wire import codec
from trainctl.wire.cards import read_cards
from trainctl.wire.commands import Action, Command
from trainctl.wire.follower import Follower, Item
from trainctl.wire.keys import KeyPair, user_keys
from trainctl.wire.messages import (
    Card,
    Column,
    CommandReply,
    CommandRequest,
    CommandUpdate,
    FromRank,
    LinkBye,
    LinkHello,
    LinkProgress,
    LinkRecord,
    LinkWelcome,
    Rows,
    RunInfo,
    RunState,
    Snapshot,
    SnapshotRequest,
    ToRank,
    Tunable,
)
from trainctl.wire.paths import link_socket
from trainctl.wire.peer import Peer, PeerError
from waiting import until

M = TypeVar("M")
RUN = "demo-1"
CAPABILITIES: dict[str, bool | str] = {
    "pause": True,
    "lr": True,
    "set": True,
    "checkpoint": True,
    "rollback": True,
    "stop": True,
    "eval": "no on_eval was given to attach",
}


class HubProcess:
    """`python -m trainctl.hub` for one run."""

    def __init__(
        self,
        run_dir: Path,
        *,
        linger_s: float = 30.0,
        env: dict[str, str] | None = None,
        program: Sequence[str] = ("-P", "-m", "trainctl.hub"),
    ) -> None:
        self.log = run_dir.parent / "hub-test.log"
        command = [sys.executable, *program, "--run-dir", str(run_dir), "--run-id", RUN]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "--name", "demo", "--linger-s", str(linger_s)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | (env or {}),
            )

    def card(self) -> Card:
        """The card of this very process."""

        def find() -> Card | None:
            if self.process.poll() is not None:
                raise AssertionError(f"the hub left with {self.process.returncode}:\n{self.log.read_text()}")
            return next((card for card in read_cards() if card.pid == self.process.pid), None)

        card = until(find, 15, what="the hub's card")
        assert card is not None
        return card

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()


@contextlib.contextmanager
def hub_running(
    run_dir: Path,
    *,
    linger_s: float = 30.0,
    env: dict[str, str] | None = None,
    program: Sequence[str] = ("-P", "-m", "trainctl.hub"),
) -> Iterator[HubProcess]:
    hub = HubProcess(run_dir, linger_s=linger_s, env=env, program=program)
    try:
        hub.card()
        yield hub
    finally:
        hub.close()


def info(run_dir: Path, *, attempt: int = 1, world_size: int = 2) -> RunInfo:
    return RunInfo(
        run="demo",
        id=RUN,
        dir=str(run_dir),
        host="host-a",
        created=1000.0,
        started=1000.0,
        world_size=world_size,
        attempt=attempt,
        total_steps=500,
        capabilities=CAPABILITIES,
        tunables=[Tunable(name="clip", value=1.0, kind="float", minimum=0.1, maximum=10.0)],
    )


def rows(*steps: int, incarnation: int = 1, **metrics: list[float]) -> Rows:
    columns = [
        Column(name=name, dtype="f8", data=np.array(values, "<f8").tobytes())
        for name, values in (metrics or {"loss": [1.0 / step for step in steps]}).items()
    ]
    times = [1000.0 + step for step in steps]
    return Rows(attempt=1, incarnation=incarnation, steps=list(steps), times=times, columns=columns)


def progress(step: int, state: str = "running", **more: object) -> RunState:
    made = {"state": state, "since": 1000.0, "step": step, "step_time": time.time(), "total_steps": 500} | more
    return msgspec.convert(made, RunState)


class Rank:
    """Rank 0's end of the link, by hand. `pid` is the process whose death counts, ours unless told."""

    def __init__(self, run_dir: Path, *, pid: int | None = None, attempt: int = 1) -> None:
        self._run_dir = run_dir
        self._pid = os.getpid() if pid is None else pid
        self._attempt = attempt
        self._decode = codec.to_rank_decoder()
        self.sent = 0
        self.have = -1
        self.socket: socket.socket

    def connect(self, *, step: int = 0, incarnation: int = 1, parent: int | None = None) -> LinkWelcome:
        def dial() -> socket.socket | None:
            candidate = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                candidate.connect(str(link_socket(RUN)))
            except OSError:
                candidate.close()
                return None
            return candidate

        found = until(dial, 10, what="the hub's link")
        assert found is not None
        self.socket = found
        made = info(self._run_dir, attempt=self._attempt)
        self.say(LinkHello(info=made, incarnation=incarnation, step=step, pid=self._pid, parent=parent))
        welcome = self.hear(LinkWelcome)
        self.have = welcome.have
        return welcome

    def say(self, message: FromRank) -> None:
        self.socket.send(codec.encode(message))

    def record(self, body: object, link: int | None = None) -> int:
        """Send a record with the next number, or with the given one; return its number."""
        if link is None:
            self.sent += 1
            link = self.sent
        self.say(LinkRecord(link=link, body=body))  # type: ignore[arg-type]
        return link

    def step(self, step: int, state: str = "running", **more: object) -> None:
        self.say(LinkProgress(run=progress(step, state, **more)))

    def bye(self, state: str = "finished", step: int = 500) -> None:
        self.say(LinkBye(state=state, step=step))  # type: ignore[arg-type]

    def hear(self, wanted: type[M], timeout_s: float = 10.0) -> M:
        """The next message of a type; others are passed over."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            packet = self.socket.recv(codec.DATA_LIMIT)
            assert packet, "the hub closed the link"
            message = self._decode(packet)
            if isinstance(message, wanted):
                return message

    def answer(self, command: ToRank, state: str, **more: object) -> None:
        """Tell the outcome of a LinkCommand."""
        self.record(update_for(command, state, **more))

    def close(self) -> None:
        self.socket.close()


def update_for(message: ToRank, state: str, **more: object) -> CommandUpdate:
    made = {
        "time": time.time(),
        "step": 7,
        "incarnation": 1,
        "id": message.command.id,  # type: ignore[union-attr]
        "command": str(message.command.action.__struct_config__.tag),  # type: ignore[union-attr]
        "args": {},
        "actor": message.actor,  # type: ignore[union-attr]
        "state": state,
    }
    return msgspec.convert(made | more, CommandUpdate)


@contextlib.contextmanager
def rank_linked(run_dir: Path, **more: object) -> Iterator[Rank]:
    rank = Rank(run_dir, **more)  # type: ignore[arg-type]
    rank.connect()
    try:
        yield rank
    finally:
        rank.close()


@contextlib.asynccontextmanager
async def peer_of(card: Card, *, timeout_s: float = 10.0, keys: KeyPair | None = None) -> AsyncIterator[Peer]:
    """A client of this user, or of whoever has `keys`, as soon as the hub answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            peer = await Peer.connect(card.addresses[:1], card.server_key, keys or user_keys(), timeout_s=1.0)
            break
        except PeerError:
            assert time.monotonic() < deadline, "the hub does not answer"
    try:
        yield peer
    finally:
        peer.close()


async def snapshot(peer: Peer) -> Snapshot:
    return await peer.ask(SnapshotRequest(req=0), Snapshot)


async def snapshot_when(peer: Peer, condition: Callable[[Snapshot], object], timeout_s: float = 10.0) -> Snapshot:
    """The first snapshot for which the condition holds."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = await snapshot(peer)
        if condition(found):
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s, the last one was {found}"
        await asyncio.sleep(0.02)


class Heard:
    """A follower at work: collects what it hears from its snapshot on."""

    def __init__(self, peer: Peer) -> None:
        self.items: list[Item] = []
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._follow(peer))

    async def _follow(self, peer: Peer) -> None:
        async for item in Follower(peer).items():
            self.items.append(item)
            self._news.set()

    async def until(self, condition: Callable[[Item], object], timeout_s: float = 10.0) -> Item:
        """The first item heard, so far or from now on, for which the condition holds."""
        at = 0
        async with asyncio.timeout(timeout_s):
            while True:
                for item in self.items[at:]:
                    at += 1
                    if condition(item):
                        return item
                if self._task.done():
                    self._task.result()
                self._news.clear()
                await self._news.wait()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@contextlib.asynccontextmanager
async def following(peer: Peer) -> AsyncIterator[Heard]:
    """A follower that has its snapshot."""
    heard = Heard(peer)
    try:
        await heard.until(lambda item: isinstance(item, Snapshot))
        yield heard
    finally:
        await heard.close()


def request(action: Action, command_id: str, **more: object) -> CommandRequest:
    return CommandRequest(req=0, command=Command(id=command_id, action=action, **more))  # type: ignore[arg-type]


async def first_reply(peer: Peer, asked: CommandRequest) -> CommandUpdate:
    return (await peer.ask(asked, CommandReply)).update
