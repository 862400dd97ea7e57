"""A real agent in a process of its own, and real processes that pose as ranks."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trainctl.wire.cards import read_cards
from trainctl.wire.follower import Follower
from trainctl.wire.keys import source_keys, user_keys
from trainctl.wire.messages import Card, Envelope, NodeReading, Nodes, NodesRequest
from trainctl.wire.peer import Peer
from trainctl.wire.places import Place, process_started, write_place
from waiting import until


class Agent:
    """Started by `agent`; `stderr` is what it has said so far."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, job: str) -> None:
        self.process = process
        self.job = job
        self._log = log

    @property
    def stderr(self) -> str:
        return self._log.read_text()

    @property
    def card(self) -> Card:
        return until(self._find_card, 15, what=f"the card of the agent of {self.job}; it said: {self.stderr}")

    def _find_card(self) -> Card | None:
        assert self.process.poll() is None, self.stderr
        return next((card for card in read_cards() if card.pid == self.process.pid), None)

    def wait(self, timeout_s: float = 15) -> int:
        return self.process.wait(timeout_s)

    def reads(self, wanted: Callable[[NodeReading], object] = bool, timeout_s: float = 15) -> NodeReading:
        """The first latest reading, as the agent answers when asked, that is `wanted`."""

        async def ask() -> NodeReading:
            peer = await self.connect()
            try:
                while True:
                    (latest,) = (await peer.ask(NodesRequest(req=0), Nodes)).nodes
                    if wanted(latest):
                        return latest
                    await asyncio.sleep(0.02)
            finally:
                peer.close()

        return self._within(timeout_s, ask())

    def publishes(
        self, wanted: Callable[[NodeReading], object], *, after: Callable[[], object], timeout_s: float = 15
    ) -> NodeReading:
        """The first published reading that is `wanted` once a follower is in place and `after` was done."""

        async def follow() -> NodeReading:
            peer = await self.connect()
            done = False
            try:
                async for item in Follower(peer, ("nodes",), snapshot=False).items():
                    if not done:
                        done = bool(after()) or True
                    if isinstance(item, Envelope) and isinstance(item.body, NodeReading) and wanted(item.body):
                        return item.body
            finally:
                peer.close()
            raise AssertionError("the follower ended")

        return self._within(timeout_s, follow())

    def _within(self, timeout_s: float, work: Awaitable[NodeReading]) -> NodeReading:
        async def bounded() -> NodeReading:
            async with asyncio.timeout(timeout_s):
                return await work

        try:
            return asyncio.run(bounded())
        except TimeoutError:
            raise AssertionError(f"no such reading within {timeout_s} s; it said: {self.stderr}") from None

    async def connect(self) -> Peer:
        return await Peer.connect(self.card.addresses[:1], source_keys().public, user_keys())


@contextmanager
def agent(
    tmp_path: Path, *options: str, job: str = "job-1", environment: Mapping[str, str] | None = None
) -> Iterator[Agent]:
    """Run an agent on the loopback interface; it is asked to end, and must, when the block is left."""
    log = tmp_path / f"agent-{len(list(tmp_path.glob('agent-*.log')))}.log"
    command = [sys.executable, "-P", "-m", "trainctl.agent", "--job", job, "--bind", "127.0.0.1", *options]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env=os.environ | dict(environment or {}))
    try:
        yield Agent(process, log, job)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
            raise


class Rank:
    """A process that does nothing, announced as a rank."""

    def __init__(self, job: str = "job-1", rank: int = 0, environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(["sleep", "600"], env=os.environ | dict(environment or {}))
        self.place = Place(
            run_id=job,
            run="test",
            rank=rank,
            local_rank=rank,
            pid=self.process.pid,
            started=process_started(self.process.pid),
            attempt=1,
        )
        self.file = write_place(self.place)

    def kill(self) -> None:
        """Die; the process stays a zombie, as under a launcher that has not noticed yet."""
        os.kill(self.process.pid, signal.SIGKILL)

    def end_well(self) -> None:
        self.file.unlink()
        self.reap()

    def reap(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextmanager
def ranks(count: int, job: str = "job-1", environment: Mapping[str, str] | None = None) -> Iterator[list[Rank]]:
    started = [Rank(job, number, environment) for number in range(count)]
    try:
        yield started
    finally:
        for rank in started:
            rank.reap()
