"""Two thousand histories of real code in simulated time, each with its own operators, commands and faults, all judged.

Their seeds are printed (`pytest -rA`) and are a property in pytest's reports; a failure names the one.
`python tests/histories/soak.py --simulated SEED` lives through it again and tells its story.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from simulated_history import Lived, default_directory, live

from trainctl.trainer import actions, control
from trainctl.trainer.agreement import Position
from trainctl.trainer.boundary import Armed

COUNT, EACH = 2000, 200  # in several tests, so that they run beside one another


@pytest.fixture
def directory() -> Iterator[Path]:
    logging.disable(logging.CRITICAL)  # what is told in the log is not what is looked at, thousands of times
    with tempfile.TemporaryDirectory(dir=default_directory()) as made:
        yield Path(made)
    logging.disable(logging.NOTSET)


def told(lived: Lived) -> str:
    again = f"again, with its story: python tests/histories/soak.py --simulated {lived.seed}"
    return "\n".join([f"seed {lived.seed}", *lived.problems, again])


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(EACH, COUNT, EACH))]
)
def test_no_command_is_half_applied_lost_or_lied_about(
    first: int, directory: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("seeds", f"{first} to {first + EACH - 1}")
    print(f"simulated histories, seeds {first} to {first + EACH - 1}")
    states: Counter[str] = Counter()
    applied = inside = undone = kept = 0
    for seed in range(first, first + EACH):
        lived = live(seed, directory)
        assert not lived.problems, told(lived)
        states.update(lived.states)
        applied += lived.applied
        inside += lived.inside
        undone += lived.undone
        kept += lived.kept
    assert applied > EACH, "and a good part of the commands came through"
    assert inside > EACH / 50, "some of them between two batches of an evaluation"
    assert undone > EACH / 20, "changes on trial were undone"
    assert kept > EACH / 50, "and kept"
    assert states.keys() >= {"applied", "rejected", "expired", "failed", "unknown"}, "every kind of outcome is met"


def test_one_seed_is_one_history(directory: Path) -> None:
    first, again = live(7, directory), live(7, directory)
    assert first.story
    assert first.story == again.story


CONFIRMS = "an undoing that was called off confirms the change"


def _unfaithful(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "a rank leaves its boundary when its patience is over":

        def going(self: control.Control, armed: Armed) -> bool:
            return bool(armed.going())

        monkeypatch.setattr(control.Control, "going", going)
    elif kind == CONFIRMS:
        monkeypatch.setattr(actions, "keeps", lambda _verdict: True)
    else:
        honest = control.answer

        def never_late(proposed: Position, *, at: Position, held_at: Position | None, refusal: str | None) -> object:
            return honest(proposed, at=min(at, Position(proposed.step - 1)), held_at=held_at, refusal=refusal)

        def not_passed(self: Position, proposed: Position) -> bool:
            return False

        monkeypatch.setattr(control, "answer", never_late)
        monkeypatch.setattr(Position, "passed", not_passed)


@pytest.mark.parametrize(
    "kind",
    [
        "a rank leaves its boundary when its patience is over",
        "a rank is never late and waits for what is past",
        pytest.param(CONFIRMS, marks=pytest.mark.thorough),
    ],
)
def test_a_protocol_with_a_fault_in_it_is_found_out(
    kind: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _unfaithful(monkeypatch, kind)
    found = next((lived for lived in (live(seed, directory) for seed in range(200)) if lived.problems), None)
    assert found is not None, "the histories are too tame to see anything"
