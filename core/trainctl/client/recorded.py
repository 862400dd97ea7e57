"""A session with the files of a run: one that ended, or whose hub is gone."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainctl.client.errors import BadRequest, ClientError, NotReachable, Rejected
from trainctl.client.model import Item, RunModel
from trainctl.client.points import Points, all_pages
from trainctl.store.audit import check_audit
from trainctl.wire import manifest
from trainctl.wire.commands import Action, spec_of
from trainctl.wire.messages import (
    Checkpoints,
    CommandUpdate,
    Event,
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
        return self._record.events_matching(
            EventsRequest(req=0, limit=limit, since=since, from_step=from_step, kinds=list(kinds))
        )

    async def checkpoints(self) -> Checkpoints:
        found = await asyncio.to_thread(manifest.list_checkpoints, self._dir.checkpoints)
        last, best = manifest.pick(found, "last"), manifest.pick(found, "best")
        return Checkpoints(req=0, checkpoints=found, last=last.id if last else None, best=best.id if best else None)

    async def verify(self, checkpoint: str) -> Verified:
        known = {info.id for info in (await self.checkpoints()).checkpoints}
        if checkpoint not in known:
            raise BadRequest(f"there is no checkpoint {checkpoint!r}", "`trainctl checkpoint ls` lists them")
        directory = self._dir.checkpoints / checkpoint
        try:
            found = await asyncio.to_thread(manifest.verify, directory)
        except manifest.DamagedCheckpoint as error:
            manifest.remember_check(directory, ok=False, text=str(error))
            return Verified(req=0, id=checkpoint, ok=False, text=str(error))
        text = f"{len(found.files)} files have the hashes of the manifest"
        manifest.remember_check(directory, ok=True, text=text)
        return Verified(req=0, id=checkpoint, ok=True, text=text)

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
        """Nobody is there to act: iterating raises `Rejected` when the run ended, `NotReachable` when it is lost."""
        del condition, expires_s, revert_after, unless, command_id, timeout_s
        state, name = self._snapshot.state.state, self.model.name
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

    async def close(self) -> None:
        """Nothing is held open."""


async def _raising(error: ClientError, updates: Iterable[CommandUpdate] = ()) -> AsyncGenerator[CommandUpdate, None]:
    for update in updates:
        yield update
    raise error
