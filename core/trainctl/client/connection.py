"""A connection to a hub that finds its way back: after a restart the hub has a new card, maybe new ports."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from trainctl.client.errors import NotReachable
from trainctl.client.wire_errors import from_peer
from trainctl.wire.keys import KeyPair
from trainctl.wire.messages import Card
from trainctl.wire.peer import Peer, PeerError


class Connection:
    """Holds the newest `Peer` of one source. Whoever needs it borrows it with `using`; `renew` replaces a dead one.

    A replaced peer is closed once nobody uses it any more: an asyncio socket must not be closed under its reader.
    """

    def __init__(self, card: Callable[[], Card | None], keys: KeyPair, label: str, timeout_s: float = 3.0) -> None:
        self._card = card
        self._keys = keys
        self._timeout_s = timeout_s
        self._peer: Peer | None = None
        self._users: dict[Peer, int] = {}
        self._renewing = asyncio.Lock()
        self.label = label

    async def connect(self) -> Peer:
        """The present peer, or a new one. Raises `ClientError`."""
        async with self._renewing:
            if self._peer is None:
                self._peer = await self._dial()
                self._users[self._peer] = 0
            return self._peer

    async def renew(self, dead: Peer | None) -> Peer:
        """Connect anew unless somebody else already did since `dead` was found dead. Raises `ClientError`."""
        if dead is not None and dead is self._peer:
            self._peer = None
            self._close_unused()
        return await self.connect()

    @contextlib.asynccontextmanager
    async def using(self) -> AsyncGenerator[Peer, None]:
        """Borrow the present peer. Raises `ClientError` when there is none to be had."""
        peer = await self.connect()
        self._users[peer] += 1
        try:
            yield peer
        finally:
            if peer in self._users:
                self._users[peer] -= 1
            self._close_unused()

    def close(self) -> None:
        """Close everything, in use or not."""
        self._peer = None
        for peer in list(self._users):
            peer.close()
        self._users.clear()

    async def _dial(self) -> Peer:
        card = self._card()
        if card is None:
            raise NotReachable(f"{self.label} has no hub any more", "`trainctl ls -a` shows how it ended")
        try:
            return await Peer.connect(card.addresses, card.server_key, self._keys, timeout_s=self._timeout_s)
        except (PeerError, ValueError) as error:
            raise from_peer(error, self.label) from None

    def _close_unused(self) -> None:
        for peer, users in list(self._users.items()):
            if users == 0 and peer is not self._peer:
                del self._users[peer]
                peer.close()
