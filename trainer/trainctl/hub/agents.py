"""Follows the agents of the run's nodes and relays what they read into the run's own stream."""

import asyncio
import time
from collections.abc import Callable

from trainctl.hub.awake import PULSE_S, AwakeClock
from trainctl.wire.cards import read_cards
from trainctl.wire.follower import STALE_AFTER_S, Follower, SourceGone
from trainctl.wire.keys import KeyPair
from trainctl.wire.messages import Envelope, NodeChanged, NodeReading, RunState, SourceAddress
from trainctl.wire.peer import Peer, PeerError, Unreachable

_BACKOFF_S = (0.5, 5.0)
_TOLD_S = 5.0  # rank 0 looks for the agents every two seconds, and one that starts takes as long
_LOOK_S = 0.1


class AgentRelay:
    """One task for each agent. `take` records a body, `state` says where the run is.

    An agent is lost when this hub has not heard it for 3 s in which it could have: a hub that is stopped or starved
    hears nobody.
    """

    def __init__(
        self, *, keys: KeyPair, take: Callable[[NodeReading | NodeChanged], object], state: Callable[[], RunState]
    ) -> None:
        self._keys = keys
        self._take = take
        self._state = state
        self._tasks: dict[str, tuple[SourceAddress, asyncio.Task[None]]] = {}
        self._clock = AwakeClock(time.monotonic())
        self._pulse: asyncio.Task[None] | None = None

    def follow(self, agents: list[SourceAddress]) -> None:
        """These are the run's agents now: begin, go on or leave accordingly.

        An empty list is what rank 0 tells when it cannot read the job's store: those that are known stay.
        """
        if not agents:
            return
        if self._pulse is None:
            self._pulse = asyncio.create_task(self._pulse_for_ever())
        wanted = {agent.source or agent.node: agent for agent in agents}
        for source, (address, task) in list(self._tasks.items()):
            if wanted.get(source) != address:
                task.cancel()
                del self._tasks[source]
        for source, agent in wanted.items():
            if source not in self._tasks:
                self._tasks[source] = (agent, asyncio.create_task(self._one(agent)))

    async def connect(self, node: str) -> Peer:
        """A connection to a node's agent, for one question; the caller closes it. Raises `PeerError`, ValueError.

        One that rank 0 has not told of yet is waited for: an attempt, or this hub, may just have begun.
        """
        deadline = time.monotonic() + _TOLD_S
        while (agent := self._of(node)) is None:
            if time.monotonic() >= deadline:
                raise Unreachable("none was ever told of to this hub")
            await asyncio.sleep(_LOOK_S)
        return await Peer.connect(*_newest_address(agent), self._keys, name="hub", timeout_s=STALE_AFTER_S)

    def _of(self, node: str) -> SourceAddress | None:
        return next((agent for agent, _ in self._tasks.values() if agent.node == node), None)

    async def close(self) -> None:
        tasks = [task for _, task in self._tasks.values()]
        tasks += [self._pulse] if self._pulse is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pulse_for_ever(self) -> None:
        while True:
            self._clock.pulse(time.monotonic())
            await asyncio.sleep(PULSE_S)

    def _now(self) -> float:
        return self._clock.at(time.monotonic())

    async def _one(self, agent: SourceAddress) -> None:
        watch = _Watch(agent.node, self._now())
        backoff_s = _BACKOFF_S[0]
        while True:
            heard_before = watch.heard_at
            try:
                await self._read(agent, watch)
            except (PeerError, SourceGone, ValueError) as error:
                if watch.silent(self._now()):
                    self._lost(watch, str(error))
            backoff_s = _BACKOFF_S[0] if watch.heard_at > heard_before else min(2 * backoff_s, _BACKOFF_S[1])
            await asyncio.sleep(backoff_s)

    async def _read(self, agent: SourceAddress, watch: "_Watch") -> None:
        addresses, server_key = _newest_address(agent)
        peer = await Peer.connect(addresses, server_key, self._keys, name="hub", timeout_s=STALE_AFTER_S)
        try:
            async for item in Follower(peer, streams=("nodes",), snapshot=False).items():
                if watch.heard(self._now()):
                    self._say(watch.node, "alive", f"the agent of {watch.node} answers again", good=True)
                if isinstance(item, Envelope) and isinstance(item.body, NodeReading):
                    watch.reading = item.body
                    watch.node = item.body.node
                    self._take(item.body)
        finally:
            peer.close()

    def _lost(self, watch: "_Watch", why: str) -> None:
        watch.lost = True
        interval_s = watch.reading.interval_s if watch.reading else 1.0
        # Empty but for its name: what was read last is not true now.
        self._take(NodeReading(node=watch.node, time=time.time(), interval_s=interval_s, gpu_state="n/a", state="lost"))
        self._say(watch.node, "lost", f"the agent of {watch.node} does not answer ({why}): its figures are not known")

    def _say(self, node: str, state: str, text: str, *, good: bool = False) -> None:
        run = self._state()
        self._take(
            NodeChanged(
                time=time.time(),
                step=run.step,
                incarnation=run.incarnation,
                node=node,
                state=state,
                text=text,
                severity="good" if good else "warning",
            )
        )


class _Watch:
    """Whether one agent is heard. The clock is an argument, and counts the time in which it could be."""

    def __init__(self, node: str, now: float) -> None:
        self.node = node
        self.reading: NodeReading | None = None
        self.heard_at = now
        self.lost = False

    def heard(self, now: float) -> bool:
        """The agent said something; true when it had been lost."""
        self.heard_at = now
        came_back, self.lost = self.lost, False
        return came_back

    def silent(self, now: float) -> bool:
        """Not heard for too long, and not told of yet."""
        return not self.lost and now - self.heard_at >= STALE_AFTER_S


def _newest_address(agent: SourceAddress) -> tuple[list[str], str]:
    """An agent that was started again writes a new card; rank 0 only knows the old one."""
    for card in read_cards():
        if card.kind == "agent" and card.source == agent.source:
            return card.addresses, card.server_key
    return agent.addresses, agent.server_key
