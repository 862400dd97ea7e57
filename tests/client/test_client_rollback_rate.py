"""The learning rate that a rollback's plan promises: what the rank will use, or n/a."""

import asyncio
import time

import pytest
from scripted_hub import ScriptedHub, hub, make_checkpoint, rows

from trainctl.client.rollback_rate import RateThen, lr_after, rate_then
from trainctl.client.session import open_session
from trainctl.wire.lineage import Branch, record_branch
from trainctl.wire.manifest import pick
from trainctl.wire.messages import CommandUpdate, LrState, StateChanged
from trainctl.wire.rundir import RunDir

SCHEDULED, SCALED = 0.1, 0.5  # of every step, and a thousandth of its number on top


def then(target: str) -> RateThen:
    async def scenario() -> RateThen:
        session = await open_session(None)
        try:
            await session.picture()
            found = pick((await session.checkpoints()).checkpoints, target)
            assert found is not None
            return await rate_then(session, found)
        finally:
            await session.close()

    return asyncio.run(scenario())


def trained(running: ScriptedHub, first: int, last: int, incarnation: int = 1) -> None:
    running.publish(rows(first, last, incarnation, lr=SCALED, lr_scheduled=SCHEDULED))
    running.set_state(step=last, incarnation=incarnation)


def test_a_rate_that_is_set_stays_a_factor_goes_with_the_schedule_and_what_is_unknown_is_no_number() -> None:
    recorded = RateThen(scheduled=0.2, effective=0.02)
    pinned = LrState(scheduled=0.1, effective=0.05, rule="pin", value=0.05)
    assert lr_after(pinned, recorded) == lr_after(pinned, RateThen()) == 0.05
    assert lr_after(LrState(scheduled=0.1, effective=0.05, rule="scale", value=0.5), recorded) == 0.1
    assert lr_after(LrState(scheduled=0.0, effective=0.0, rule="scale", value=0.5), recorded) == 0.1, "in a warm-up"
    assert lr_after(LrState(scheduled=0.1, effective=0.1, rule="free"), recorded) == 0.2
    assert lr_after(LrState(scheduled=0.1, effective=0.05), recorded) is None, "the rule is not told"
    assert lr_after(pinned, recorded, lr_scale=0.25) == lr_after(
        pinned, recorded, lr_scale=0.25, restore_overrides=True
    )
    assert lr_after(pinned, recorded, lr_scale=0.25) == 0.05
    assert lr_after(pinned, recorded, restore_overrides=True) == 0.02
    assert lr_after(pinned, RateThen(scheduled=0.2), restore_overrides=True) is None
    assert lr_after(pinned, RateThen(), lr_scale=0.25) is None


def test_it_is_the_recorded_rate_of_the_very_step_behind_the_checkpoint() -> None:
    with hub() as running:
        for step in (10, 20):
            make_checkpoint(running.info, f"step-{step}", step)
        trained(running, 1, 20)
        assert then("10") == RateThen(scheduled=SCHEDULED + 0.011, effective=SCALED + 0.011)
        running.set_state(lr=LrState(scheduled=0.3, effective=0.4))
        assert then("20") == RateThen(scheduled=0.3), "no step is behind it yet: the schedule's next is known"
        running.set_state(step=21)
        assert then("20") == RateThen(), "and a neighbour's rate is not taken for it"


def test_with_a_change_at_the_saves_own_boundary_the_checkpoints_rate_is_not_known() -> None:
    with hub() as running:
        make_checkpoint(running.info, "step-10", 10)
        trained(running, 1, 20)
        change = CommandUpdate(
            time=time.time(), step=11, incarnation=1, id="c", command="lr set", args={}, actor="a", state="applied"
        )  # fmt: skip
        running.publish(change)
        assert then("10").effective == pytest.approx(SCALED + 0.011)
        running.publish(
            CommandUpdate(**{name: getattr(change, name) for name in change.__struct_fields__} | {"step": 10})
        )
        assert then("10") == RateThen(scheduled=SCHEDULED + 0.011)


def test_another_start_made_the_next_step_under_what_was_set_by_then() -> None:
    with hub() as running:
        make_checkpoint(running.info, "step-10", 10)
        trained(running, 1, 10)
        running.publish(StateChanged(time=time.time(), step=10, incarnation=2, state="starting", attempt=2, parent=1))
        trained(running, 11, 20, incarnation=2)
        assert then("10") == RateThen(scheduled=SCHEDULED + 0.011)


def test_of_a_branch_that_was_left_it_is_that_branchs_rate() -> None:
    with hub() as running:
        make_checkpoint(running.info, "step-20", 20)
        trained(running, 1, 30)
        run_dir = RunDir(running.info.dir)
        record_branch(run_dir, Branch(incarnation=1))
        record_branch(run_dir, Branch(incarnation=2, parent=1, after_step=10))
        running.publish(rows(11, 40, 2, lr=7.0, lr_scheduled=8.0))
        running.set_state(step=40, incarnation=2)
        make_checkpoint(running.info, "step-10", 10)
        assert then("10") == RateThen(scheduled=SCHEDULED + 0.011, effective=SCALED + 0.011), (
            "and of one left from here"
        )
        assert then("step-20") == RateThen(scheduled=SCHEDULED + 0.021, effective=SCALED + 0.021)
