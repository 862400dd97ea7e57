"""From which checkpoint an unattended start goes on when the newest is damaged, and how that is told."""

from dataclasses import dataclass
from pathlib import Path

from trainctl.trainer.core import Core
from trainctl.wire.manifest import list_checkpoints, pick, unreadable
from trainctl.wire.messages import BestBy
from trainctl.wire.save_order import order_of, precedes

_LAST = {None, "", "1", "last"}


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A checkpoint that was found to be damaged before this start. `time`: when it was last changed, Unix seconds."""

    id: str
    time: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What rank 0 finds, for all ranks: `candidates` in the order in which they are to be tried."""

    candidates: list[str]
    damaged: list[Damaged]
    named: bool


def choice(checkpoints: Path, asked: str | None, best_by: BestBy | None = None) -> Choice:
    """The one that was asked for, or all of the live branch: the newest first, known damage last.

    `best_by` says which one `best` is.

    What was found to be damaged is tried again when nothing else is left, for it may have been the file system that
    failed. So a run that has checkpoints never begins anew by itself.
    """
    known = list_checkpoints(checkpoints)
    if asked not in _LAST:
        target = pick(known, str(asked), best_by)
        names = [target.id] if target is not None else [name for name, _, _ in unreadable(checkpoints) if name == asked]
        return Choice(candidates=names, damaged=[], named=True)
    live = [info for info in reversed(known) if not info.abandoned]
    found_bad = [info for info in live if info.verified is False]
    damaged = [Damaged(id=info.id, time=info.time, reason=f"{info.id} did not verify earlier") for info in found_bad]
    damaged += [Damaged(id=name, time=time, reason=reason) for name, time, reason in unreadable(checkpoints)]
    good = [info.id for info in live if info.verified is not False]
    return Choice(candidates=good + [info.id for info in found_bad], damaged=damaged, named=False)


def tell(core: Core, taken: str, failed: dict[str, str], known: list[Damaged]) -> None:
    """Say what was passed over, to the log and to the operator: what failed now, and what was damaged and is newer."""
    if not core.place.leads or core.checkpointer is None:
        return
    for checkpoint, reason in (newer_than(core.checkpointer.directory, taken, known) | failed).items():
        core.complain(
            "resume",
            f"checkpoint {checkpoint} cannot be resumed from: {_short(reason)}. Resumed from {taken} instead, at step "
            f"{core.boundary.completed}",
        )


def newer_than(checkpoints: Path, taken: str, known: list[Damaged]) -> dict[str, str]:
    """Of the damaged ones those that are newer than the one taken, with the reason. Reads the directory."""
    listed = {info.id: info for info in list_checkpoints(checkpoints)}

    def newer(damaged: Damaged) -> bool:
        if damaged.id == taken or taken not in listed:
            return damaged.id != taken
        if damaged.id in listed:
            return order_of(listed[damaged.id]) > order_of(listed[taken])
        return precedes(listed[taken], damaged.id, damaged.time)

    return {damaged.id: damaged.reason for damaged in known if newer(damaged)}


def none_left(failed: dict[str, str], known: list[Damaged]) -> str:
    """Why there is nothing to go on from, and what to do."""
    reasons = {damaged.id: damaged.reason for damaged in known} | failed
    listed = "; ".join(f"{checkpoint}: {_short(reason)}" for checkpoint, reason in reasons.items())
    return (
        f"no checkpoint of this run can be resumed from ({listed}). Nothing was changed. Put a whole copy in "
        "its place, name another one (trainctl checkpoint ls; TRAINCTL_RESUME=ID), or begin a new run"
    )


def _short(reason: str) -> str:
    """Without the advice for an operator who asked for this checkpoint."""
    return reason.partition("; nothing was changed")[0]
