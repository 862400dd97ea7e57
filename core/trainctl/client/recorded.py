"""A session with the files of a run: one that ended, or whose hub is gone."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from trainctl.client.commanding import make_command
from trainctl.client.errors import BadRequest, ClientError, NotReachable, Rejected
from trainctl.client.model import Item, RunModel
from trainctl.client.points import Points, all_pages
from trainctl.client.removal import remove
from trainctl.store.audit import check_audit
from trainctl.wire import manifest
from trainctl.wire.checking import check
from trainctl.wire.commands import Action, CheckpointRemove, spec_of
from trainctl.wire.messages import (
    FINAL_STATES,
    Checkpoints,
    CommandUpdate,
    Event,
    Events,
    EventsRequest,
    HistoryRequest,
    Snapshot,
    SnapshotRequest,
    Tunable,
    Verified,
)
from trainctl.wire.rundir import RunDir

if TYPE_CHECKING:
    from trainctl.store.record import RunRecord


def load(directory: Path) -> "RecordedSession":
    """Read a run's directory; takes as long as its journal is big. Raises `NotReachable`."""
    from trainctl.store.replay import NoRecord, load_record

    try:
        record = load_record(directory)
    except (NoRecord, OSError, ValueError) as error:
        raise NotReachable(
            f"the recording in {directory} cannot be read: {error}",
            "nothing else is affected; `trainctl ls -a` lists other runs",
        ) from None
    return RecordedSession(directory, record)


class RecordedSession:
    """See `session.Session`."""

    live = False

    def __init__(self, directory: Path, record: "RunRecord") -> None:
        self._dir = RunDir(directory)
        self._record = record
        self.model = RunModel()
        self.model.set_link("recorded")
        self._snapshot = record.snapshot(SnapshotRequest(req=0, events=2000))
        self.model.apply(self._snapshot)

    @property
    def problems(self) -> list[str]:
        """What of the recording could not be read, so far."""
        found = [str(damage) for damage in self._record.damage if not damage.torn]
        unreadable = self._record.metrics.unreadable
        if unreadable:
            found.append(f"{unreadable} blocks of the journal cannot be read: their values are missing")
        return found

    def summary(self) -> tuple[Snapshot, float | None]:
        """The last picture, and how long ago it was true."""
        return self._snapshot, self.model.age_s()

    async def follow(self) -> AsyncGenerator[Item | None, None]:
        self.model.apply(self._snapshot)
        yield self._snapshot

    async def picture(self) -> Snapshot:
        """See `LiveSession.picture`."""
        return self._snapshot

    async def history(
        self,
        metrics: Sequence[str],
        *,
        from_step: int | None = None,
        to_step: int | None = None,
        points: int | None = None,
        incarnation: int | None = None,
    ) -> dict[str, Points]:
        request = HistoryRequest(
            req=0,
            metrics=list(metrics),
            from_step=from_step,
            to_step=to_step,
            points=points,
            incarnation=incarnation,
        )
        return await all_pages(request, lambda page: asyncio.to_thread(self._record.history, page))

    async def events(
        self,
        *,
        limit: int = 200,
        since: float | None = None,
        from_step: int | None = None,
        kinds: Sequence[str] = (),
    ) -> list[Event]:
        request = EventsRequest(req=0, limit=limit, since=since, from_step=from_step, kinds=list(kinds))
        return self._record.events_page(request).events

    async def all_events(
        self, *, since: float | None = None, from_step: int | None = None, kinds: Sequence[str] = ()
    ) -> AsyncGenerator[Events, None]:
        record = self._record
        request = EventsRequest(req=0, limit=2000, since=since, from_step=from_step, kinds=list(kinds))
        while not record.wants_older(request):
            page = record.events_page(request)
            yield page
            if page.before is None:
                return
            request = msgspec.structs.replace(request, before=page.before)
        from trainctl.store.older_events import OlderEvents

        older = OlderEvents(self._dir.journal)
        try:
            yield await asyncio.to_thread(older.page, request, record.oldest_event, record.events_forgotten)
        except OSError as error:
            raise NotReachable(f"older events cannot be read: {error}") from None

    async def checkpoints(self) -> Checkpoints:
        found = await asyncio.to_thread(manifest.list_checkpoints, self._dir.checkpoints)
        best_by = self._snapshot.info.best_by
        last, best = manifest.pick(found, "last"), manifest.pick(found, "best", best_by)
        return Checkpoints(req=0, checkpoints=found, last=last.id if last else None, best=best.id if best else None)

    async def verify(self, checkpoint: str, progress: Callable[[int, int], None] | None = None) -> Verified:
        known = {info.id: info for info in (await self.checkpoints()).checkpoints}
        if checkpoint not in known:
            raise BadRequest(f"there is no checkpoint {checkpoint!r}", "`trainctl checkpoint ls` lists them")
        directory = self._dir.checkpoints / checkpoint
        done, total = 0, known[checkpoint].bytes

        def told(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total)

        found = await asyncio.to_thread(check, directory, told)
        return Verified(req=0, id=checkpoint, ok=found.ok, text=found.text, readable=found.readable)

    async def tunables(self) -> list[Tunable]:
        return list(self._snapshot.info.tunables)

    async def audit(self) -> list[str]:
        try:
            text = await asyncio.to_thread(self._dir.audit_file.read_text, encoding="utf-8")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise NotReachable(f"the audit log cannot be read: {error}") from None
        return text.splitlines()

    async def verify_audit(self) -> tuple[int, str | None]:
        def check() -> tuple[int, str | None]:
            return check_audit(self._dir.audit_file, manifest.kept_audit_heads(self._dir.checkpoints))

        try:
            return await asyncio.to_thread(check)
        except OSError as error:
            raise NotReachable(f"the audit log cannot be read: {error}") from None

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
        """Nobody is there to act: iterating raises `Rejected` when the run ended, `NotReachable` when it is lost.

        Only a checkpoint can be deleted, by whoever has the directory, once no rank can be alive.
        """
        del timeout_s
        state, name = self._snapshot.state.state, self.model.name
        if isinstance(action, CheckpointRemove) and not self._may_train():
            command = make_command(
                action,
                condition=condition,
                expires_s=expires_s,
                revert_after=revert_after,
                unless=unless,
                command_id=command_id,
            )
            return remove(self._dir, action, command, self._snapshot.state)
        if state == "lost":
            return _raising(
                NotReachable(
                    f"the hub of {name} is gone, so `{spec_of(action).name}` cannot reach it; training is not touched",
                    "if training still runs, rank 0 starts its hub again within seconds: try again",
                )
            )
        return _raising(
            Rejected(
                f"{name} is {state} since step {self._snapshot.state.step}: there is nothing left to act on",
                f"`trainctl run --resume {self._snapshot.info.id} …` goes on from its last checkpoint",
            )
        )

    def _may_train(self) -> bool:
        """Whether a rank of a run without a hub may be alive: of one that is lost in the recording."""
        from trainctl.client import discover

        info, state = self._snapshot.info, self._snapshot.state.state
        return state not in FINAL_STATES or (state == "lost" and discover.may_come_back(info, self.model.age_s()))

    async def close(self) -> None:
        """Nothing is held open."""


async def _raising(error: ClientError, updates: Iterable[CommandUpdate] = ()) -> AsyncGenerator[CommandUpdate, None]:
    for update in updates:
        yield update
    raise error
