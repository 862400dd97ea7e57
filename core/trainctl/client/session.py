"""A run to look at and to act on: live over the wire, or recorded in a directory. Both look the same from outside."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import msgspec

from trainctl.client.errors import ClientError, NotReachable, OtherVersion
from trainctl.client.model import Item, RunModel
from trainctl.client.points import Points
from trainctl.wire.commands import Action
from trainctl.wire.messages import Checkpoints, CommandUpdate, Event, Events, Snapshot, Tunable, Verified

if TYPE_CHECKING:
    from pathlib import Path

    from trainctl.client.discover import Target
    from trainctl.wire.messages import Card


Progress: TypeAlias = Callable[[int, int], None]


class Session(Protocol):
    """One run. `model` is fed by `follow`, so iterate that to keep it true; everything else may run beside it.

    All methods raise `client.errors.ClientError`.
    """

    model: RunModel
    live: bool

    @property
    def problems(self) -> list[str]:
        """What of a recording could not be read, so far; a live run's hub tells of it in the run's own events."""

    def follow(self) -> AsyncGenerator[Item | None, None]:
        """Apply what the run says to `model` and yield it; None says that `model.link` changed.

        A live session goes on for ever and connects again by itself; a recorded one yields its snapshot and ends.
        """

    async def picture(self) -> Snapshot:
        """One snapshot, applied to `model`: for those who look once and do not follow."""

    async def history(
        self,
        metrics: Sequence[str],
        *,
        from_step: int | None = None,
        to_step: int | None = None,
        points: int | None = None,
        incarnation: int | None = None,
    ) -> dict[str, Points]:
        """Values (or about `points` rollups) of metrics by name; a metric without any is left out."""

    def do(
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
        """Act, and yield every state the command passes through; the last one is final.

        Without an outcome within `timeout_s` the last state is `unknown` with the reason. A hub that restarts in
        between is asked again with the same id, so the command happens once.
        """

    async def events(
        self,
        *,
        limit: int = 200,
        since: float | None = None,
        from_step: int | None = None,
        kinds: Sequence[str] = (),
    ) -> list[Event]:
        """The newest `limit` events that match, oldest first: one answer, from what the hub has in memory."""

    def all_events(
        self, *, since: float | None = None, from_step: int | None = None, kinds: Sequence[str] = ()
    ) -> AsyncGenerator[Events, None]:
        """All events that match, in parts: the newest part first, each with its oldest event first."""

    async def checkpoints(self) -> Checkpoints:
        """Checkpoints, oldest first, and which are `last` and `best`."""

    async def verify(self, checkpoint: str, progress: Progress | None = None) -> Verified:
        """Hash every file of a checkpoint against its manifest; `progress(done, total)` hears of the bytes."""

    async def tunables(self) -> list[Tunable]:
        """The script's tunables with their values and bounds."""

    async def audit(self) -> list[str]:
        """The audit log's JSON lines as they stand in the file, oldest first."""

    async def verify_audit(self) -> tuple[int, str | None]:
        """How many lines the audit log has, all of them, and the first that is not as it was written, in words.

        Verified where the log lies, against the hashes that checkpoints keep of it.
        """

    async def close(self) -> None:
        """Let go of sockets; the run is not touched."""


async def open_session(ref: str | None, *, server_key: str | None = None, timeout_s: float = 3.0) -> Session:
    """Find a run and connect: by name, id, start of an id, `tcp://` address or directory.

    None means `TRAINCTL_RUN`, or the user's only live run. A run whose hub is gone opens as recorded.
    Raises `client.errors.ClientError`.
    """
    # Here, because either kind of session costs imports that the other does not need.
    from trainctl.client import discover

    target = await discover.resolve(ref, server_key=server_key)
    failure: ClientError | None = None
    if target.card is not None and not discover.surely_gone(target.card):
        try:
            return await _connect(target, timeout_s)
        except OtherVersion:
            raise  # its hub lives, so the recording's verdict (lost) would be wrong
        except NotReachable as error:
            failure = error
            if discover.hub_alive(target.card):
                raise _silent(target) from None
    if target.directory is not None:
        return await _recorded_unless_it_comes_back(target, target.directory, timeout_s)
    raise failure or NotReachable(
        f"the hub of {target.label} is gone and its directory is not to be seen from here",
        "on the machine where it ran: `trainctl status RUN_DIR`",
    )


def _silent(target: "Target") -> NotReachable:
    """What to say of a hub that is there and says nothing: its recording ends in the middle, and would read as lost."""
    assert target.card is not None
    pid = target.card.pid
    return NotReachable(
        f"{target.label} does not answer: its hub (pid {pid}) is alive and silent, perhaps stopped; training goes on "
        "without it, and nothing was done",
        f"`kill -CONT {pid}` wakes a stopped one; after `kill -9 {pid}` rank 0 starts another within seconds",
    )


async def _recorded_unless_it_comes_back(target: "Target", directory: "Path", timeout_s: float) -> Session:
    """The recording; but a hub that has just died is started again by rank 0, and is worth a moment."""
    from trainctl.client import discover
    from trainctl.client.recorded import load

    recorded = await asyncio.to_thread(load, directory)
    info, state = recorded.model.info, recorded.model.state
    if target.card is None or info is None or state is None or state.state != "lost":
        return recorded
    if discover.may_come_back(info, recorded.model.age_s()):
        async for _ in discover.looks():
            card = discover.hub_cards().get(target.card.source)
            if card is not None and card.epoch > target.card.epoch and not discover.surely_gone(card):
                with contextlib.suppress(NotReachable):  # it may still be on its way
                    return await _connect(msgspec.structs.replace(target, card=card), timeout_s)
    return recorded


async def _connect(target: "Target", timeout_s: float) -> Session:
    from trainctl.client import discover
    from trainctl.client.connection import Connection
    from trainctl.client.live import LiveSession

    first = target.card
    assert first is not None

    def newest_card() -> "Card | None":
        # A hub that was started again has written a new card; an address given by hand has none.
        return discover.hub_cards().get(first.source) if first.source else first

    connection = Connection(newest_card, discover.own_keys(), target.label, timeout_s)
    try:
        await connection.connect()
    except BaseException:
        connection.close()
        raise
    return LiveSession(connection)
