"""A state of the memory tier as a checkpoint to commit: nothing is read, and nothing is copied before the commit.

It is not hashed. The bytes never left this process since they were copied from the live state, so a hash could only
find what would have damaged the live weights just as well, and it costs several times the copy.
"""

from trainctl.trainer.checkpoint.capture import Captured
from trainctl.trainer.checkpoint.errors import CheckpointError
from trainctl.trainer.checkpoint.load import Loaded, compare_models, compare_parts
from trainctl.trainer.checkpoint.memory_tier import Slot
from trainctl.trainer.checkpoint.param_groups import compare_groups
from trainctl.trainer.checkpoint.sharded import local_part
from trainctl.trainer.checkpoint.state import State


def recall(slot: Slot, *, world_size: int, state: State, live: Captured) -> Loaded:
    """What the slot holds, compared with the live state as one from disk would be. Raises CheckpointError."""
    snapshot, number = slot.state, slot.number
    if snapshot is None:
        raise CheckpointError("the state is not in memory any more: nothing was changed")
    notes = compare_parts(state, live, snapshot.shared, snapshot.own)
    compare_groups(state, live, snapshot.shared)
    compare_models(snapshot.tensors, live)
    for name, tensor in snapshot.tensors.items():
        now = live.tensors.get(name)
        if now is not None and now.shape == tensor.shape and local_part(now).shape != local_part(tensor).shape:
            raise CheckpointError(f"{name} is sharded otherwise now than in memory: nothing was changed")
    return Loaded(
        id=snapshot.id,
        step=snapshot.step,
        incarnation=snapshot.incarnation,
        attempt=snapshot.attempt,
        world_size=world_size,
        metrics=dict(snapshot.metrics),
        note=snapshot.note,
        notes=tuple(notes),
        shared={name: node for name, node in snapshot.shared.items() if name in live.nodes},
        own=snapshot.own,
        tensors=snapshot.tensors,
        from_memory=True,
        whole=lambda: slot.number == number and slot.state is snapshot,
    )
