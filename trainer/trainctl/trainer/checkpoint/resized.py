"""What a checkpoint does not bring back when another number of ranks reads it. Pure.

Tensors are resharded and are the same to the bit. What every rank kept for itself is taken from rank 0's file: the
schedulers, the scaler, counters, tunables and overrides, which are alike on all ranks of a careful script. Random
numbers belong to one rank each, and the place in the data to one rank among so many. Of tensors that differed between
ranks the lowest rank's are everybody's.
"""

from collections.abc import Sequence
from typing import Any

from trainctl.trainer.feed import among

_NAMED = 3


def not_exact(*, before: int, now: int, loader: Any, apart: Sequence[str] = ()) -> list[str]:
    """In words, for who resumes or rolls back. `loader` is the state of a `Feed`, or of something else, or None.

    `apart` names the tensors of which each rank had its own.
    """
    notes = [f"written by {before} ranks and read by {now}: random numbers are not restored"]
    if apart:
        named = ", ".join(apart[:_NAMED]) + (f" and {len(apart) - _NAMED} more" if len(apart) > _NAMED else "")
        notes.append(f"each rank had its own {named}: every rank gets that of the lowest rank")
    if not isinstance(loader, dict) or not isinstance(index := loader.get("index"), int):
        return notes
    place, exact = among(index, before, now)
    again = index * before - place * now
    words = f"the data goes on at micro-batch {place} of each of {_ranks(now)}, "
    words += f"after {index} of each of {_ranks(before)}"
    words += "" if exact else f": {again} of all {index * before} {'is' if again == 1 else 'are'} seen again"
    notes.append(f"{words}; the order is the same only if it depends on the epoch alone (DistributedSampler)")
    notes.append(
        f"a step is made of {now} micro-batches for {before} before, times the accumulation: change that, or the "
        "learning rate, where the batch size matters"
    )
    return notes


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"
