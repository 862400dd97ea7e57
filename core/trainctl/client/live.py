"""A session with a hub that answers."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar, cast

import msgspec

from trainctl.client.commanding import Commanding, make_command
from trainctl.client.connection import Connection
from trainctl.client.errors import ClientError, NotReachable
from trainctl.client.model import EVENTS_KEPT, Item, RunModel
from trainctl.client.points import Points, all_pages, by_request
from trainctl.client.wire_errors import from_peer
from trainctl.wire.commands import Action
from trainctl.wire.follower import EnvelopeReader, Follower, SourceGone, ask_range
from trainctl.wire.messages import (
    AuditLines,
    AuditRequest,
    Checkpoints,
    CheckpointsRequest,
    CommandUpdate,
    Envelope,
    Event,
    Events,
    EventsRequest,
    History,
    HistoryRequest,
    ReplyBase,
    Request,
    Snapshot,
    SnapshotRequest,
    Stream,
    Tunable,
    Tunables,
    TunablesRequest,
    Verified,
    Verifying,
    VerifyRequest,
)
from trainctl.wire.peer import NoAnswer, Peer, PeerError
from trainctl.wire.sequence import Gap

_GONE_AFTER_S = 10.0
_RETRY_S = (0.3, 2.0)
_VERIFY_TIMEOUT_S = 600.0
_AUDIT_LINES = 100_000
_FIRST_EVENTS = 200
_EVENTS_A_PAGE = 2000  # the most that one answer holds
_MISSED_STREAMS: tuple[Stream, ...] = ("metrics", "events")

R = TypeVar("R", bound=ReplyBase)


class LiveSession:
    """See `session.Session`."""

    live = True

    def __init__(self, connection: Connection, model: RunModel | None = None) -> None:
        self.model = model or RunModel()
        self._connection = connection
        self._read = EnvelopeReader()
        self._heads: dict[str, int] = {}

    @property
    def problems(self) -> list[str]:
        """See `session.Session`: the hub tells of them."""
        return []

    # --- following

    async def follow(self) -> AsyncGenerator[Item | None, None]:
        retry_s, quiet_since = _RETRY_S[0], time.monotonic()
        while True:
            peer: Peer | None = None
            try:
                async with self._connection.using() as peer, contextlib.aclosing(self._follow(peer)) as items:
                    async for item in items:
                        retry_s, quiet_since = _RETRY_S[0], time.monotonic()
                        if self.model.set_link("live"):
                            yield None
                        yield item
            except (SourceGone, PeerError, ClientError) as error:
                restarted = isinstance(error, SourceGone) and str(error) == "restarted"
            quiet_s = time.monotonic() - quiet_since
            if not restarted and self.model.set_link("gone" if quiet_s > _GONE_AFTER_S else "stale"):
                yield None
            try:
                await self._connection.renew(peer)
            except ClientError:
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 1.5, _RETRY_S[1])

    async def _follow(self, peer: Peer) -> AsyncGenerator[Item, None]:
        follower = Follower(peer, events=EVENTS_KEPT if self._heads else _FIRST_EVENTS)
        lost_before = self.model.lost_messages
        async with contextlib.aclosing(cast("AsyncGenerator[Item, None]", follower.items())) as items:
            async for item in items:
                self.model.lost_messages = max(self.model.lost_messages, lost_before + follower.lost)
                if isinstance(item, Snapshot):
                    async for missed in self._missed(peer, item):
                        yield missed
                    self._heads = dict(item.heads)
                self._apply(item)
                yield item
                if self._is_new_attempt():
                    fresh = await peer.ask(SnapshotRequest(req=0), Snapshot)
                    self._apply(fresh)
                    yield fresh

    def _apply(self, item: Item) -> None:
        self.model.apply(item)
        if isinstance(item, Envelope):
            self._heads[item.stream] = item.seq

    def _is_new_attempt(self) -> bool:
        info, state = self.model.info, self.model.state
        return info is not None and state is not None and state.attempt > info.attempt

    async def _missed(self, peer: Peer, snapshot: Snapshot) -> AsyncGenerator[Envelope, None]:
        """What was published between the last thing we heard and this snapshot, for those who want every line.

        The snapshot has its effects already, so it is not applied to the model. What the source does not keep one by
        one any more is in its history.
        """
        for stream in _MISSED_STREAMS:
            if stream not in self._heads:
                continue  # nothing was heard yet, so nothing was missed
            first, last = self._heads[stream] + 1, snapshot.heads.get(stream, 0)
            while first <= last:
                page = await ask_range(peer, self._read, Gap(stream=stream, first=first, last=last))
                page = [item for item in page if item.stream == stream and item.seq >= first]
                if not page:
                    break
                first = page[-1].seq + 1
                for item in page:
                    if isinstance(item, Envelope):
                        yield item

    # --- asking

    async def _ask(self, request: Request, answer: type[R], timeout_s: float = 5.0) -> R:
        """Ask, and once more after connecting anew: the hub may have been started again since."""
        async with self._connection.using() as peer:
            try:
                return await peer.ask(request, answer, timeout_s=timeout_s)
            except NoAnswer:
                dead = peer
            except PeerError as error:
                raise from_peer(error, self._connection.label) from None
        await self._connection.renew(dead)
        async with self._connection.using() as peer:
            try:
                return await peer.ask(request, answer, timeout_s=timeout_s)
            except PeerError as error:
                raise from_peer(error, self._connection.label) from None

    async def picture(self) -> Snapshot:
        """One snapshot, applied to the model: for those who look once and do not follow."""
        snapshot = await self._ask(SnapshotRequest(req=0), Snapshot)
        self.model.set_link("live")
        self.model.apply(snapshot)
        return snapshot

    async def history(
        self,
        metrics: Sequence[str],
        *,
        from_step: int | None = None,
        to_step: int | None = None,
        points: int | None = None,
        incarnation: int | None = None,
    ) -> dict[str, Points]:
        parts, state = by_request(metrics), self.model.state
        if len(parts) > 1 and points is None and state is not None and incarnation in {None, state.incarnation}:
            # Steps go on between the requests: up to here every part has all of a step's values.
            to_step = state.step if to_step is None else min(to_step, state.step)
        found: dict[str, Points] = {}
        for names in parts:
            request = HistoryRequest(
                req=0,
                metrics=names,
                from_step=from_step,
                to_step=to_step,
                points=points,
                incarnation=incarnation,
            )
            found |= await all_pages(request, lambda page: self._ask(page, History))
        return found

    async def events(
        self,
        *,
        limit: int = 200,
        since: float | None = None,
        from_step: int | None = None,
        kinds: Sequence[str] = (),
    ) -> list[Event]:
        request = EventsRequest(req=0, limit=limit, since=since, from_step=from_step, kinds=list(kinds))
        return (await self._ask(request, Events)).events

    async def all_events(
        self, *, since: float | None = None, from_step: int | None = None, kinds: Sequence[str] = ()
    ) -> AsyncGenerator[Events, None]:
        request = EventsRequest(req=0, limit=_EVENTS_A_PAGE, since=since, from_step=from_step, kinds=list(kinds))
        while True:
            page = await self._ask(request, Events)
            yield page
            if page.before is None:
                return
            request = msgspec.structs.replace(request, before=page.before)

    async def checkpoints(self) -> Checkpoints:
        return await self._ask(CheckpointsRequest(req=0), Checkpoints)

    async def verify(self, checkpoint: str, progress: Callable[[int, int], None] | None = None) -> Verified:
        if progress is None:
            return await self._ask(VerifyRequest(req=0, id=checkpoint), Verified, _VERIFY_TIMEOUT_S)
        request = VerifyRequest(req=0, id=checkpoint, progress=True)
        async with self._connection.using() as peer:
            try:
                async with contextlib.aclosing(peer.replies(request, timeout_s=_VERIFY_TIMEOUT_S)) as replies:
                    async for reply in replies:
                        if isinstance(reply, Verifying):
                            progress(reply.done_bytes, reply.total_bytes)
                        elif isinstance(reply, Verified):
                            return reply
            except PeerError as error:
                raise from_peer(error, self._connection.label) from None
        raise NotReachable(f"{self._connection.label} hung up while it verified {checkpoint}", "try again")

    async def tunables(self) -> list[Tunable]:
        return (await self._ask(TunablesRequest(req=0), Tunables)).tunables

    async def audit(self) -> list[str]:
        return (await self._ask(AuditRequest(req=0, limit=_AUDIT_LINES), AuditLines)).lines

    async def verify_audit(self) -> tuple[int, str | None]:
        found = await self._ask(AuditRequest(req=0, limit=0, verify=True), AuditLines, _VERIFY_TIMEOUT_S)
        if found.checked is None:
            return 0, "the hub is of an older version and does not verify its log: read the run's directory instead"
        return found.checked, found.problem

    # --- acting

    async def do(
        self,
        action: Action,
        *,
        condition: str | None = None,
        expires_s: float | None = None,
        revert_after: int | None = None,
        unless: str | None = None,
        command_id: str | None = None,
        timeout_s: float = 60.0,
    ) -> AsyncGenerator[CommandUpdate, None]:
        command = make_command(
            action,
            condition=condition,
            expires_s=expires_s,
            revert_after=revert_after,
            unless=unless,
            command_id=command_id,
        )
        async with contextlib.aclosing(Commanding(self._connection, command, timeout_s).updates()) as updates:
            async for update in updates:
                yield update

    async def close(self) -> None:
        self._connection.close()
        await asyncio.sleep(0)  # lets the readers of closed sockets end before the loop does
