"""Run by test_checkpoint_resume.py as one rank of two: `resume_ranks.py DIRECTORY RANK`.

Makes a run with checkpoints, damages copies of it in several ways and resumes each; writes what came of it, by name.
"""

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from one_rank import OneRank
from test_checkpoint_vouched import flip

from trainctl.trainer.checkpoint import Checkpointer, CheckpointError
from trainctl.trainer.identity import RankIdentity
from trainctl.trainer.resuming import resume
from trainctl.wire.lineage import Branch, record_branch
from trainctl.wire.manifest import MANIFEST, remember_check
from trainctl.wire.messages import Anomaly
from trainctl.wire.rundir import RunDir

directory, rank = Path(sys.argv[1]), int(sys.argv[2])


def one_of_two(run: Path, group: Any, *, attempt: int) -> OneRank:
    """The rank, with a checkpointer that works together with the other's."""
    own = OneRank(run, attempt=attempt)
    core = own.core
    core.place = RankIdentity(rank=rank, world_size=2, local_rank=rank, node="n")
    assert core.checkpointer is not None
    core.checkpointer = Checkpointer(
        directory=RunDir(run).checkpoints,
        run_id="one",
        rank=rank,
        world_size=2,
        group=group,
        state=core.checkpointer.state,
    )
    return own


Names = dict[int, str]
Damage = Callable[[Path, Names], None]


def whole(checkpoints: Path, ids: Names) -> None:
    pass


def newest_flipped(checkpoints: Path, ids: Names) -> None:
    flip(checkpoints / ids[6] / "rank-00001.pt")


def newest_without_manifest(checkpoints: Path, ids: Names) -> None:
    (checkpoints / ids[6] / MANIFEST).unlink()


def newest_known_next_flipped(checkpoints: Path, ids: Names) -> None:
    remember_check(checkpoints / ids[6], ok=False, text="damaged")
    flip(checkpoints / ids[6] / "__0_0.distcp")
    flip(checkpoints / ids[4] / "rank-00000.pt")


def only_the_newest_mended(checkpoints: Path, ids: Names) -> None:
    for step in (2, 4, 6):
        remember_check(checkpoints / ids[step], ok=False, text="damaged")
    for step in (2, 4):
        flip(checkpoints / ids[step] / MANIFEST)


def all_flipped(checkpoints: Path, ids: Names) -> None:
    for step in (2, 4, 6):
        flip(checkpoints / ids[step] / "rank-00001.pt")


def none_yet(checkpoints: Path, ids: Names) -> None:
    shutil.rmtree(checkpoints)
    (checkpoints / "of-somebody-else").mkdir(parents=True)


# What TRAINCTL_RESUME is, and what is damaged before.
SCENARIOS: dict[str, tuple[str | None, Damage]] = {
    "whole": (None, whole),
    "newest flipped": (None, newest_flipped),
    "newest flipped, last asked for": ("last", newest_flipped),
    "newest without manifest": ("1", newest_without_manifest),
    "newest known, next flipped": (None, newest_known_next_flipped),
    "only the newest mended": (None, only_the_newest_mended),
    "all flipped": (None, all_flipped),
    "step named and flipped": ("6", newest_flipped),
    "none yet": (None, none_yet),
}


def make(run: Path, group: Any) -> Names:
    """Checkpoints at 2, 4 and 6 on the live branch, and a newer one at 8 that was rolled back from."""
    training = one_of_two(run, group, attempt=1)
    ids = {}
    for _ in range(4):
        training.train(2)
        ids[training.step] = training.save()
    if rank == 0:
        record_branch(RunDir(run), Branch(incarnation=1, parent=0, after_step=0))
        record_branch(RunDir(run), Branch(incarnation=2, parent=1, after_step=6))
    return ids


def outcome(run: Path, group: Any) -> dict[str, Any]:
    own = one_of_two(run, group, attempt=3)
    try:
        step = resume(own.core, group)
    except CheckpointError as error:
        return {"error": str(error)}
    told = [event.text for event in own.core.events if isinstance(event, Anomaly) and event.what == "resume"]
    weight = [group_["params"][0].detach().sum().item() for group_ in own.optimizer.param_groups]
    return {"step": step, "from": own.core.resumed_from, "told": told, "weight": weight}


def main() -> None:
    logging.basicConfig(stream=(directory / f"log-{rank}").open("w"), level=logging.WARNING)
    meeting = f"file://{directory}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    ids = make(directory / "made", group)
    outcomes = {}
    for name, (asked, damage) in SCENARIOS.items():
        run = directory / name
        if rank == 0:
            shutil.copytree(directory / "made", run)
            damage(RunDir(run).checkpoints, ids)
        dist.barrier(group=group)
        os.environ.pop("TRAINCTL_RESUME", None)
        if asked is not None:
            os.environ["TRAINCTL_RESUME"] = asked
        outcomes[name] = [outcome(run, group), outcome(run, group)]
    (directory / f"outcomes-{rank}").write_text(json.dumps({"ids": ids, "outcomes": outcomes}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
