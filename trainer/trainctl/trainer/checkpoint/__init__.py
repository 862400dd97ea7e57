"""Checkpoints of a training run: taken at a boundary, written in the background, verified before they are restored.

checkpointer = Checkpointer(directory=…, run_id=…, rank=…, world_size=…, group=…, state=State(models=[model], …))
pending = checkpointer.begin_save(id="step-00000500-3", step=500, incarnation=1, attempt=1, metrics={}, note=None)
…train on; later…            pending.done() → pending.result()
loaded = checkpointer.load("step-00000500-3")   # every rank; verifies, reads into new host memory, changes nothing
checkpointer.commit(loaded)                     # assignment only
…make the data iterator anew…
loaded.restore_rng()
"""

from trainctl.trainer.checkpoint.checkpointer import MEMORY_CHECKPOINTS, Checkpointer
from trainctl.trainer.checkpoint.errors import CheckpointError
from trainctl.trainer.checkpoint.load import Loaded
from trainctl.trainer.checkpoint.retention import Progress, Retention, expired, prune
from trainctl.trainer.checkpoint.save import PendingSave, SaveResult
from trainctl.trainer.checkpoint.state import Accessor, State, Stateful

__all__ = [
    "MEMORY_CHECKPOINTS",
    "Accessor",
    "CheckpointError",
    "Checkpointer",
    "Loaded",
    "PendingSave",
    "Progress",
    "Retention",
    "SaveResult",
    "State",
    "Stateful",
    "expired",
    "prune",
]
