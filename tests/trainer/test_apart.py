"""Which tensors each rank has its own of: told by their hashes. Real ranks: test_checkpoint_ranks.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainctl.trainer.checkpoint import Accessor, Checkpointer, State
from trainctl.trainer.checkpoint.apart import Apart, find_apart, may_differ
from trainctl.trainer.checkpoint.background import Pace
from trainctl.trainer.checkpoint.capture import capture_shared
from trainctl.trainer.checkpoint.ranks import Ranks


class Asking(Ranks):
    """A rank that says what it has and then looks at what the others said."""

    def __init__(self, rank: int, said: list[Any]) -> None:
        self.rank, self.world_size, self._said = rank, len(said), said

    def together(self, what: str, action: Any) -> Any:
        return action()

    def gather(self, value: Any) -> list[Any]:
        self._said[self.rank] = value
        return self._said


def apart(*ranks: dict[str, torch.Tensor]) -> list[Apart]:
    """What each rank finds out, where they have these tensors."""
    said: list[Any] = [{}] * len(ranks)
    for _round in range(2):  # in the second each hears what all have said
        found = [find_apart(has, has, Asking(rank, said), Pace()) for rank, has in enumerate(ranks)]
    return found


def test_what_is_alike_is_kept_once_and_what_differs_in_one_bit_shape_or_type_for_each() -> None:
    base = {name: torch.zeros(3) for name in ("alike", "bit", "shape", "type", "half")} | {"none": torch.zeros(0)}
    other = {name: tensor.clone() for name, tensor in base.items()}
    other["bit"][2] = -0.0
    other["shape"], other["type"] = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int32)
    base["half"], other["half"] = torch.ones((), dtype=torch.bfloat16), torch.zeros((), dtype=torch.bfloat16)
    first, second, third = apart(base, other, base)
    assert first.names == second.names == third.names == ["bit", "half", "shape", "type"]
    assert first.own == {}, "the lowest rank's are the ones that everybody can read"
    assert second.own.keys() == third.own.keys() == set(first.names)
    assert all(second.own[name] is other[name] for name in second.own)
    assert first.bytes == second.bytes == 2 * (12 + 2 + 12 + 12)


def test_what_one_rank_alone_has_is_nobody_elses() -> None:
    first, second = apart({"a": torch.zeros(2)}, {"b": torch.ones(2)})
    assert first == second == Apart()
    _, second, third = apart({}, {"b": torch.ones(2)}, {"b": torch.zeros(2)})
    assert (second.own, list(third.own)) == ({}, ["b"])


def test_buffers_and_what_is_tracked_are_compared_and_what_ddp_keeps_alike_is_not() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    tracked = {"average": Accessor(get=lambda: {"weight": torch.zeros(2), "count": 3}, set=lambda _: None)}
    state = State(models=[model], optimizers=[optimizer], tracked=tracked)
    assert may_differ(state, capture_shared(state).tensors) == {
        "model.0.1.running_mean",
        "model.0.1.running_var",
        "model.0.1.num_batches_tracked",
        "tracked.average.weight",
    }


def test_a_checkpoint_that_was_written_before_ranks_kept_their_own_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.BatchNorm1d(2)
    model(torch.randn(4, 2))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpointer = Checkpointer(
        directory=tmp_path, run_id="test", rank=0, world_size=1, group=None, state=State(models=[model])
    )
    write = torch.save

    def as_before(content: Any, file: Any) -> None:
        own = isinstance(content, dict)  # else a tensor, on its way into a file for all ranks
        write({key: content[key] for key in content.keys() - {"apart", "tensors"}} if own else content, file)

    monkeypatch.setattr(torch, "save", as_before)
    saved = checkpointer.begin_save(id="old", step=1, incarnation=1, attempt=1, metrics={})
    assert saved.result(30).error is None
    model(torch.randn(4, 2))
    other = Checkpointer(
        directory=tmp_path, run_id="test", rank=0, world_size=1, group=None, state=State(models=[model])
    )
    other.commit(other.load("old"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
