"""Ids that rank 0 gives its own commands."""

import msgspec
import pytest

from trainctl.wire.commands import Ident
from trainctl.wire.own_ids import AUTO_RESUME, is_own_id, undoing_id


@pytest.mark.parametrize("command_id", ["a", "a" * 85, "a" * 86, "a" * 100])
def test_an_undoing_has_an_id_of_its_own_and_a_valid_one(command_id: str) -> None:
    names = [undoing_id(command_id, number) for number in (1, 2, 10**8)]
    assert len(set(names)) == 3
    for name in names:
        assert msgspec.convert(name, Ident) == name
        assert is_own_id(name)


def test_ids_that_begin_alike_are_undone_under_different_ones() -> None:
    assert undoing_id("a" * 85 + "1") != undoing_id("a" * 85 + "2")


def test_only_what_rank_0_may_give_is_its_own() -> None:
    own = ["a.undo", "a.undo.2", ".undo", f"{AUTO_RESUME}1", "preemption-1", "preemption-12.3"]
    others = ["a", "undo", "a.undo.x", "a.undo.", "a.undo.2b", "undo.2", "my-auto-resume-1", "preemption-test"]
    assert [name for name in own + others if is_own_id(name)] == own
