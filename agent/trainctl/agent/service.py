"""The agent at work: server, card, and one tick per interval that puts a reading together and publishes it."""

import asyncio
import logging
import math
import os
import signal
import socket
import time
from typing import Any, Final

from trainctl.agent.endings import end_ranks
from trainctl.agent.gpu_monitor import GpuMonitor
from trainctl.agent.gpu_watch import GpuPicture
from trainctl.agent.lifetime import Lifetime
from trainctl.agent.node_sampler import NodeSampler
from trainctl.agent.options import Options
from trainctl.agent.rank_watch import RankWatch, of_job
from trainctl.wire.cards import boot_id, own_addresses, read_cards, remove_card, write_card
from trainctl.wire.commands import Command, EndRanks
from trainctl.wire.keys import Authority, source_keys, user_keys
from trainctl.wire.messages import (
    Card,
    CommandRequest,
    NodeReading,
    Nodes,
    NodesRequest,
    RanksEnded,
    Reply,
    Request,
    RunState,
    Stream,
)
from trainctl.wire.server import Caller, Identity, Refusal, Server

log = logging.getLogger(__name__)

GPU_INTERVAL_S: Final = 1.0  # polled faster, NVML's lock gets in the way of kernels being submitted
_KEPT_READINGS: Final = 600  # for followers that missed some; more would be most of the agent's memory


class NodeAnswers:
    """Answers for the node with its latest reading, and ends ranks on it when a hub asks."""

    def __init__(self, latest: NodeReading, ranks: RankWatch) -> None:
        self.latest = latest
        self._ranks = ranks

    async def handle(self, request: Request, caller: Caller) -> Reply | None:
        match request:
            case NodesRequest():
                return Nodes(req=caller.req, nodes=[self.latest])
            case CommandRequest(command=Command(action=EndRanks() as asked)):
                return await self._end(asked, caller)
            case _:
                pass
        raise Refusal("no_run", "this is a node's agent, which knows no run", "ask the run's hub: trainctl ls")

    async def _end(self, asked: EndRanks, caller: Caller) -> RanksEnded:
        try:
            self._ranks.scan()
        except OSError as error:
            raise Refusal("no_ranks", f"the ranks on {self.latest.node} cannot be looked up: {error}") from None
        places = self._ranks.places(asked.run, asked.attempt)
        log.warning(
            "%s asks to end attempt %d of %s: %d ranks are here",
            caller.actor.name,
            asked.attempt,
            asked.run,
            len(places),
        )
        ended = await end_ranks(places, asked.grace_s)
        for rank in ended:
            log.warning("rank %d (pid %d): %s %s", rank.rank, rank.pid, rank.how, rank.reason or "")
        return RanksEnded(req=caller.req, node=self.latest.node, ranks=ended)

    def recorded(self, stream: Stream, first: int, last: int) -> list[bytes] | None:
        del stream, first, last
        return None  # an agent records nothing: the hub does

    def run_state(self) -> RunState | None:
        return None


class NodeAgent:
    """Made and run once, in one asyncio loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._node = socket.gethostname()
        self._epoch = int(time.time() * 1000)
        self._sampler = NodeSampler()
        self._gpus = GpuMonitor() if options.gpus else None
        self._gpus_asked_at = -math.inf
        self._picture = GpuPicture(state="not asked (--no-gpus)", gpus=[])  # until the first poll, if there is one
        self._ranks = RankWatch(of_job(options.job), on_death=self._publish)
        self._complaint = ""
        self._stopped = asyncio.Event()
        self._answers = NodeAnswers(
            NodeReading(node=self._node, time=time.time(), interval_s=options.interval_s), self._ranks
        )
        self._server = Server(
            identity=Identity(kind="agent", source=self.source, name=self._node, epoch=self._epoch),
            keys=source_keys(),
            authority=Authority(user_keys().public),
            handler=self._answers,
            retained=_KEPT_READINGS,
        )

    @property
    def source(self) -> str:
        return f"{self._node}-{self._options.job_name}"

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT, or the end of the ranks. Raises `InsecureServer`, zmq.ZMQError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopped.set)
        card: Card | None = None
        try:
            await self._server.start(self._options.bind, self._previous_ports())
            await self._tick()
            card = self._announce()
            await self._serve_until_stopped()
        finally:
            if card is not None:
                remove_card(card)
            self._ranks.close(bury=not self._stopped.is_set())
            if self._gpus is not None:
                await self._gpus.close()
            self._server.close()

    async def _serve_until_stopped(self) -> None:
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._server.serve()),
            asyncio.create_task(self._watch()),
            asyncio.create_task(self._stopped.wait()),
        ]
        if self._options.prometheus is not None:
            from trainctl.agent.prometheus import serve_metrics

            tasks.append(asyncio.create_task(serve_metrics(self._options.prometheus, lambda: self._answers.latest)))
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()

    async def _watch(self) -> None:
        """Tick at a steady pace, and return when an agent that came with the ranks should go."""
        loop = asyncio.get_running_loop()
        lifetime = Lifetime(loop.time(), linger_s=self._options.linger_s)
        due = loop.time()
        while not (lifetime.over(loop.time(), self._ranks.alive) and self._options.while_ranks):
            due = max(due + self._options.interval_s, loop.time())  # a tick that came late is not made up for
            await asyncio.sleep(due - loop.time())
            await self._tick()

    async def _tick(self) -> None:
        await self._ask_gpus()
        try:
            self._ranks.scan()
            complaint = ""
        except OSError as error:
            complaint = f"the ranks on this node cannot be watched: {error}"
        if complaint and complaint != self._complaint:
            log.warning("%s", complaint)
        self._complaint = complaint
        self._publish()

    async def _ask_gpus(self) -> None:
        now = time.monotonic()
        # A little early is in time: otherwise a tick that comes a millisecond early would skip a whole interval.
        if self._gpus is not None and now - self._gpus_asked_at >= 0.9 * GPU_INTERVAL_S:
            self._gpus_asked_at = now
            self._picture = await self._gpus.poll(patience_s=min(self._options.interval_s / 4, 2.0))

    def _publish(self) -> None:
        """Put a reading together from what is known now; also called at once when a rank dies."""
        sample = self._sampler.sample()
        self._answers.latest = NodeReading(
            node=self._node,
            time=time.time(),
            interval_s=self._options.interval_s,
            cpu=sample.cpu,
            load=sample.load,
            memory_used_bytes=sample.memory_used_bytes,
            memory_total_bytes=sample.memory_total_bytes,
            gpus=self._picture.gpus,
            gpu_state=self._picture.state,
            processes=self._ranks.readings,
        )
        self._server.publish(self._answers.latest)

    # --- being found

    def _previous_ports(self) -> tuple[int, int]:
        """The ports of an agent of this job that did not end well: its followers find this one there."""
        for card in read_cards():
            if card.kind == "agent" and card.source == self.source:
                _, _, port = card.addresses[0].rpartition(":") if card.addresses else ("", "", "")
                return int(port) if port.isdigit() else 0, card.publish_port
        return 0, 0

    def _announce(self) -> Card | None:
        bind = self._options.bind
        port = self._server.port
        card = Card(
            kind="agent",
            source=self.source,
            name=self._node,
            epoch=self._epoch,
            addresses=own_addresses(port) if bind == "*" else [f"tcp://{bind}:{port}"],
            publish_port=self._server.publish_port,
            server_key=source_keys().public,
            host=self._node,
            pid=os.getpid(),
            started=time.time(),
            job_id=self._options.job,
            boot_id=boot_id(),
        )
        try:
            write_card(card)
        except OSError as error:
            log.warning(
                "no card could be written (%s), so nobody finds this agent by itself: "
                "it answers at %s with server key %s, or make TRAINCTL_HOME writable",
                error,
                card.addresses[0],
                card.server_key,
            )
            return None
        return card


async def run_agent(options: Options) -> None:
    """Run an agent to its end. Raises what `NodeAgent.run` raises, and `UnsafePath` where keys are not private."""
    await NodeAgent(options).run()
