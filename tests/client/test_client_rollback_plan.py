"""What a rollback would leave behind: over a real hub's history, whatever branches, ranks and gaps there are in it."""

import asyncio
import time

import msgspec
import pytest
from scripted_hub import ScriptedHub, hub, make_checkpoint, rows

from trainctl.client.rollback_plan import LostWork, lost_work
from trainctl.client.session import open_session
from trainctl.wire.lineage import Branch, record_branch
from trainctl.wire.manifest import pick
from trainctl.wire.messages import RankFigures, RolledBack, StateChanged
from trainctl.wire.rundir import RunDir

STEP_S = 1.0


def trained(running: ScriptedHub, first: int, last: int, incarnation: int) -> None:
    """Steps of `STEP_S` and a thousandth of their number each."""
    running.publish(rows(first, last, incarnation, step_time_s=STEP_S))
    running.set_state(step=last, incarnation=incarnation)


def rolled_back(running: ScriptedHub, to: int, incarnation: int, checkpoint: str) -> None:
    before = running.state
    record_branch(RunDir(running.info.dir), Branch(incarnation=incarnation, parent=before.incarnation, after_step=to))
    running.publish(
        RolledBack(
            time=time.time(),
            step=to,
            incarnation=incarnation,
            from_step=before.step,
            from_incarnation=before.incarnation,
            checkpoint=checkpoint,
        )
    )
    running.set_state(step=to, incarnation=incarnation)


def lost(target: str) -> LostWork:
    async def scenario() -> LostWork:
        session = await open_session(None)
        try:
            await session.picture()
            known = (await session.checkpoints()).checkpoints
            found = pick(known, target)
            assert found is not None
            return await lost_work(session, found, known)
        finally:
            await session.close()

    return asyncio.run(scenario())


def took(*steps: range) -> float:
    return sum(STEP_S + step / 1000 for span in steps for step in span)


def test_it_is_the_recorded_time_of_the_live_branch_times_its_ranks() -> None:
    with hub() as running:
        make_checkpoint(running.info, "step-10", 10)
        trained(running, 1, 40, 1)
        rolled_back(running, 20, 2, "step-20")
        trained(running, 21, 50, 2)
        found = lost("10")
    assert found.steps == 40, "steps 21 to 40 of the first branch were lost before, and are not lost again"
    assert found.seconds == pytest.approx(took(range(11, 51)))
    assert found.gpu_hours == pytest.approx(2 * took(range(11, 51)) / 3600)


def test_from_an_abandoned_target_it_counts_from_where_the_branches_part() -> None:
    with hub() as running:
        make_checkpoint(running.info, "step-20", 20)
        make_checkpoint(running.info, "step-30", 30)
        trained(running, 1, 40, 1)
        rolled_back(running, 20, 2, "step-20")
        trained(running, 21, 50, 2)
        found = lost("step-30")
    assert found.steps == 30, "step 30 of the first branch is no step of the live one, which left at 20"
    assert found.seconds == pytest.approx(took(range(21, 51)))


def test_after_a_restart_each_step_counts_with_the_ranks_that_made_it() -> None:
    with hub() as running:
        make_checkpoint(running.info, "step-10", 10)  # by 2 ranks
        trained(running, 1, 20, 1)
        running.publish(StateChanged(time=time.time(), step=20, incarnation=2, state="starting", attempt=2))
        trained(running, 21, 30, 2)
        running.record.info = msgspec.structs.replace(running.info, world_size=4)
        found = lost("10")
    assert found.gpu_hours == pytest.approx((2 * took(range(11, 21)) + 4 * took(range(21, 31))) / 3600)


def test_what_is_not_known_is_not_a_number() -> None:
    with hub() as running:
        make_checkpoint(running.info, "step-10", 10)
        running.publish(rows(1, 60, 1, loss=1.0))
        running.set_state(step=60)
        assert lost("10") == LostWork(steps=50), "no step has a time"
        running.publish(rows(41, 60, 1, step_time_s=STEP_S))
        assert lost("10") == LostWork(steps=50), "20 of 50 say little of the others"
        running.publish(rows(61, 80, 1, step_time_s=STEP_S))
        running.set_state(step=80)
        found = lost("10")
        assert found.seconds == pytest.approx(took(range(41, 81)) * 70 / 40), "the others count as the mean of these"


def test_where_no_rank_has_a_gpu_its_hours_are_not_called_a_gpus() -> None:
    def rank(gpu: str | None) -> RankFigures:
        return RankFigures(rank=0, node="n", pid=1, state="running", step=1, time=0.0, gpu_uuid=gpu)

    known = LostWork(steps=1, seconds=1.0, gpu_hours=1.5)
    assert known.hours_text([rank("GPU-1")]) == known.hours_text([]) == "1.50 GPU-hours"
    assert known.hours_text([rank(None)]) == "1.50 rank-hours"
    assert LostWork(steps=1).hours_text([rank("GPU-1")]) == "GPU-hours n/a"
