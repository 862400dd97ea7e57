"""The data's iterator, owned by the run so that a rollback can put it back.

Exact for data that depend on the index alone. A loader with `state_dict` restores itself. A plain DataLoader is
replayed: the random state in which the epoch's iterator was made is restored, the iterator is made anew, and as many
batches are taken from it as the checkpoint had seen. To that state belong the generators that the loader was given
(`DataLoader(…, generator=…)`): they go on from epoch to epoch, and nothing else keeps them.

With another number of ranks than the checkpoint's, what all ranks together had seen of the epoch is divided among the
ranks of now (`among`), and the epoch is opened anew by its number and replayed so far: a loader's own state counts what
one rank of the old job did, and belongs to none of the new ones.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Rng = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stand:
    """Where a feed stands, with the open iterator: what `Feed.take` and `Feed.go_back` need to stand there again."""

    epoch: int
    batch: int
    index: int
    opens: int
    last_set: int | None
    iterator: Iterator[Any] | None = field(repr=False)
    opened_with: Rng | None = field(repr=False)
    loader: dict[str, Any] | None = field(default=None, repr=False)  # the loader's own state
    drawn: list[torch.Tensor] = field(default_factory=list, repr=False)  # of the loader's own generators, now
    drawn_before: list[torch.Tensor] = field(default_factory=list, repr=False)  # and when the epoch was opened
    reused: bool | None = None  # whether the epoch was opened with workers that were there already


def go_on() -> None:
    """What is called between two micro-batches where nobody has anything to do then."""


def among(count: int, before: int, now: int) -> tuple[int, bool]:
    """How many micro-batches a rank stands at when `before` ranks had seen `count` each and there are `now` ranks.

    Rounded down, so that nothing is left out: fewer than `now` micro-batches over all ranks may be seen again. Also
    whether the division left nothing over.
    """
    seen = count * before
    return seen // now, seen % now == 0


class Feed:
    """Micro-batches without end, epoch after epoch. `epoch` and `batch` say where it stands.

    `index` is how many micro-batches lie before it in the order of the data, over all epochs: the same batch has the
    same index after a rollback, a resume or a skip.
    """

    def __init__(
        self,
        loader: Any,
        *,
        capture_rng: Callable[[], Rng],
        restore_rng: Callable[[Rng], None],
        world_size: int = 1,
    ) -> None:
        self._loader = loader
        self._world_size = world_size
        self._capture_rng = capture_rng
        self._restore_rng = restore_rng
        self._keeps_state = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._iterator: Iterator[Any] | None = None
        self._opened_with: Rng | None = None
        self._restored: dict[str, Any] | None = None
        self._opens = 0
        self._last_set: int | None = None
        self._drawn_before: list[torch.Tensor] = []
        self._reused: bool | None = None
        self.epoch = 0
        self.batch = 0
        self.index = 0

    def next(self) -> Any:
        """The next micro-batch. Raises ValueError when a whole epoch has none."""
        while True:
            if self._iterator is None:
                self._open()
            assert self._iterator is not None
            try:
                item = next(self._iterator)
            except StopIteration:
                if self.batch == 0:
                    raise ValueError("the loader gave no batch in a whole epoch: is the data set empty?") from None
                self.epoch, self.batch, self._iterator = self.epoch + 1, 0, None
            else:
                self.batch += 1
                self.index += 1
                return item

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, in plain values and tensors."""
        state: dict[str, Any] = {"epoch": self.epoch, "batch": self.batch, "index": self.index}
        state["opened"] = self._iterator is not None
        state["world_size"] = self._world_size
        state["drawn"] = [generator.get_state() for generator in self._generators()]
        if self._iterator is None:
            return state
        if self._keeps_state:
            state["loader"] = self._loader.state_dict()
        else:
            state["rng"] = self._opened_with
            state["drawn_before"] = self._drawn_before
            state["reused"] = self._reused
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state` says; the iterator is made by `reopen`."""
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self.index = int(state.get("index", self.batch))
        before = int(state.get("world_size", self._world_size))
        if before != self._world_size:
            self.batch, _ = among(self.batch, before, self._world_size)
            self.index, _ = among(self.index, before, self._world_size)
        self._iterator, self._restored = None, state

    def reopen(self, between: Callable[[], None] = go_on) -> None:
        """After `load_state_dict`: make the iterator anew, calling `between` before each micro-batch that is read.

        Draws random numbers, so the checkpoint's own random state is restored after this. The loader's own generators
        are the checkpoint's then, unless it was of another number of ranks: those belong to one rank each.
        """
        state, self._restored = self._restored, None
        if state is None:
            return
        same_ranks = int(state.get("world_size", self._world_size)) == self._world_size
        if state["opened"] and not same_ranks:
            self._replay(None, between=between)
        elif state["opened"] and "loader" in state:
            self._loader.load_state_dict(state["loader"])
            self._open()
        elif state["opened"]:
            before = state.get("drawn_before", [])
            self._replay(state["rng"], before, reused=state.get("reused"), between=between)
        if same_ranks:
            self._draw_from(state.get("drawn", []))

    def skip(self, count: int, between: Callable[[], None] = go_on) -> None:
        """Pass over so many micro-batches, calling `between` before each.

        An epoch that begins meanwhile may draw its order: the random state should be the one in which training would
        have begun it.
        """
        for _ in range(count):
            between()
            self.next()

    def stand(self) -> Stand:
        """Where it stands now. Raises what the loader's own `state_dict` raises."""
        open_now = self._iterator is not None
        return Stand(
            epoch=self.epoch,
            batch=self.batch,
            index=self.index,
            opens=self._opens,
            last_set=self._last_set,
            iterator=self._iterator,
            opened_with=self._opened_with,
            loader=copy.deepcopy(self._loader.state_dict()) if open_now and self._keeps_state else None,
            drawn=[generator.get_state() for generator in self._generators()],
            drawn_before=self._drawn_before,
            reused=self._reused,
        )

    def take(self, stand: Stand) -> None:
        """Stand there, with that iterator: nothing is read, and nothing can fail."""
        self.epoch, self.batch, self.index = stand.epoch, stand.batch, stand.index
        self._iterator, self._opened_with, self._restored = stand.iterator, stand.opened_with, None
        self._last_set, self._drawn_before, self._reused = stand.last_set, stand.drawn_before, stand.reused

    def go_back(self, stand: Stand) -> None:
        """Leave where it was moved to meanwhile, and stand there again.

        The iterator of then is taken up, unless the loader has only one (persistent workers) or keeps its place itself:
        then the epoch is opened anew, as after a rollback, which draws random numbers. Raises what the loader raises.
        """
        wound = self._opens != stand.opens and (self._persistent or self._iterator is stand.iterator)
        self.take(stand)
        if stand.loader is not None:
            self._loader.load_state_dict(stand.loader)
            self._open()
        elif stand.iterator is not None and wound:
            self._iterator = None
            self._replay(stand.opened_with, stand.drawn_before, reused=stand.reused)
        self._draw_from(stand.drawn)
        if stand.last_set is not None:
            self._set_epoch(stand.last_set)

    def _generators(self) -> list[torch.Generator]:
        """Those that the loader was given, which are no one else's to put back."""
        batches = getattr(self._loader, "batch_sampler", None)
        owners = (self._loader, getattr(self._loader, "sampler", None), batches, getattr(batches, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        return list(dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator)))

    def _draw_from(self, states: Sequence[torch.Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=False):
            generator.set_state(state)

    @property
    def _persistent(self) -> bool:
        return bool(getattr(self._loader, "persistent_workers", False))

    @property
    def _has_workers(self) -> bool:
        """Whether the next epoch is opened with workers that are there already."""
        return self._persistent and getattr(self._loader, "_iterator", None) is not None

    def _replay(
        self,
        rng: Rng | None,
        drawn_before: Sequence[torch.Tensor] = (),
        *,
        reused: bool | None = None,
        between: Callable[[], None] = go_on,
    ) -> None:
        """Open the epoch and take from it what was seen of it, with the random state that its order was drawn from.

        A DataLoader draws its workers' seed before an epoch's order, but where it reuses them it draws none: `reused`
        says which it was. An epoch that became shorter, because more ranks share it, may end before what was seen.
        """
        if reused and not self._has_workers:
            iter(self._loader)
        if rng is not None:
            self._restore_rng(rng)
        self._draw_from(drawn_before)
        if reused is False and self._has_workers:
            torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)
        seen, index, epoch, self.batch = self.batch, self.index, self.epoch, 0
        self._open()
        for _ in range(seen):
            between()
            self.next()
            if self.epoch != epoch:
                self.batch, self._iterator = 0, None  # taken from the next epoch, which begins anew
                break
        self.index = index

    def _set_epoch(self, epoch: int) -> None:
        for holder in (
            self._loader,
            getattr(self._loader, "sampler", None),
            getattr(self._loader, "batch_sampler", None),
        ):
            if holder is not None and hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)
                break

    def _open(self) -> None:
        self._set_epoch(self.epoch)
        self._last_set = self.epoch
        self._opened_with = None if self._keeps_state else self._capture_rng()
        self._drawn_before = [generator.get_state() for generator in self._generators()]
        self._reused = self._has_workers
        self._opens += 1
        self._iterator = iter(self._loader)
