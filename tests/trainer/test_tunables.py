"""What an operator may set: listed, typed, bounded, kept over restarts; the optimizers' fields among it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import OneRank

from trainctl.trainer import steering
from trainctl.trainer.override_rules import RELEASE
from trainctl.trainer.overrides import Overrides
from trainctl.trainer.tunables import Tunables, TunableValue
from trainctl.wire.commands import LrScale, SetTunable


@pytest.fixture
def rank(tmp_path: Path) -> OneRank:
    made = OneRank(tmp_path)
    made.train(3)
    return made


def refused(rank: OneRank, **given: Any) -> str | None:
    return steering.problem_with(rank.core, SetTunable(**given))


def test_the_list_has_the_scripts_own_and_what_its_optimizers_have(rank: OneRank) -> None:
    listed = {tunable.name: tunable for tunable in steering.tunables(rank.core)}
    assert list(listed) == ["clip", "weight_decay", "beta1", "beta2"]
    assert [(found.value, found.kind, found.minimum, found.maximum) for found in listed.values()] == [
        (1.0, "float", 0.1, 10.0),
        (0.01, "float", 0.0, None),
        (0.9, "float", 0.0, 1.0),
        (0.999, "float", 0.0, 1.0),
    ]
    assert [name for name, found in listed.items() if found.optimizer] == ["weight_decay", "beta1", "beta2"]


def test_a_field_is_set_at_a_boundary_and_told_before_and_after(rank: OneRank) -> None:
    outcome = rank.do(SetTunable(name="weight_decay", value=0.25))
    assert (outcome.before, outcome.after) == (0.01, 0.25)
    rank.train(1)
    assert rank.used[rank.step][1] == 0.25
    assert {t.name: t.value for t in steering.tunables(rank.core)}["weight_decay"] == 0.25
    assert rank.core.tunables_changed.is_set(), "whoever lists them sees it"
    assert rank.do(SetTunable(name="weight_decay", value=RELEASE)).after == 0.01


def test_a_weight_decay_for_all_groups_leaves_out_those_that_the_script_spares(rank: OneRank) -> None:
    rank.do(SetTunable(name="weight_decay", value=0.25))
    assert [rank.overrides.effective("weight_decay", group) for group in (0, 1)] == [0.25, 0.0]
    rank.do(SetTunable(name="weight_decay", value=0.125, group=1))
    assert [rank.overrides.effective("weight_decay", group) for group in (0, 1)] == [0.25, 0.125]


def test_where_no_group_decays_all_begin_to(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    overrides = Overrides([optimizer])
    overrides.apply(SetTunable(name="weight_decay", value=0.25))
    overrides.apply(SetTunable(name="momentum", value=0.5))
    assert overrides.fields() == {"weight_decay": 0.25, "momentum": 0.5}


def test_momentum_that_an_optimizer_has_no_buffer_for_is_refused_and_not_found_out_in_its_step() -> None:
    optimizer = torch.optim.RMSprop([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    refusal = Overrides([optimizer]).check(SetTunable(name="momentum", value=0.5))
    assert refusal == "RMSprop was made without momentum: it cannot be switched on"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "clip", "value": 99.0}, "out of range: 0.1 to 10.0"),
        ({"name": "clip", "value": "much"}, "takes a number"),
        ({"name": "clip", "value": 0.5, "group": 0}, "no field of an optimizer"),
        ({"name": "clip", "value": RELEASE}, "takes a number"),
        ({"name": "weight_decay", "value": -0.1}, "0 or more"),
        ({"name": "weight_decay", "value": True}, "finite number"),
        ({"name": "weight_decay", "value": 0.1, "group": 9}, "no group 9"),
        ({"name": "beta2", "value": 1.0}, "below 1"),
        ({"name": "momentum", "value": 0.5}, "AdamW has no momentum"),
        ({"name": "nonsense", "value": 1}, "this script has: clip"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(rank: OneRank, given: dict[str, Any], says: str) -> None:
    assert says in str(refused(rank, **given))


def test_a_script_that_has_a_tunable_of_a_fields_name_means_its_own(rank: OneRank) -> None:
    own = rank.core.tunables.add(TunableValue("weight_decay", 7.0))
    rank.do(SetTunable(name="weight_decay", value=9.0))
    assert (own.value, rank.overrides.active) == (9.0, False)
    assert [t.name for t in steering.tunables(rank.core)].count("weight_decay") == 1
    rank.do(SetTunable(name="weight_decay", value=3.0), revert_after=2)
    rank.train(3)
    assert own.value == 9.0


# --- over a restart


def later(rank: OneRank, directory: Path) -> tuple[OneRank, steering.Steering]:
    """The next attempt, as it attaches: what the one before wrote down, and a new process's objects."""
    steering.keep(rank.core)
    again = OneRank(directory, attempt=2)
    found = steering.kept(again.core)
    assert found is not None
    return again, found


def test_a_restart_takes_the_newest_and_only_what_operators_set(rank: OneRank, tmp_path: Path) -> None:
    rank.core.tunables.add(TunableValue("depth", 3))
    rank.do(LrScale(factor=0.5), command_id="a", revert_after=50)
    rank.do(SetTunable(name="beta1", value=0.5))
    rank.do(SetTunable(name="depth", value=5))
    rank.train(2)
    again, found = later(rank, tmp_path)
    assert found.tunables == {"depth": 5}
    steering.put(again.core, found)
    again.core.reverts.rewound(0)
    assert again.overrides.describe() == {"lr": "× 0.5", "beta1": "= 0.5"}
    assert again.core.reverts.steps_left(0) == {"a": 50}
    again.core.steered()
    steering.keep(again.core)
    assert json.loads((tmp_path / "overrides.json").read_text())["tunables"] == {"depth": 5}, "it waits for the script"
    assert again.clip.value == 1.0
    again.train(51)
    assert again.overrides.describe() == {"beta1": "= 0.5"}


def test_a_file_that_cannot_be_read_is_told_and_the_checkpoint_counts(rank: OneRank, tmp_path: Path) -> None:
    (tmp_path / "overrides.json").write_text('{"rules": 7}')
    assert steering.kept(rank.core) is None
    assert any("cannot be read" in getattr(event, "text", "") for event in rank.core.events)


def test_a_directory_that_takes_no_file_costs_the_restart_and_not_the_training(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(steering, "write_atomic", full)
    for _ in range(3):
        rank.do(LrScale(factor=0.5))
        steering.keep(rank.core)
    told = [event.text for event in rank.core.events if hasattr(event, "what")]
    assert told == [f"a restart will not know what was set: {tmp_path / 'overrides.json'}: No space left on device"]


# --- the values themselves


def test_kinds_are_kept_and_what_does_not_fit_is_not_taken_from_a_checkpoint() -> None:
    tunables = Tunables()
    seen: list[Any] = []
    tunables.add(TunableValue("every", 10, minimum=0, on_change=seen.append))
    tunables.add(TunableValue("clip", 1.0, minimum=0.1))
    tunables.add(TunableValue("mixup", False))
    tunables.add(TunableValue("mode", "train"))
    assert tunables.apply("every", 20.0) == (10, 20)
    assert tunables.apply("clip", 2) == (1.0, 2.0)
    tunables.restore({"every": -1, "clip": 0.5, "mixup": 1, "mode": "eval", "gone": 3})
    assert tunables.values() == {"every": 20, "clip": 0.5, "mixup": False, "mode": "eval"}
    assert (seen, tunables.steered()) == ([20], {"every": 20, "clip": 0.5})
    assert tunables.problem_with("every", 1.5) == "every takes a whole number, not 1.5"
    with pytest.raises(ValueError, match="names are given once"):
        tunables.add(TunableValue("clip", 1.0))
    with pytest.raises(ValueError, match="does not fit"):
        TunableValue("clip", 0.0, minimum=0.1)
