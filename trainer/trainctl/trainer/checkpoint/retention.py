"""Which checkpoints may go: a policy, a pure function of what is there, and its execution in the run's directory."""

import contextlib
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainctl.trainer.checkpoint.errors import CheckpointError
from trainctl.wire.manifest import UnreadCheckpoint, list_checkpoints, ranked
from trainctl.wire.messages import BestBy, CheckpointInfo, Trouble
from trainctl.wire.removal import last_good, remove, remove_marks, verify_last_good

KEEP_LAST = 5


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What is kept of a run's checkpoints; all that none of these keeps is deleted once a newer one was verified.

    `last`: the newest so many · `best`: the best so many by `metric` and `mode`; without a metric `val_loss`, else
    `loss` · `every`: those of each so many steps · `healthy_steps`: the newest one after which the run went on for so
    many steps without trouble. Kept besides, whatever these say: the last good one, pinned ones, and what a rollback
    goes back to. Raises ValueError or TypeError for what cannot be meant.
    """

    last: int = KEEP_LAST
    best: int = 1
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    every: int | None = None
    healthy_steps: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("last", 1), ("best", 0), ("every", 1), ("healthy_steps", 1)):
            value = getattr(self, name)
            if value is None and name in {"every", "healthy_steps"}:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Retention({name}=…) takes a whole number, not {value!r}")
            if value < least:
                raise ValueError(f"Retention({name}={value}): give {least} or more")
        if self.metric is not None and (not isinstance(self.metric, str) or not self.metric):
            raise TypeError(f"Retention(metric=…) takes a metric's name, not {self.metric!r}")
        if self.mode not in {"min", "max"}:
            raise ValueError(f'Retention(mode={self.mode!r}): give "min" or "max"')
        if self.mode == "max" and self.metric is None:
            raise ValueError('Retention(mode="max") needs the metric: Retention(metric="accuracy", mode="max")')

    @property
    def best_by(self) -> BestBy:
        """What `best` means, as hub and clients are told."""
        return BestBy(metric=self.metric, mode=self.mode)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the run is on its live branch, and where it was not healthy. `live` is `lineage.live_steps`."""

    step: int = 0
    troubles: Sequence[Trouble] = ()
    live: Mapping[int, float] | None = None


def expired(
    checkpoints: Sequence[CheckpointInfo],
    policy: Retention | None = None,
    *,
    progress: Progress | None = None,
    protected: Collection[str] = (),
) -> list[str]:
    """The ids that retention lets go, oldest first. `checkpoints` is oldest first, as `list_checkpoints` gives it.

    Nothing goes that is not older than the last good one. Those that a rollback left behind count for `last` alone.
    """
    policy, progress = policy or Retention(), progress or Progress()
    good = last_good(checkpoints)
    if good is None or good.abandoned:
        return []  # nothing on the live branch could take their place
    whole = [info for info in checkpoints if info.verified is not False]
    live = [info for info in whole if not info.abandoned]
    keep = {info.id for kind in (whole, live) for info in kind[-policy.last :]}
    keep |= {info.id for info in ranked(checkpoints, policy.best_by)[: policy.best]}
    keep |= {info.id for info in live if policy.every is not None and info.step % policy.every == 0}
    keep |= {info.id for info in checkpoints if info.pinned}
    if policy.healthy_steps is not None:
        keep |= {info.id for info in known_good(live, policy.healthy_steps, progress)[-1:]}
    older = checkpoints[: checkpoints.index(good)]
    return [info.id for info in older if info.id not in keep and info.id not in protected]


def known_good(checkpoints: Sequence[CheckpointInfo], healthy_steps: int, progress: Progress) -> list[CheckpointInfo]:
    """Those of the live branch after which the run went on for `healthy_steps` steps, none of them with trouble.

    Trouble at the checkpoint's own step counts. Trouble on a branch that was left does not.
    """
    spans = [span for trouble in progress.troubles if (span := _on_live_branch(trouble, progress.live)) is not None]

    def healthy(info: CheckpointInfo) -> bool:
        end = info.step + healthy_steps
        return progress.step >= end and not any(first <= end and last >= info.step for first, last in spans)

    return [info for info in checkpoints if not info.abandoned and info.verified is not False and healthy(info)]


def _on_live_branch(trouble: Trouble, live: Mapping[int, float] | None) -> tuple[float, float] | None:
    """First and last step of the part that the live branch has of it."""
    limit = math.inf if not live else live.get(trouble.incarnation, -math.inf)
    last = min(math.inf if trouble.last is None else trouble.last, limit)
    return (trouble.first, last) if trouble.first <= last else None


def prune(
    directory: Path,
    policy: Retention | None = None,
    *,
    progress: Progress | None = None,
    protected: Collection[str] = (),
    removing: Callable[[Path, str], bool] | None = None,
) -> list[CheckpointInfo]:
    """Delete what `expired` names; those that went. Nothing goes unless the last good one verifies first.

    `removing` deletes one, or says False where it is not to go after all. It reads files and may take long: call it off
    the training thread, on rank 0 only. Raises CheckpointError (nothing was deleted) or OSError (the rest is kept).
    """
    checkpoints = list_checkpoints(directory)
    if not expired(checkpoints, policy, progress=progress, protected=protected):
        return []
    try:
        damaged = verify_last_good(directory)
    except UnreadCheckpoint as error:
        raise CheckpointError(f"{error}; no older checkpoint was deleted") from None
    if damaged:
        raise CheckpointError(f"{', '.join(sorted(damaged))} turned out to be damaged; no older checkpoint was deleted")
    checkpoints = list_checkpoints(directory)  # verifying takes its time: what was pinned meanwhile stays
    doomed = set(expired(checkpoints, policy, progress=progress, protected=protected))
    return [info for info in checkpoints if info.id in doomed and (removing or _removed)(directory, info.id)]


def _removed(directory: Path, checkpoint_id: str) -> bool:
    remove(directory, checkpoint_id)
    return True


def sweep(directory: Path) -> list[str]:
    """Remove what a crash left: stage directories, half-deleted ones and half-written marks. The names that went."""
    left = [path for pattern in (".*.stage", ".*.gone") for path in directory.glob(pattern) if path.is_dir()]
    marks = list(directory.glob(".*.checked.json.*.new"))
    # A leftover that cannot be removed takes space and nothing else: listings never show it.
    for path in left:
        checkpoint_id = path.name.removeprefix(".").removesuffix(".gone")
        with contextlib.suppress(OSError):
            if path.suffix == ".gone" and not (directory / checkpoint_id).exists():
                remove_marks(directory, checkpoint_id)
            shutil.rmtree(path)
    for path in marks:
        with contextlib.suppress(OSError):
            path.unlink()
    return [path.name for path in (*left, *marks)]
