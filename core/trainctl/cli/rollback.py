"""`trainctl rollback`: shown as a plan first."""

import asyncio

import click
import msgspec

from trainctl.cli.acting import act, opened
from trainctl.cli.checkpoint import picked
from trainctl.cli.checkpoint_list import loss_of
from trainctl.cli.options import Asked, acting_options
from trainctl.client.commanding import make_command
from trainctl.client.errors import Rejected
from trainctl.client.figures import duration, plain, scientific
from trainctl.client.jsonable import dumps, jsonable
from trainctl.client.rollback_plan import lost_work, why_not
from trainctl.client.rollback_rate import lr_after, rate_then
from trainctl.client.session import Session
from trainctl.wire.commands import Rollback
from trainctl.wire.manifest import resized_words
from trainctl.wire.save_order import next_older


class RollbackPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a rollback would do, from what is known now; None where something is not known. `lr` is effective."""

    run: str
    target: str
    checkpoint: str
    verified: bool | None
    in_memory: bool
    from_step: int
    to_step: int
    steps_lost: int | None
    time_lost_s: float | None  # what these steps took, pauses excluded
    gpu_hours_lost: float | None  # that time × the ranks that spent it, one device each
    hours_lost: str  # the same in words
    skip_batches: int
    lr_now: float | None
    lr_after: float | None
    metrics: dict[str, float]
    overrides: dict[str, str]  # what operators have set, in words
    restore_overrides: bool  # whether the checkpoint's take their place
    written_by: int = 0  # ranks; 0: not known
    world_size: int = 0  # ranks that there are now

    def text(self) -> str:
        words = f"{self.run}: from step {self.from_step} back to {self.to_step} ({self.checkpoint}"
        words += f", {loss_of(self.metrics)})" if loss_of(self.metrics) else ")"
        words += f", {'n/a' if self.steps_lost is None else self.steps_lost} steps are left behind"
        took = f"{duration(self.time_lost_s)} of training, " if self.time_lost_s else ""
        words += f" ({took}{self.hours_lost})" if self.steps_lost != 0 else ""
        words += f", then {self.skip_batches} batches are skipped" if self.skip_batches else ""
        if self.lr_now is not None:
            after = "n/a" if self.lr_after is None else scientific(self.lr_after)
            words += f", lr {scientific(self.lr_now)} → {after}"
        if self.restore_overrides:
            words += "; what operators had set then comes back"
            words += f", and this goes: {self._set()}" if self.overrides else ""
        elif self.overrides:
            words += f"; what operators have set stays: {self._set()}"
        words += f"; {other}" if (other := resized_words(self.written_by, self.world_size)) else ""
        if self.in_memory:
            words += "; it is taken from the ranks' memory, and from disk where that changes before"
        elif self.verified is None:
            words += "; the checkpoint is verified before anything is touched"
        return words

    def _set(self) -> str:
        return ", ".join(f"{plain(name)} {plain(words)}" for name, words in sorted(self.overrides.items()))


@click.command()
@click.argument("target")
@click.option("--skip-batches", type=click.IntRange(0), default=0, metavar="N", help="Leave out N batches of data.")
@click.option("--lr-scale", type=float, metavar="F", help="Scale the learning rate from there on.")
@click.option("--restore-overrides", is_flag=True, help="Take the checkpoint's overrides instead of the present ones.")
@click.option("--dry-run", is_flag=True, help="Show the plan and do nothing.")
@acting_options()
def rollback(
    asked: Asked, target: str, skip_batches: int, lr_scale: float | None, *, restore_overrides: bool, dry_run: bool
) -> int:
    """Restore a verified checkpoint on every rank. TARGET: last, best, a step or an id."""
    action = Rollback(target=target, skip_batches=skip_batches, lr_scale=lr_scale, restore_overrides=restore_overrides)
    make_command(action)  # refuses what cannot be meant, before anybody is asked
    if dry_run:
        plan = asyncio.run(_dry_run(asked, action))
        fields = jsonable(plan)
        assert isinstance(fields, dict)
        click.echo(dumps({"command": "rollback", "dry_run": True} | fields) if asked.as_json else plan.text())
        return 0

    async def shown(session: Session) -> str:
        return (await plan_rollback(session, action)).text()

    return act(action, asked, shown)


async def _dry_run(asked: Asked, action: Rollback) -> RollbackPlan:
    async with opened(asked.run, asked.server_key) as session:
        return await plan_rollback(session, action)


async def plan_rollback(session: Session, action: Rollback) -> RollbackPlan:
    """Raises `Rejected` when the target is no checkpoint or a damaged one."""
    model = session.model
    found = (await session.checkpoints()).checkpoints
    info = picked(found, action.target, model)
    if info.verified is False and not info.in_memory:
        older = next_older(found, info.id, info.time)
        raise Rejected(
            f"checkpoint {info.id} is damaged; nothing was done",
            f"the next older one is {older.id} at step {older.step}" if older else "there is no older one",
        )
    if (why := why_not(action, model)) is not None:
        raise Rejected(why)
    state = model.state
    assert state is not None
    lost = await lost_work(session, info, found)
    after = lr_after(
        state.lr,
        await rate_then(session, info),
        lr_scale=action.lr_scale,
        restore_overrides=action.restore_overrides,
    )
    return RollbackPlan(
        run=model.name,
        target=action.target,
        checkpoint=info.id,
        verified=info.verified,
        in_memory=info.in_memory,
        from_step=state.step,
        to_step=info.step,
        steps_lost=lost.steps,
        time_lost_s=lost.seconds,
        gpu_hours_lost=lost.gpu_hours,
        hours_lost=lost.hours_text(model.ranks.values()),
        skip_batches=action.skip_batches,
        lr_now=state.lr.effective,
        lr_after=after,
        metrics=dict(info.metrics),
        # The factor that was asked for takes the place of what is set for the learning rate.
        overrides={name: words for name, words in state.overrides.items() if name != "lr" or action.lr_scale is None},
        restore_overrides=action.restore_overrides,
        written_by=info.world_size,
        world_size=model.info.world_size if model.info else 0,
    )
