"""A checkpoint of other parameter groups than the optimizer has now: refused by name, before anything is touched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import OneRank
from torch import nn

from trainctl.trainer.checkpoint import Checkpointer, CheckpointError, State


class Unfreezing:
    """Two layers of which the optimizer knows the first; `unfreeze` gives it the second as a group of its own."""

    def __init__(self, directory: Path, *, memory_checkpoints: int = 0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        self.optimizer = torch.optim.AdamW(self.model[0].parameters(), lr=0.1)
        self.checkpointer = Checkpointer(
            directory=directory,
            run_id="test",
            rank=0,
            world_size=1,
            group=None,
            state=State(models=[self.model], optimizers=[self.optimizer]),
            memory_checkpoints=memory_checkpoints,
        )

    def unfreeze(self) -> None:
        self.optimizer.add_param_group({"params": self.model[1].parameters()})

    def step(self) -> None:
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, name: str) -> None:
        saved = self.checkpointer.begin_save(id=name, step=1, incarnation=1, attempt=1, metrics={})
        assert saved.result(30).error is None

    def bits(self) -> list[Any]:
        moments = [value.clone() for entry in self.optimizer.state.values() for value in entry.values()]
        return [[parameter.tolist() for parameter in self.model.parameters()], [moment.tolist() for moment in moments]]


@pytest.mark.parametrize("memory_checkpoints", [0, 2], ids=["disk", "memory"])
def test_a_rollback_to_before_a_group_was_added_is_refused_by_name_and_nothing_is_touched(
    tmp_path: Path, memory_checkpoints: int
) -> None:
    training = Unfreezing(tmp_path, memory_checkpoints=memory_checkpoints)
    training.step()
    training.save("frozen")
    training.unfreeze()
    training.step()
    before = training.bits()
    with pytest.raises(CheckpointError) as refused:
        training.checkpointer.load("frozen")
    told = str(refused.value)
    assert told.startswith(
        "optimizer.0 (AdamW) had 1 parameter group (of 2 parameters) in the checkpoint and has 2 parameter groups "
        "(of 2, 1 parameters) in the run: nothing was changed."
    ), told
    assert training.bits() == before
    training.save("unfrozen")
    training.step()
    training.checkpointer.commit(training.checkpointer.load("unfrozen"))
    assert training.bits() == before


def test_a_restart_that_has_not_made_the_groups_is_refused_and_one_that_has_goes_on(tmp_path: Path) -> None:
    training = Unfreezing(tmp_path)
    training.unfreeze()
    training.step()
    training.save("unfrozen")
    again = Unfreezing(tmp_path)
    with pytest.raises(CheckpointError, match="add_param_group before"):
        again.checkpointer.load("unfrozen")
    again.unfreeze()
    again.checkpointer.commit(again.checkpointer.load("unfrozen"))
    assert again.bits() == training.bits()


def test_groups_of_another_size_are_refused_too(tmp_path: Path) -> None:
    training = Unfreezing(tmp_path)
    training.save("two")
    training.optimizer.param_groups[0]["params"].append(training.model[1].weight)
    with pytest.raises(CheckpointError, match=r"\(of 2 parameters\) .* \(of 3 parameters\)"):
        training.checkpointer.load("two")


def test_an_optimizer_that_makes_a_state_fit_by_a_hook_of_its_own_is_let_do_so(tmp_path: Path) -> None:
    training = Unfreezing(tmp_path)
    training.step()
    training.save("frozen")
    training.unfreeze()

    def fit(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        mine = optimizer.state_dict()["param_groups"]
        return state | {"param_groups": [*state["param_groups"], *mine[len(state["param_groups"]) :]]}

    training.optimizer.register_load_state_dict_pre_hook(fit)
    training.checkpointer.commit(training.checkpointer.load("frozen"))
    assert [len(group["params"]) for group in training.optimizer.param_groups] == [2, 1]


def test_as_a_command_it_fails_with_that_reason_and_the_run_stays_where_it_was(tmp_path: Path) -> None:
    rank = OneRank(tmp_path)
    rank.train(2)
    saved = rank.save()
    rank.train(1)
    rank.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    before = rank.optimizer.param_groups[0]["params"][0].detach().clone()
    outcome = rank.roll_back(saved)
    assert not outcome.ok
    assert "optimizer.0 (AdamW) had 2 parameter groups (of 1, 1 parameters)" in str(outcome.reason)
    assert torch.equal(rank.optimizer.param_groups[0]["params"][0], before)
    assert (rank.step, rank.core.incarnation) == (3, 1)
