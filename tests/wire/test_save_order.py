"""Which checkpoint is newer is told by what the run counted: clocks differ between nodes, and are set back."""

from pathlib import Path

import pytest

from manifests import write_empty_checkpoint
from trainctl.wire.held_states import list_with_memory
from trainctl.wire.lineage import Branch, record_branch
from trainctl.wire.manifest import list_checkpoints, pick
from trainctl.wire.messages import CheckpointInfo
from trainctl.wire.rundir import RunDir
from trainctl.wire.save_order import next_older, precedes


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    return run_dir


def saved(run_dir: RunDir, step: int, incarnation: int, time: float, *, attempt: int = 1, number: int = 1) -> None:
    write_empty_checkpoint(run_dir.checkpoints, step, incarnation, time, attempt=attempt, number=number)


def steps(known: list[CheckpointInfo]) -> list[int]:
    return [info.step for info in known]


def last(known: list[CheckpointInfo]) -> int | None:
    found = pick(known, "last")
    return found.step if found else None


def test_a_restart_on_a_node_whose_clock_is_behind_goes_on_after_what_was_there(run_dir: RunDir) -> None:
    for number, (step, attempt, time) in enumerate(
        ((90, 1, 990.0), (100, 1, 1000.0), (110, 2, 940.0), (120, 2, 950.0))
    ):
        saved(run_dir, step, attempt, time, attempt=attempt, number=number)
    record_branch(run_dir, Branch(incarnation=1))
    record_branch(run_dir, Branch(incarnation=2, parent=1, after_step=100))
    known = list_checkpoints(run_dir.checkpoints)
    assert (steps(known), last(known)) == ([90, 100, 110, 120], 120)
    held = CheckpointInfo(id="step-00000130-2.5", step=130, time=960.0, bytes=1, incarnation=2)
    assert last(list_with_memory(run_dir.checkpoints, [held])) == 130, "in memory alone, too"


def test_after_a_rollback_the_lower_steps_of_the_new_branch_are_the_newer_ones(run_dir: RunDir) -> None:
    for number, (step, incarnation, time) in enumerate(
        ((20, 1, 900.0), (40, 1, 990.0), (30, 2, 500.0), (35, 2, 400.0))
    ):
        saved(run_dir, step, incarnation, time, number=number)
    record_branch(run_dir, Branch(incarnation=1))
    record_branch(run_dir, Branch(incarnation=2, parent=1, after_step=20))
    known = list_checkpoints(run_dir.checkpoints)
    assert (steps(known), last(known)) == ([20, 40, 30, 35], 35)
    older = {info.step: found.step for info in known if (found := next_older(known, info.id, 0.0))}
    assert older == {40: 20, 30: 20, 35: 30}, "what was left behind is never offered"


def test_of_several_saves_at_one_step_the_later_is_the_newer_past_the_ninth(run_dir: RunDir) -> None:
    for number, time in ((9, 900.0), (10, 800.0)):
        saved(run_dir, 50, 1, time, number=number)
    found = pick(list_checkpoints(run_dir.checkpoints), "50")
    assert found is not None
    assert found.id == "step-00000050-1.10"


def test_one_without_a_manifest_has_its_place_by_its_id_and_a_foreign_id_by_the_clock() -> None:
    info = CheckpointInfo(id="step-00000110-2.3", step=110, time=940.0, bytes=1, incarnation=2)
    assert precedes(info, "step-00000120-2.4", 100.0)
    assert precedes(info, "step-00000020-2.4", 100.0), "after a rollback"
    assert not precedes(info, "step-00000100-1.9", 1000.0)
    assert precedes(info, "mine", 1000.0)
    assert not precedes(info, "mine", 900.0)
