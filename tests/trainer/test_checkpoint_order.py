"""A clock that is behind, as after a restart on another node, costs no checkpoint and sends nobody back too far."""

import os
from pathlib import Path

import pytest

from manifests import write_empty_checkpoint
from trainctl.trainer.checkpoint.retention import Retention, prune
from trainctl.trainer.fallback import choice, newer_than
from trainctl.wire.lineage import Branch, record_branch
from trainctl.wire.manifest import MANIFEST, list_checkpoints, remember_check
from trainctl.wire.rundir import RunDir


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Steps 80 to 100 of a first attempt, 110 to 130 of a second one on a node that is a minute behind."""
    run_dir = RunDir(tmp_path)
    run_dir.create()
    record_branch(run_dir, Branch(incarnation=1))
    record_branch(run_dir, Branch(incarnation=2, parent=1, after_step=100))
    times = ((80, 1, 900.0), (90, 1, 990.0), (100, 1, 1000.0), (110, 2, 940.0), (120, 2, 950.0), (130, 2, 960.0))
    for number, (step, attempt, time) in enumerate(times):
        directory = write_empty_checkpoint(run_dir.checkpoints, step, attempt, time, attempt=attempt, number=number)
        os.utime(directory, (time, time))
    return run_dir.checkpoints


def test_retention_deletes_the_oldest_work_not_the_newest(checkpoints: Path) -> None:
    assert [info.step for info in prune(checkpoints, Retention(last=2, best=0))] == [80, 90, 100, 110]
    assert [info.step for info in list_checkpoints(checkpoints)] == [120, 130]


def test_an_unattended_start_takes_the_newest_and_then_the_next_older_one(checkpoints: Path) -> None:
    ids = {info.step: info.id for info in list_checkpoints(checkpoints)}
    assert choice(checkpoints, "last").candidates == [ids[step] for step in (130, 120, 110, 100, 90, 80)]
    remember_check(checkpoints / ids[130], ok=False, text="damaged")
    remember_check(checkpoints / ids[100], ok=False, text="damaged")
    (checkpoints / ids[120] / MANIFEST).write_text("cut")
    found = choice(checkpoints, "last")
    assert found.candidates == [ids[step] for step in (110, 90, 80, 130, 100)], "known damage last"
    passed_over = newer_than(checkpoints, ids[110], found.damaged)
    assert passed_over.keys() == {ids[130], ids[120]}, "step 100 is older than what was taken"
