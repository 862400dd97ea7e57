"""What a rollback would leave behind: how many steps, how long they took, on how many devices.

A step's time is the metric `step_time_s` that each step's mark brings. It is measured between boundaries, so what
happens at one (a pause, a command, the copying of a checkpoint) is not in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainctl.client.figures import two_decimals
from trainctl.client.model import RunModel
from trainctl.client.session import Session
from trainctl.wire.commands import Act, Rollback, option_off, too_many_to_skip
from trainctl.wire.lineage import Branch, live_steps
from trainctl.wire.messages import CheckpointInfo, Event, RankFigures, RolledBack, StateChanged

if TYPE_CHECKING:
    from trainctl.client.points import Points

_STEP_TIME = "step_time_s"
_BUCKETS = 256  # sums over buckets are exact, so few do
_EVENTS = 2000  # the most that one answer holds


@dataclass(frozen=True, kw_only=True)
class LostWork:
    """Of the live branch after a target. `seconds` without pauses; `gpu_hours` counts one device for each rank.

    None where it is not known: fewer than half of the steps have a recorded time, or how many ranks made them is
    recorded nowhere. Steps without a time count as the mean of the others.
    """

    steps: int | None
    seconds: float | None = None
    gpu_hours: float | None = None

    def hours_text(self, ranks: Iterable[RankFigures]) -> str:
        """`1.30 GPU-hours`, `rank-hours` where the ranks say that they have no GPU, `GPU-hours n/a`."""
        known = list(ranks)
        unit = "rank-hours" if known and not any(rank.gpu_uuid for rank in known) else "GPU-hours"
        if self.gpu_hours is None:
            return f"{unit} n/a"
        return f"under 0.01 {unit}" if 0 < self.gpu_hours < 0.01 else f"{two_decimals(self.gpu_hours)} {unit}"


def why_not(action: Act, model: RunModel) -> str | None:
    """Why the run would refuse this rollback, as far as that can be told from what is known of it; or None."""
    info = model.info
    if not isinstance(action, Rollback) or info is None:
        return None
    if (off := option_off(action, info.capabilities)) is not None:
        return off
    first = model.ranks.get(0)
    if model.total_steps is None or first is None or first.data_first is None or first.data_last is None:
        return None
    return too_many_to_skip(action, model.total_steps, first.data_last - first.data_first + 1)


async def lost_work(session: Session, target: CheckpointInfo, known: Sequence[CheckpointInfo]) -> LostWork:
    """What going back to `target` leaves of what was trained until now; `known` are the run's checkpoints.

    Raises `ClientError`.
    """
    state = session.model.state
    assert state is not None
    events = await session.events(kinds=["rollback", "state"], limit=_EVENTS)
    since = _shared_step(events, target, state.incarnation, known) if target.abandoned else target.step
    if since is None:
        return LostWork(steps=None)
    steps = max(0, state.step - since)
    if steps == 0:
        return LostWork(steps=0, seconds=0.0, gpu_hours=0.0)
    found = await session.history([_STEP_TIME], from_step=since + 1, to_step=state.step, points=_BUCKETS)
    timed = _seconds(found[_STEP_TIME]) if _STEP_TIME in found else {}
    recorded = sum(count for count, _ in timed.values())
    if 2 * recorded < steps:
        return LostWork(steps=steps)
    whole = steps / recorded
    ranks = _ranks(known)
    if session.model.info is not None:
        ranks[state.incarnation] = session.model.info.world_size
    _share(ranks, events)
    complete = all(ranks.get(incarnation) for incarnation in timed)
    return LostWork(
        steps=steps,
        seconds=whole * sum(seconds for _, seconds in timed.values()),
        gpu_hours=whole * sum(ranks[number] * seconds for number, (_, seconds) in timed.items()) / 3600
        if complete
        else None,
    )


def _seconds(points: "Points") -> dict[int, tuple[int, float]]:
    """Of each incarnation how many steps have a time, and the sum of these."""
    found: dict[int, tuple[int, float]] = {}
    columns = points.columns
    for incarnation, count, bad, mean in zip(
        *(columns[name].tolist() for name in ("incarnation", "count", "nonfinite", "mean")), strict=True
    ):
        before, seconds = found.get(incarnation, (0, 0.0))
        if count > bad:
            found[incarnation] = (before + count - bad, seconds + mean * (count - bad))
    return found


def _ranks(known: Sequence[CheckpointInfo]) -> dict[int, int]:
    """How many ranks each incarnation had, as far as checkpoints tell."""
    return {info.incarnation: info.world_size for info in known if info.world_size}


def _share(ranks: dict[int, int], events: Sequence[Event]) -> None:
    """A rollback keeps the ranks: what is known of the incarnation on one side of it is true of the other."""
    backs = [event for event in events if isinstance(event, RolledBack)]
    for back in [*backs, *reversed(backs)]:
        for one, other in ((back.from_incarnation, back.incarnation), (back.incarnation, back.from_incarnation)):
            if one in ranks:
                ranks.setdefault(other, ranks[one])


def _shared_step(
    events: Sequence[Event], target: CheckpointInfo, incarnation: int, known: Sequence[CheckpointInfo]
) -> int | None:
    """The last step that the live branch has in common with an abandoned target's; None where it is not known."""
    if len(events) >= _EVENTS:
        return None  # the oldest are missing
    began = {number: Branch(incarnation=number) for number in (incarnation, target.incarnation)}
    branches = began | _branches(events, known)
    live, left = (
        live_steps({number: branch for number, branch in branches.items() if number <= newest})
        for newest in (incarnation, target.incarnation)
    )
    ends = [min(live[number], left[number], target.step) for number in live.keys() & left.keys()]
    return int(max(ends)) if ends else None


def _branches(events: Sequence[Event], known: Sequence[CheckpointInfo]) -> dict[int, Branch]:
    """Where each incarnation began, as the run's events tell it."""
    saved_in = {info.id: info.incarnation for info in known}
    found: dict[int, Branch] = {}
    for event in events:
        if isinstance(event, RolledBack):
            parent = event.parent
            if parent is None:
                parent = saved_in.get(event.checkpoint, event.from_incarnation)
        elif isinstance(event, StateChanged) and event.state == "starting":
            parent = event.parent
            if parent is None:
                parent = max((number for number in found if number < event.incarnation), default=0)
        else:
            continue
        branch = Branch(incarnation=event.incarnation, parent=parent, after_step=event.step)
        found.setdefault(event.incarnation, branch)
    return found
