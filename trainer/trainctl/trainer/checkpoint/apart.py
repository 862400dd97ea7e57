"""Plain tensors of which each rank has its own: found before a save is written, and kept for every rank.

torch.distributed.checkpoint keeps one rank's of a tensor that is not sharded. That is right for what DDP keeps alike,
parameters and what the optimizer makes of them. Of buffers (BatchNorm's statistics) and of what the script tracks (a
generator's state, a rank's own memory) nobody knows it, so their hashes are compared; it is done in the background.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from trainctl.trainer.checkpoint.background import Pace
from trainctl.trainer.checkpoint.capture import bare
from trainctl.trainer.checkpoint.ranks import Ranks
from trainctl.trainer.checkpoint.state import State

_PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Apart:
    """`names` differ between ranks. `own`: those that this rank keeps for itself; the lowest rank's are everybody's.

    `bytes` is what all ranks keep for themselves.
    """

    names: list[str] = field(default_factory=list)
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    bytes: int = 0


def may_differ(state: State, tensors: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """The names of tensors that a rank may have its own of: plain ones that are tracked, and buffers of the models."""
    parameters = {
        f"model.{index}.{name}"
        for index, model in enumerate(state.models)
        for name, _ in bare(model).named_parameters(remove_duplicate=False)
    }
    return frozenset(
        name
        for name, tensor in tensors.items()
        if name.startswith(("tracked.", "model.")) and name not in parameters and not isinstance(tensor, DTensor)
    )


def find_apart(tensors: Mapping[str, torch.Tensor], names: Collection[str], ranks: Ranks, pace: Pace) -> Apart:
    """Which of the tensors `names` differ between ranks, in shape, dtype or any bit. A collective.

    Raises CheckpointError, alike on all ranks.
    """
    if ranks.world_size == 1:
        return Apart()
    mine = ranks.together(
        "the ranks' states cannot be compared", lambda: {name: _digest(tensors[name], pace) for name in sorted(names)}
    )
    told = ranks.gather({name: (digest, tensors[name].nbytes) for name, digest in mine.items()})
    apart: list[str] = []
    lowest: dict[str, int] = {}
    size = 0
    for name in sorted({name for theirs in told for name in theirs}):
        having = [rank for rank, theirs in enumerate(told) if name in theirs]
        if len({told[rank][name][0] for rank in having}) > 1:
            apart.append(name)
            lowest[name] = having[0]
            size += sum(told[rank][name][1] for rank in having[1:])
    own = {name: tensors[name] for name in apart if name in mine and lowest[name] != ranks.rank}
    return Apart(names=apart, own=own, bytes=size)


def _digest(tensor: torch.Tensor, pace: Pace) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(content), _PIECE_BYTES):
        digest.update(content[start : start + _PIECE_BYTES])
        pace.rest()
    return digest.digest()
