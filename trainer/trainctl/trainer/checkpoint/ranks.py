"""Doing things together on all ranks: a failure of one is a failure of all, in the same words.

Every method is a collective over a group of our own, and is called by the same thread role on every rank in the same
order. Without a group there is one rank and nothing is exchanged.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from trainctl.trainer.checkpoint.errors import CheckpointError, RanksLost, in_words

T = TypeVar("T")

# Gloo's own is 30 min, and a group that timed out once is of no use any more. Who waits here keeps nobody up: a rank
# that evaluates alone, or a disk that hangs, costs a save its time. A rank that dies is noticed by its connections.
_PATIENCE = timedelta(days=1)


class Ranks:
    """`rank` of `world_size`, over `group` (gloo, used by nobody else); None where there is one rank.

    The group's timeout becomes a day.
    """

    def __init__(self, *, rank: int, world_size: int, group: dist.ProcessGroup | None) -> None:
        if world_size > 1 and group is None:
            raise ValueError(f"{world_size} ranks need a gloo group of their own for checkpoints; none was given")
        self.rank = rank
        self.world_size = world_size
        self._group = group if world_size > 1 else None
        if self._group is not None:
            # As torch's own _set_pg_timeout, which warns where TORCH_DISTRIBUTED_DEBUG=DETAIL has the backend wrapped.
            backend = self._group._get_backend(torch.device("cpu"))
            getattr(backend, "wrapped_pg", backend)._set_default_timeout(_PATIENCE)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank. Raises RanksLost when a rank is gone."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        _guarded(lambda: dist.all_gather_object(gathered, value, group=self._group))
        return gathered

    def collect(self, value: T) -> list[T]:
        """Every rank's value on rank 0, an empty list on the others."""
        if self._group is None:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.first else None
        _guarded(lambda: dist.gather_object(value, gathered, group_dst=0, group=self._group))
        return gathered or []

    def scatter(self, values: list[T]) -> T:
        """This rank's item of rank 0's list."""
        if self._group is None:
            return values[0]
        received: list[Any] = [None]
        given = cast(Any, values if self.first else None)
        _guarded(lambda: dist.scatter_object_list(received, given, group_src=0, group=self._group))
        return cast(T, received[0])

    def together(self, what: str, action: Callable[[], T]) -> T:
        """Run `action` on every rank; its value where all succeeded.

        Raises CheckpointError with the first failing rank's words on all of them.
        """
        value: T | None = None
        problem: str | None = None
        try:
            value = action()
        except CheckpointError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait for the word
            problem = in_words(what, error)
        for rank, told in enumerate(self.gather(problem)):
            if told is not None:
                raise CheckpointError(told if self.world_size == 1 else f"rank {rank}: {told}")
        return cast(T, value)

    def on_first(self, what: str, action: Callable[[], T]) -> T | None:
        """Run `action` on rank 0 alone; all ranks learn whether it failed."""
        return self.together(what, lambda: action() if self.first else None)


def _guarded(exchange: Callable[[], None]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        raise RanksLost(
            f"the ranks lost touch while agreeing on a checkpoint ({str(error).splitlines()[0]}): "
            "the last good checkpoint stands, and saving works again after a restart"
        ) from error
