"""What a rollback left behind is never `last`, `best` or what a restart goes back to."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from trainctl.wire.lineage import Branch, live_steps, read_branches, record_branch
from trainctl.wire.manifest import Manifest, list_checkpoints, pick, write_manifest
from trainctl.wire.rundir import RunDir


def test_the_live_branch_is_the_newest_and_what_it_grew_out_of() -> None:
    branches = [Branch(incarnation=1), Branch(incarnation=2, parent=1, after_step=20)]
    branches += [Branch(incarnation=3, parent=1, after_step=10), Branch(incarnation=4, parent=3, after_step=30)]
    assert live_steps({branch.incarnation: branch for branch in branches}) == {4: float("inf"), 3: 30, 1: 10}
    assert live_steps({}) == {}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 100)), min_size=1, max_size=6))
def test_any_history_has_a_newest_branch_and_limits_that_only_shrink(parents: list[tuple[int, int]]) -> None:
    branches = {
        number: Branch(incarnation=number, parent=min(parent, number - 1), after_step=step)
        for number, (parent, step) in enumerate(parents, start=1)
    }
    limits = live_steps(branches)
    assert limits[max(branches)] == float("inf")
    assert list(limits.values()) == sorted(limits.values(), reverse=True)


def test_last_best_and_a_step_mean_the_live_branch(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    for at, (step, incarnation, loss) in enumerate([(20, 1, 3.0), (40, 1, 1.0), (40, 2, 2.5)]):
        directory = run_dir.checkpoints / f"step-{step}-{incarnation}"
        directory.mkdir()
        write_manifest(
            directory,
            Manifest(
                id=directory.name, run="r", step=step, incarnation=incarnation, attempt=1, world_size=1, time=float(at),
                files=[], metrics={"loss": loss},
            ),
        )  # fmt: skip
    record_branch(run_dir, Branch(incarnation=1))
    assert [info.abandoned for info in list_checkpoints(run_dir.checkpoints)] == [False, False, True]
    record_branch(run_dir, Branch(incarnation=2, parent=1, after_step=20))
    assert read_branches(run_dir).keys() == {1, 2}
    known = list_checkpoints(run_dir.checkpoints)
    assert [info.abandoned for info in known] == [False, True, False]
    picked = {target: found.id for target in ("last", "best", "40") if (found := pick(known, target))}
    assert picked == {"last": "step-40-2", "best": "step-40-2", "40": "step-40-2"}
    abandoned = pick(known, "step-40-1")
    assert abandoned is not None, "by its id it can still be had"
