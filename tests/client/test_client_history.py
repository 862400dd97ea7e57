"""Over real sockets: whatever is lost, doubled or late on the way, and whatever the hub packs or however often it is
started again, a client ends with curves that equal the hub's history.

The client is what the cockpit is made of: a live session, and curves that ask for the past at every snapshot.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lossy_hub import LossyHub
from scripted_hub import make_info, rows

from trainctl.client.live import LiveSession
from trainctl.client.session import open_session
from trainctl.tui.feed import Feed
from trainctl.wire.messages import Beat, Envelope, Note, RolledBack, Rows, RunInfo, Snapshot


class Run:
    """A run whose hub is started again now and then, and the steps it makes."""

    def __init__(self) -> None:
        self.info: RunInfo = make_info("run-1", "gpt")
        self.hub = self._started(LossyHub(self.info))
        self.step, self.incarnation, self.epoch = 0, 1, 1

    def _started(self, hub: LossyHub) -> LossyHub:
        hub.held = []
        hub.start()
        return hub

    def act(self, operation: tuple[str, int, str]) -> None:
        kind, count, fate = operation
        match kind:
            case "rows":
                first, self.step = self.step + 1, self.step + count
                self.hub.publish(rows(first, self.step, self.incarnation, loss=float(self.incarnation)), fate)
            case "rollback" if self.step:
                event = RolledBack(
                    time=time.time(),
                    step=max(0, self.step - count),
                    incarnation=self.incarnation + 1,
                    from_step=self.step,
                    from_incarnation=self.incarnation,
                    checkpoint="c",
                )
                self.step, self.incarnation = event.step, event.incarnation
                self.hub.publish(event, fate)
            case "pack":
                self.hub.pack()
            case "late":
                self.hub.release()
            case "restart":
                self.restart()

    def restart(self) -> None:
        before = self.hub
        before.stop(card=False)
        self.epoch += 1
        hub = LossyHub(self.info, epoch=self.epoch, record=before.record)
        hub.journal = before.journal
        self.hub = self._started(hub)

    def curve(self) -> tuple[list[int], list[float]]:
        found = self.hub.record.metrics.query("loss")
        return found["step"].tolist(), found["value"].tolist()


class Client:
    """Does with a session what the cockpit does."""

    def __init__(self, session: LiveSession) -> None:
        self.session = session
        self.feed = Feed()
        self.snapshots = 0
        self._again = False
        self._loading: asyncio.Task[None] | None = None

    async def follow(self) -> None:
        async with contextlib.aclosing(self.session.follow()) as items:
            async for item in items:
                self._take(item)

    def _take(self, item: Snapshot | Envelope | Beat | None) -> None:
        match item:
            case Snapshot():
                self.snapshots += 1
                self._load()
            case Envelope(body=Rows() as body):
                self.feed.append(body)
                if self.feed.unsure:
                    self._load()
            case Envelope(body=RolledBack() as event):
                self.feed.roll_back(event)
                self._load()

    def _load(self) -> None:
        if self.feed.loading:
            self._again = True
            return
        self.feed.begin_load()
        self._loading = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        try:
            self.feed.load(await self.session.history(["loss"]))
        except Exception:  # noqa: BLE001 - the hub is being started again
            self.feed.give_up()
            self._again = True
        if self._again:
            self._again = False
            await asyncio.sleep(0.01)
            self._load()

    def curve(self) -> tuple[list[int], list[float]]:
        samples = self.feed.curve("loss")
        return samples.step.astype(int).tolist(), samples.mean.tolist()

    async def close(self, following: "asyncio.Task[None]") -> None:
        for task in (following, self._loading):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self.session.close()


FATES = st.sampled_from(["sent", "sent", "lost", "lost", "doubled", "held"])
OPERATIONS = st.one_of(
    st.tuples(st.just("rows"), st.integers(1, 5), FATES),
    st.tuples(st.just("rows"), st.integers(1, 5), FATES),
    st.tuples(st.just("rollback"), st.integers(0, 9), FATES),
    st.tuples(st.sampled_from(["late", "pack", "restart"]), st.just(0), st.just("sent")),
)


@contextlib.contextmanager
def a_run() -> Iterator[Run]:
    run = Run()
    try:
        yield run
    finally:
        run.hub.stop()


async def followed(run: Run, operations: list[tuple[str, int, str]]) -> Client:
    session = await open_session("gpt")
    assert isinstance(session, LiveSession)
    client = Client(session)
    following = asyncio.create_task(client.follow())
    try:
        await seen(lambda: client.snapshots > 0 and client.session.model.link == "live")
        for operation in operations:
            await asyncio.to_thread(run.act, operation)
        await asyncio.to_thread(run.hub.beat)
        with contextlib.suppress(TimeoutError):
            await seen(lambda: client.curve() == run.curve())
        assert client.curve() == run.curve()
    finally:
        await client.close(following)
    return client


async def seen(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - it is changed by what comes over sockets
            await asyncio.sleep(0.01)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations=st.lists(OPERATIONS, min_size=5, max_size=25))
def test_any_order_of_drops_restarts_duplicates_and_gaps_ends_with_the_hubs_history(
    operations: list[tuple[str, int, str]],
) -> None:
    with a_run() as run:
        asyncio.run(followed(run, operations))


@pytest.mark.thorough
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations=st.lists(OPERATIONS, min_size=5, max_size=40))
def test_many_orders_of_drops_restarts_duplicates_and_gaps_end_with_the_hubs_history(
    operations: list[tuple[str, int, str]],
) -> None:
    with a_run() as run:
        asyncio.run(followed(run, operations))


def test_a_gap_is_filled_with_what_the_hub_still_has_one_by_one() -> None:
    with a_run() as run:
        client = asyncio.run(followed(run, [("rows", 3, "sent"), ("rows", 4, "lost"), ("rows", 2, "sent")]))
        assert client.snapshots == 1
        assert run.curve()[0] == list(range(1, 10))


def test_a_gap_that_was_packed_means_a_new_snapshot_and_the_history_asked_for_again() -> None:
    with a_run() as run:
        lost = [("rows", 3, "sent"), ("rows", 40, "lost"), ("pack", 0, ""), ("rows", 2, "sent")]
        client = asyncio.run(followed(run, lost))
        assert client.snapshots >= 2
        assert client.session.model.lost_messages == 0, "the history has them, so nothing is lost"
        assert run.curve()[0] == list(range(1, 46))


def test_rows_that_come_before_the_rollback_they_follow_make_no_hole() -> None:
    with a_run() as run:
        late = [("rows", 9, "sent"), ("rollback", 5, "held"), ("rows", 3, "sent"), ("late", 0, ""), ("rows", 1, "sent")]
        asyncio.run(followed(run, late))
        steps, values = run.curve()
        assert steps == list(range(1, 9))
        assert np.floor(values).tolist() == [1.0] * 4 + [2.0] * 4


def test_rows_of_a_branch_that_was_left_make_no_hole_when_they_come_after_it() -> None:
    with a_run() as run:
        late = [
            ("rows", 9, "sent"),
            ("rows", 3, "lost"),
            ("rollback", 8, "sent"),
            ("rows", 3, "sent"),
            ("rows", 1, "sent"),
        ]
        asyncio.run(followed(run, late))
        assert run.curve()[0] == list(range(1, 9))


def test_a_client_that_was_away_while_events_were_packed_has_them_from_the_snapshot() -> None:
    def note(number: int) -> Note:
        return Note(time=1000.0 + number, step=number, incarnation=1, actor="ann", text=str(number))

    async def scenario(run: Run) -> None:
        session = await open_session("gpt")
        following = asyncio.create_task(Client(session).follow())  # type: ignore[arg-type]
        try:
            await seen(lambda: session.model.link == "live")
            await asyncio.to_thread(run.hub.publish, note(0))
            for number in range(1, 300):
                await asyncio.to_thread(run.hub.publish, note(number), "lost")
            await asyncio.to_thread(run.hub.pack)
            await asyncio.to_thread(run.hub.publish, note(300))
            await seen(lambda: [event.step for event in session.model.events] == list(range(301)))
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await session.close()

    with a_run() as run:
        asyncio.run(scenario(run))
