"""Retention while a run trains: what goes after a save, what waits for the hub's word, and what a rollback holds."""

from pathlib import Path
from typing import Any

import pytest
from one_rank import OneRank

from trainctl.trainer.attach import prepare
from trainctl.trainer.checkpoint import Retention
from trainctl.trainer.leader import Prepared
from trainctl.trainer.pruning import Pruner
from trainctl.wire.commands import Command, Rollback
from trainctl.wire.manifest import list_checkpoints
from trainctl.wire.messages import Anomaly, CheckpointRemoved, Trouble
from trainctl.wire.rundir import RunDir


class FakeLink:
    """What a pruner asks of the link."""

    def __init__(self) -> None:
        self.connected = True
        self.newest = 7
        self.written = 0

    def on_disk(self, number: int) -> bool:
        return self.written >= number


class Training:
    """One rank with a checkpoint each ten steps, and its pruner."""

    def __init__(self, directory: Path, **policy: Any) -> None:
        self.directory = directory
        self.rank = OneRank(directory)
        self.core = self.rank.core
        self.core.retention = Retention(best=0, **policy)
        self.pruner = Pruner(self.core, self.core.retention)
        self.ids: list[str] = []

    def train(self, saves: int) -> None:
        for _ in range(saves):
            self.rank.train(10)
            self.ids.append(self.rank.save())

    def prune(self, link: FakeLink | None = None) -> list[int]:
        """The steps of the checkpoints that are left."""
        self.pruner.tick(link)  # type: ignore[arg-type]
        self.pruner.finish(30)
        return [info.step for info in list_checkpoints(RunDir(self.directory).checkpoints)]

    def events(self, kind: type) -> list[Any]:
        return [event for event in self.core.events if isinstance(event, kind)]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_after_a_save_what_nothing_keeps_is_deleted_and_told(run_dir: Path) -> None:
    training = Training(run_dir, last=2)
    training.train(4)
    assert training.prune() == [10, 20, 30, 40], "nothing before a save was told to be good"
    training.pruner.saved()
    assert training.prune() == [30, 40]
    assert [(event.id, event.by) for event in training.events(CheckpointRemoved)] == [
        (training.ids[0], "retention"),
        (training.ids[1], "retention"),
    ]
    assert all(event.bytes > 0 for event in training.events(CheckpointRemoved))


def test_a_damaged_newest_one_stops_it_and_is_told(run_dir: Path) -> None:
    training = Training(run_dir, last=1)
    training.train(3)
    shard = next((RunDir(run_dir).checkpoints / training.ids[-1]).glob("rank-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    training.pruner.saved()
    assert training.prune() == [10, 20, 30]
    (told,) = training.events(Anomaly)
    assert "no older checkpoint was deleted" in told.text


def test_with_healthy_steps_nothing_is_deleted_before_the_hub_has_every_row(run_dir: Path) -> None:
    training = Training(run_dir, last=1, healthy_steps=10)
    training.train(4)
    training.pruner.saved()
    link = FakeLink()
    assert training.prune() == [10, 20, 30, 40], "no hub"
    link.connected = False
    assert training.prune(link) == [10, 20, 30, 40], "a hub that is away"
    link.connected, link.written = True, 6
    assert training.prune(link) == [10, 20, 30, 40], "a hub that has not all of it"
    training.core.troubles = [Trouble(incarnation=1, first=25)]  # told before the last row was on disk
    link.written = 7
    assert training.prune(link) == [10, 40], "the newest known good one, and the last"


def test_what_a_rollback_goes_back_to_is_not_deleted_under_it(run_dir: Path) -> None:
    training = Training(run_dir, last=1)
    training.train(4)
    prepared = prepare(training.core, Command(id="c", action=Rollback(target="20")))
    assert isinstance(prepared, Prepared)
    assert prepared.checkpoint == training.ids[1]
    training.pruner.saved()
    assert training.prune() == [20, 40]


def test_a_rollback_that_is_prepared_while_others_are_deleted_holds_its_target(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(run_dir, last=1)
    training.train(3)

    def late(*_: object) -> frozenset[str]:
        training.core.rollback_targets.hold("c", training.ids[0])
        return frozenset()

    monkeypatch.setattr("trainctl.trainer.checkpoint.retention.verify_last_good", late)
    training.pruner.saved()
    assert training.prune() == [10, 30]
