"""What ranks tell one another once a second and once more at the end, through a store that they share."""

import threading
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from trainctl.trainer.agreement import Seal
from trainctl.trainer.boundary import Boundary
from trainctl.trainer.buffer import RowBuffer
from trainctl.trainer.control import Control
from trainctl.trainer.core import Callbacks, Core
from trainctl.trainer.drops import DropWatch
from trainctl.trainer.exchange import Exchange
from trainctl.trainer.identity import RankIdentity, RunIdentity
from trainctl.trainer.meeting import Connection, StoreSilent
from trainctl.trainer.phases import Phases
from trainctl.trainer.tunables import Tunables
from waiting import until


class Line(Connection):
    """A connection that can be cut, which is all that the exchange needs of the control thread, too."""

    cut = False

    def put(self, key: str, content: bytes) -> None:
        if self.cut:
            raise StoreSilent("cut")
        super().put(key, content)


class Tried(Exchange):
    tried = 0

    def _exchange(self, control: Control) -> None:
        try:
            super()._exchange(control)
        finally:
            self.tried += 1


class Rank:
    def __init__(self, number: int, store: HashStore, directory: Path) -> None:
        identity = RunIdentity(
            name="two", id="two", directory=directory, attempt=1, incarnation=1, created=0.0, authenticated=True,
            problem=None,
        )  # fmt: skip
        self.core = Core(
            place=RankIdentity(rank=number, world_size=2, local_rank=number, node="n"),
            identity=identity,
            total_steps=None,
            boundary=Boundary(),
            buffer=RowBuffer(capacity=2),
            phases=Phases(),
            tunables=Tunables(),
            callbacks=Callbacks(),
        )
        self.line = Line(store, "p", Seal(b"secret", 1))
        self.exchange = Tried(self.core, self.line, self.line if number == 0 else None)  # type: ignore[arg-type]
        self.exchange.start()

    def train(self, steps: int, batches: int) -> None:
        for _ in range(steps):
            self.core.boundary.completed = step = self.core.boundary.completed + 1
            for batch in range(batches):
                self.core.ranges.took(batches * (step - 1) + batch)
            self.core.ranges.close(step)

    def put(self) -> None:
        """Report, and wait until that was tried."""
        before = self.exchange.tried
        self.exchange.report({})
        until(lambda: self.exchange.tried > before)

    def differing(self) -> dict[str, list[int]]:
        """What rank 0 tells of the others, by metric."""
        assert self.exchange.everybody() is not None
        return {column.name: rows.steps for rows in self.exchange.differing_ranges() for column in rows.columns}


@pytest.fixture
def ranks(tmp_path: Path) -> tuple[Rank, Rank]:
    store = HashStore()
    first, second = Rank(0, store, tmp_path), Rank(1, store, tmp_path)
    return first, second


def test_what_other_ranks_cannot_keep_is_counted_and_told_by_rank_0(ranks: tuple[Rank, Rank]) -> None:
    first, second = ranks
    for _ in range(7):
        second.core.buffer.log(1, {"loss": 1.0})  # there is room for two, and nobody takes them
    second.put()
    first.put()
    assert first.exchange.everybody() is not None
    assert first.exchange.lost_elsewhere == 5
    (told,) = DropWatch().observe({"ranks": first.exchange.lost_elsewhere}, 0.0)
    assert told.text.startswith("telemetry is being lost: other ranks than 0")
    close(*ranks)


def test_what_was_done_since_the_last_report_is_exchanged_when_the_run_ends(ranks: tuple[Rank, Rank]) -> None:
    first, second = ranks
    first.put()
    second.put()
    for rank, batches in ((first, 1), (second, 2)):
        rank.train(5, batches)
    close(*ranks)
    assert first.differing() == {"data_first.1": [1, 2, 3, 4, 5], "data_last.1": [1, 2, 3, 4, 5]}
    assert [report.last for report in first.exchange._reports] == [True, True]


def test_what_could_not_be_put_into_the_store_comes_when_it_answers_again(ranks: tuple[Rank, Rank]) -> None:
    first, second = ranks
    second.line.cut = True
    for _ in range(20):
        first.train(3, 1)
        second.train(3, 2)
        second.put()
    second.line.cut = False
    second.put()
    first.put()
    assert first.differing()["data_last.1"] == list(range(1, 61))
    assert first.exchange.ranges.gaps == []
    close(*ranks)


def close(*ranks: Rank) -> None:
    """Both at once, as ranks end."""
    closing = [threading.Thread(target=rank.exchange.close, args=({},)) for rank in ranks]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()
    assert not any(rank.exchange.is_alive() for rank in ranks)
