"""A condition is decided on what was logged at that very step, whether or not the sender has come to it."""

from pathlib import Path
from typing import Any

import pytest
from one_rank import OneRank

from trainctl.trainer.actions import unmet
from trainctl.trainer.buffer import NotANumber, Rewind, StepMark
from trainctl.trainer.core import Core
from trainctl.wire.commands import Command, Pause


@pytest.fixture
def core(tmp_path: Path) -> Core:
    made = OneRank(tmp_path).core
    made.last_metrics |= {"loss": 13.0, "val_loss": 1.5}
    return made


def said(core: Core, condition: str) -> str | None:
    return unmet(core, Command(id="c", action=Pause(), condition=condition))


def test_what_was_logged_right_before_the_boundary_counts(core: Core) -> None:
    core.buffer.log(14, {"loss": 14.0})
    assert said(core, "loss == 14 and val_loss == 1.5") is None
    assert said(core, "loss < 0") == "the condition 'loss < 0' does not hold: loss is 14.0"
    core.buffer.put(StepMark(14, 1.0, 1.0, 0, 0, None, None))
    core.buffer.log(15, {"loss": 15})
    core.buffer.take(1)
    assert said(core, "loss == 15") is None
    core.buffer.take(9)
    assert said(core, "loss == 15") is None, "though the sender has taken it, and told nobody yet"
    core.last_metrics["loss"] = 15.0
    core.buffer.take(9)
    assert said(core, "loss == 15") is None


def test_after_a_rollback_what_was_logged_before_it_is_forgotten(core: Core) -> None:
    core.buffer.log(14, {"loss": 14.0, "grad": 1.0})
    core.buffer.put(Rewind(step=5, incarnation=2, metrics={"loss": 5.0}))
    assert said(core, "loss == 5") is None
    assert "grad is unknown" in str(said(core, "grad == 1"))


@pytest.mark.parametrize("value", [10**400, 1j, "high", [1.0], NotANumber("tensor of shape (2,)")])
def test_what_is_no_number_costs_nothing(core: Core, value: Any) -> None:
    core.buffer.entries.append((14, {"loss": value}, ()))
    assert said(core, "loss == 13") is None


def test_of_a_value_that_is_still_on_its_device_it_is_said_that_an_earlier_one_counts(core: Core) -> None:
    on_its_way = (14, {"loss": NotANumber("value that never arrived")}, (object(),))
    core.buffer.entries.append(on_its_way)  # type: ignore[arg-type]
    assert said(core, "loss < 0") == (
        "the condition 'loss < 0' does not hold: loss is 13.0 (of an earlier step: a newer loss is still on its device)"
    )
    assert "of an earlier step" not in str(said(core, "val_loss < 0"))
