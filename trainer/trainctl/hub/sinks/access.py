"""What a sink's thread may ask of the hub: every answer is made on the hub's loop, a small one at a time."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from trainctl.hub.disk import DiskHangs
from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.recorder import Recorder
from trainctl.hub.sinks.branching import chain_of, parting_step, spans_between
from trainctl.hub.sinks.sink import Branching
from trainctl.store.epochs import EpochBegin
from trainctl.store.rollups import Columns
from trainctl.store.windows import ROLLUPS, logged_together, step_windows
from trainctl.wire import codec
from trainctl.wire.messages import Column, Envelope, Rows, Snapshot, SnapshotRequest

T = TypeVar("T")

_ANSWER_S = 60.0
_READ_BYTES = 128 * 1024
_WINDOW = 20_000  # values


class HubGone(Exception):
    """The hub left without this thread."""


class Access:
    """Made on the loop, used in a thread."""

    def __init__(self, *, recorder: Recorder, keeper: JournalKeeper) -> None:
        self._loop = asyncio.get_running_loop()
        self._record = recorder.record
        self._keeper = keeper
        self._decode = codec.envelope_decoder()

    def picture(self) -> Snapshot:
        """The run as it is now, without events and checkpoints."""
        return self._ask(lambda: self._record.snapshot(SnapshotRequest(req=0, events=0), checkpoints=[]))

    def missed(self, first: int, last: int) -> list[Envelope]:
        """Some of the metrics' envelopes from `first` on, empty where they are not in the journal. Raises OSError."""

        def read() -> list[bytes]:
            self._keeper.settle()
            return self._keeper.index.read("metrics", first, last, _READ_BYTES)

        encoded = self._ask_the_disk(read)
        found = []
        for payload in encoded:
            try:
                envelope = self._decode(payload)
            except codec.DecodeError:
                continue  # counted by the decoder; its number shows as a gap
            assert isinstance(envelope, Envelope)
            found.append(envelope)
        return found

    def branching(self, before: int, incarnation: int, at: float) -> Branching:
        """What the step from one incarnation to the next makes void, and what belongs there instead."""
        known = self._ask(lambda: self._record.metrics.branches)
        branches = {branch.incarnation: branch for branch in known}
        chain = chain_of(branches, incarnation)
        if not before:
            return Branching(from_step=0, time=at)
        if before not in branches and chain:  # it was deleted: what the copy has before the first that is left, stays
            return Branching(from_step=branches[chain[0][0]].after_step + 1, time=at)
        from_step = parting_step(chain_of(branches, before), chain)
        spans = spans_between(chain, from_step)
        restored = (rows for span in spans for rows in self.remembered(*span))
        return Branching(from_step=from_step, time=at, restored=restored)

    def epochs(self) -> tuple[list[EpochBegin], int]:
        """Where the metrics' numbers began, and will go on when the next hub comes; and the newest epoch."""

        def look() -> tuple[list[EpochBegin], int]:
            known = self._record.metric_epochs
            return [*known, known.next(known.epoch + 1, self._record.heads["metrics"] + 1)], known.epoch

        return self._ask(look)

    def incarnations(self) -> list[int]:
        return self._ask(lambda: [branch.incarnation for branch in self._record.metrics.branches])

    def remembered(self, incarnation: int, first: int, last: int | None = None) -> Iterator[Rows]:
        """Values of an incarnation between two steps, both included, from the history in memory: by step in the large,
        so that metrics that were logged together mostly come together."""
        metrics = self._record.metrics

        def rollups() -> list[Columns]:
            names = metrics.names
            return [
                metrics.query(name, from_step=first, to_step=last, points=ROLLUPS, incarnation=incarnation)
                for name in names
            ]

        def values(start: int, end: int) -> dict[str, Columns]:
            return {
                name: metrics.query(name, from_step=start, to_step=end, incarnation=incarnation)
                for name in metrics.names
            }

        for start, end in step_windows(self._ask_the_disk(rollups), _WINDOW):
            found = self._ask_the_disk(partial(values, max(start, first), end))
            for steps, times, columns in logged_together(found):
                yield Rows(
                    attempt=0,
                    incarnation=incarnation,
                    steps=steps.tolist(),
                    times=times.tolist(),
                    columns=[
                        Column(name=name, dtype="f8", data=column.astype("<f8").tobytes())
                        for name, column in columns.items()
                    ],
                )

    def _ask_the_disk(self, question: Callable[[], T]) -> T:
        """The same for what may be on disk only. Raises `DiskHangs` too: the loop does not wait for that."""
        if self._keeper.hangs:
            raise DiskHangs
        return self._ask(question)

    def _ask(self, question: Callable[[], T]) -> T:
        """Have it answered on the loop. Raises `HubGone`, TimeoutError, and what the question raises."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def reply() -> None:
            try:
                answer.set_result(question())
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked
                answer.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(reply)
        except RuntimeError:
            raise HubGone from None
        return answer.result(_ANSWER_S)
