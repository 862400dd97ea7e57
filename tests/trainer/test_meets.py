"""What a command meets during a checkpoint, a rollback or a pause: the table of wire/meets.py, cell by cell."""

import threading
import time
from pathlib import Path

import pytest
from one_rank import OneRank
from torch.distributed import HashStore

from trainctl.trainer import rollback_target
from trainctl.trainer.actions import begin_save, refusal
from trainctl.trainer.agreement import Outcome, Proposal, Seal, encode
from trainctl.trainer.attach import prepare
from trainctl.trainer.boundary import Boundary
from trainctl.trainer.checkpoint import checkpointer as checkpointer_module
from trainctl.trainer.core import Callbacks, Hold
from trainctl.trainer.figures import Pace, run_state
from trainctl.trainer.leader import Leader, Prepared
from trainctl.trainer.meeting import Connection
from trainctl.trainer.saves_first import SavesFirst
from trainctl.trainer.tally import Tally
from trainctl.wire.commands import (
    REGISTRY,
    Abort,
    Act,
    CheckpointSave,
    Command,
    CommandState,
    Evaluate,
    LrRelease,
    LrScale,
    LrSet,
    Pause,
    Resume,
    Rollback,
    SetTunable,
    Stop,
    carrier_of,
)
from trainctl.wire.meets import ROWS, Row, table
from trainctl.wire.messages import CommandUpdate, LinkCommand
from waiting import until

ACTIONS: dict[type[Act], Act] = {
    Pause: Pause(),
    Resume: Resume(),
    LrScale: LrScale(factor=0.5),
    LrSet: LrSet(value=0.01),
    LrRelease: LrRelease(),
    SetTunable: SetTunable(name="clip", value=2.0),
    CheckpointSave: CheckpointSave(),
    Evaluate: Evaluate(),
    Stop: Stop(),
    Abort: Abort(),
}
OF_RANKS = [(row, command) for row in ROWS for command in row.commands if row.rolling_back == "behind the rollback"]
each = pytest.mark.parametrize(("row", "command"), OF_RANKS, ids=lambda given: getattr(given, "__name__", ""))


@pytest.fixture
def rank(tmp_path: Path) -> OneRank:
    made = OneRank(tmp_path)
    made.core.callbacks = Callbacks(on_rollback=lambda _step: None, on_eval=lambda: {"val_loss": 1.0})
    made.train(3)
    made.overrides.scale_lr(1.0)
    return made


def action_of(rank: OneRank, command: type[Act]) -> Act:
    return Rollback(target=rank.save()) if command is Rollback else ACTIONS[command]


def test_every_command_has_one_row_and_the_docs_print_the_table() -> None:
    named = [command for row in ROWS for command in row.commands]
    operators = [spec.action for spec in REGISTRY.values()]
    assert sorted(named, key=str) == sorted(operators, key=str)
    documented = Path(__file__).parents[2].joinpath("docs", "commands.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in documented
    for row in ROWS:
        carriers = {carrier_of(ACTIONS[command]) for command in row.commands if command in ACTIONS}
        assert carriers <= {"ranks"}


@each
def test_while_paused(row: Row, command: type[Act], rank: OneRank) -> None:
    action = action_of(rank, command)
    rank.core.hold = Hold(since=0.0, by="mk", resumes_at=None)
    rank.core.boundary.held_at = rank.core.boundary.position
    proposal = Proposal(number=1, command=Command(id="c", action=action), actor="mk", step=3)  # type: ignore[arg-type]
    if row.paused.startswith("rejected"):
        assert refusal(rank.core, proposal) == "the run is paused already"
        return
    rank.core.boundary.wake.set()
    leave = threading.Timer(0.3, lambda: setattr(rank.core, "hold", None))
    leave.start()
    outcome = rank.do(action)
    leave.join()
    assert (row.paused, outcome.ok, rank.step) == ("at once, at the step that is held", True, 3)
    assert outcome.step == 3


@each
def test_while_a_checkpoint_is_written(
    row: Row, command: type[Act], rank: OneRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    action = action_of(rank, command)
    if row.saving.startswith("rejected"):
        proposal = Proposal(number=1, command=Command(id="c", action=action), actor="mk", step=3)  # type: ignore[arg-type]
        assert refusal(rank.core, proposal) == "the run is not paused"
        return
    written, write = threading.Event(), checkpointer_module.write

    def slow(*given: object) -> int:
        written.wait(30)
        return write(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer_module, "write", slow)
        assert rank.core.checkpointer is not None
        saving = rank.core.checkpointer.begin_save(id="slow", step=3, incarnation=1, attempt=1, metrics={})
        waits = row.saving == "waits for the one under way"
        if waits:
            threading.Timer(0.5, written.set).start()
        resumes = threading.Timer(0.1, lambda: setattr(rank.core, "hold", None))  # from what a pause began
        resumes.start()
        assert rank.do(action).ok
        waited = written.is_set()
        resumes.join()
        assert waited == waits
        written.set()
        assert saving.result(30).error is None
    rank.core.checkpointer.drain(30)


@each
def test_while_a_rollback_loads_all_wait_behind_it(row: Row, command: type[Act]) -> None:
    store, told = HashStore(), list[CommandUpdate]()
    ranks = Connection(store, "p", Seal(b"", 1))
    leader = Leader(
        world_size=1,
        boundary=Boundary(),
        connection=Connection(store, "p", Seal(b"", 1)),
        prepare=lambda asked: Prepared(two_phase=isinstance(asked.action, Rollback)),
        tell=told.append,
        incarnation=lambda: 1,
    )
    leader.start()
    following = Rollback(target="best") if command is Rollback else ACTIONS[command]
    for name, action in (("back", Rollback(target="last")), ("next", following)):
        asked = Command(id=name, action=action)  # type: ignore[arg-type]
        leader.submit(LinkCommand(command=asked, actor="mk", accepted=0.0))
    ranks.wait(["p/1"], 10)
    ranks.put("a/1/0", encode({"verdict": "ready", "step": 0}))
    ranks.wait(["d/1"], 10)
    ranks.put("l/1/0", encode(Outcome(ok=True, step=1)))
    ranks.wait(["c/1"], 10)
    assert not ranks.has(["p/2"]), row.rolling_back
    ranks.put("r/1/0", encode(Outcome(ok=True, step=0)))
    ranks.wait(["p/2"], 10)
    ranks.put("a/2/0", encode({"verdict": "refused", "step": 0, "reason": "enough"}))
    until(lambda: [update.id for update in told if update.state == "rejected"] == ["next"], 10)
    leader.close()
    leader.join(10)


def test_a_pause_goes_on_over_an_evaluation_that_is_made_in_it(rank: OneRank) -> None:
    """What it holds is counted from its beginning."""
    hold = rank.core.hold = Hold(since=100.0, by="mk", resumes_at=None)
    seen = []

    def told() -> tuple[str, float | None]:
        found = run_state(rank.core, Pace(), Tally(), since=time.time(), step_time=0.0, dropped={})
        return found.state, found.paused_since

    def leave() -> None:
        until(lambda: seen and rank.core.hold is not None, 20, what="the evaluation to end")
        seen.append(told())
        rank.core.hold = None

    rank.core.callbacks = Callbacks(on_eval=lambda: seen.append(told()) or {})
    leaving = threading.Thread(target=leave)
    leaving.start()
    assert rank.do(Evaluate()).ok
    leaving.join()
    assert rank.core.hold is None
    assert seen == [("evaluating", None), ("paused", hold.since)]
    assert told() == ("running", None)


def test_a_rollback_is_proposed_once_the_save_that_ran_when_it_came_is_written(
    rank: OneRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs would hold every rank till then, and withdraws nothing: training goes on, others pass."""
    answers = {name: threading.Event() for name in ("first", "second", "third")}
    turns, write = iter(answers), checkpointer_module.write

    def slow(*given: object) -> int:
        answers[next(turns)].wait(30)
        return write(*given)  # type: ignore[arg-type]

    def rollback(name: str, target: str = "last") -> Command:
        return Command(id=name, action=Rollback(target=target))

    def answered(name: str) -> None:
        answers[name].set()
        saving[name].result(30)

    saves_first, held = SavesFirst(rank.core), rank.core.rollback_targets
    good = rank.save()
    assert not saves_first(rollback("there"))
    monkeypatch.setattr(checkpointer_module, "write", slow)
    saving = {"first": begin_save(rank.core).pending}
    early, late = rollback("early", "best"), rollback("late", good)
    assert saves_first(early)
    assert not saves_first(Command(id="lr", action=LrScale(factor=0.5)))
    until(lambda: not saves_first(rollback("none", "77")), 20, what="it to be refused at once, for there is none such")
    rank.train(1)
    saving["second"] = begin_save(rank.core).pending
    assert saves_first(late)
    until(lambda: held.of("late") == good, 20, what="its target to be kept from deletion")
    answered("first")
    until(lambda: not saves_first(early), 20, what="it to go on, though another save runs: there may always be one")
    assert saves_first(late)
    answered("second")
    rank.train(1)
    saving["third"] = begin_save(rank.core).pending
    assert not saves_first(late), "though an evaluation kept it waiting, it does not begin to wait anew"
    prepared = prepare(rank.core, late)
    assert isinstance(prepared, Prepared)
    assert prepared.checkpoint == good

    def unreadable(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rollback_target, "list_with_memory", unreadable)
    until(lambda: not saves_first(rollback("unread")), 20, what="it to be prepared, which tells of that")
    answered("third")


def test_the_target_of_a_rollback_is_held_until_its_outcome_and_that_of_the_newest_after_it(rank: OneRank) -> None:
    checkpoint, saves_first = rank.save(), SavesFirst(rank.core)
    for name in ("a", "b"):
        prepare(rank.core, Command(id=name, action=Rollback(target="last")))
    held = rank.core.rollback_targets
    held.hold("b", "another")
    assert held.ids() == {checkpoint, "another"}

    def told(name: str, state: CommandState) -> None:
        saves_first.hear(
            CommandUpdate(
                time=0.0, step=0, incarnation=1, id=name, command="rollback", args={}, actor="mk", state=state
            )
        )

    told("a", "scheduled")
    assert held.ids() == {checkpoint, "another"}
    told("a", "expired")
    assert held.ids() == {checkpoint, "another"}
    told("b", "applied")
    assert held.ids() == {"another"}
