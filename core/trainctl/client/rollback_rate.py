"""The learning rate behind a rollback, for its plan: the first group's, as everywhere that one rate is shown."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainctl.client.session import Session
from trainctl.wire.messages import CheckpointInfo, CommandUpdate, Event, LrState

_EVENTS = 2000  # the most that one answer holds


@dataclass(frozen=True, kw_only=True)
class RateThen:
    """Of the first step behind a checkpoint, as recorded; None where that is not known.

    `scheduled`: as the schedule gave it. `effective`: under what operators had set when the checkpoint was saved.
    """

    scheduled: float | None = None
    effective: float | None = None


async def rate_then(session: Session, target: CheckpointInfo) -> RateThen:
    """Raises `ClientError`."""
    state = session.model.state
    own = await _values_behind(session, target, target.incarnation)
    scheduled = own.get("lr_scheduled")
    if scheduled is None and not target.abandoned:
        scheduled = (await _values_behind(session, target, None)).get("lr_scheduled")
        if scheduled is None and state is not None and state.step == target.step:
            scheduled = state.lr.scheduled  # that step has not begun
    effective = own.get("lr")  # another start's would be under what operators had set by then
    if effective is not None:
        events = await session.events(kinds=["command"], from_step=target.step, limit=_EVENTS)
        effective = None if _changed_at(target, events) else effective
    return RateThen(scheduled=scheduled, effective=effective)


async def _values_behind(session: Session, target: CheckpointInfo, incarnation: int | None) -> dict[str, float]:
    """The rates of the first step behind a target, in one incarnation or on the live branch."""
    step = target.step + 1
    found = await session.history(["lr", "lr_scheduled"], from_step=step, to_step=step, incarnation=incarnation)
    return {
        name: value
        for name, points in found.items()
        for at, value, number in zip(
            *(points.columns[key].tolist() for key in ("step", "value", "incarnation")), strict=True
        )
        if at == step and incarnation in {None, number}
    }


def lr_after(
    now: LrState, then: RateThen, *, lr_scale: float | None = None, restore_overrides: bool = False
) -> float | None:
    """The effective rate of the first step behind a rollback; None where it is not known.

    A factor that is asked for takes the place of whatever is set; else the present rule stays, or gives way to the
    checkpoint's.
    """
    if lr_scale is not None:
        return None if then.scheduled is None else then.scheduled * lr_scale
    if restore_overrides:
        return then.effective
    match now.rule:
        case "pin":
            return now.value
        case "scale" if then.scheduled is not None and now.value is not None:
            return then.scheduled * now.value
        case "free":
            return then.scheduled
        case _:
            return None


def _changed_at(target: CheckpointInfo, events: Sequence[Event]) -> bool:
    """Whether the rate was set, or a trial of it undone, at the very boundary of the save: before it, or behind it?"""
    if len(events) >= _EVENTS:
        return True  # the oldest are missing
    return any(
        event.step == target.step
        and event.incarnation == target.incarnation
        and isinstance(event, CommandUpdate)
        and event.state == "applied"
        and event.command.startswith("lr ")
        for event in events
    )
