"""Checkpoints on disk and states in the ranks' memory, as one list: what an operator can roll back to now."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from trainctl.wire.lineage import live_steps, read_branches
from trainctl.wire.manifest import list_checkpoints
from trainctl.wire.messages import CheckpointInfo
from trainctl.wire.rundir import RunDir
from trainctl.wire.save_order import order_of


def list_with_memory(checkpoints: Path, in_memory: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
    """`list_checkpoints` of a run's directory, with what rank 0 says is in memory; oldest first. Reads the directory.

    What was deleted on disk, or could not be written, is listed with `where` "memory" for as long as it is there.
    """
    held = {info.id: info for info in in_memory}
    found = [msgspec.structs.replace(info, in_memory=info.id in held) for info in list_checkpoints(checkpoints)]
    only = [held[name] for name in held.keys() - {info.id for info in found}]
    if only:
        live = live_steps(read_branches(RunDir(checkpoints.parent)))
        for info in only:
            abandoned = bool(live) and info.step > live.get(info.incarnation, -1)
            found.append(msgspec.structs.replace(info, where="memory", in_memory=True, abandoned=abandoned))
    return sorted(found, key=order_of)
