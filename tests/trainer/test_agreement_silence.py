"""A store that is cut off blocks and does not fail, and a rank may leave after *ready*: neither ends in a lie."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from trainctl.trainer import control as control_module
from trainctl.trainer.agreement import CANCEL, COMMIT, GO, Outcome, Proposal, Seal, encode, patience
from trainctl.trainer.boundary import Armed, Boundary
from trainctl.trainer.control import Control, InDoubt
from trainctl.trainer.leader import Leader, Prepared
from trainctl.trainer.meeting import Connection
from trainctl.trainer.protocol import RankEvent
from trainctl.wire.commands import Command, SetTunable
from trainctl.wire.messages import CommandUpdate, LinkCommand
from waiting import until

DOUBT_S = 0.3
_COMMAND = Command(id="c", action=SetTunable(name="x", value=1))


def met(number: int) -> Armed:
    """A proposal in two phases at its boundary, decided to go, with all ranks there."""
    armed = Armed(Proposal(number=number, command=_COMMAND, actor="mk", step=1, two_phase=True))
    armed.decide(GO)
    armed.going()
    armed.on(RankEvent.ALL)
    return armed


class CutOff(Connection):
    """A connection whose calls get no answer until the cut is mended."""

    def __init__(self, store: HashStore) -> None:
        super().__init__(store, "p", Seal(b"", 1))
        self.mended = threading.Event()

    def decide(self, key: str, content: bytes) -> bytes | None:
        self.mended.wait(30)
        return super().decide(key, content)

    def put(self, key: str, content: bytes) -> None:
        self.mended.wait(30)
        super().put(key, content)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.setattr(control_module, "DOUBT_S", DOUBT_S)
    store = HashStore()
    line, boundary = CutOff(store), Boundary()
    waiting = Connection(store, "p", Seal(b"", 1))
    control = Control(rank=1, ranks=2, boundary=boundary, waiting=waiting, talking=line, refusal=lambda _: None)
    proposal = Proposal(number=1, command=_COMMAND, actor="mk", step=1)
    yield SimpleNamespace(line=line, control=control, armed=Armed(proposal), other=waiting, boundary=boundary)
    line.mended.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "trainctl-asks"], 10)


def test_a_rank_in_doubt_gives_up_in_time_though_the_store_only_blocks(cut: SimpleNamespace) -> None:
    began = time.monotonic()
    with pytest.raises(InDoubt, match="Resume from the last good checkpoint"):
        cut.control.going(cut.armed)
    assert time.monotonic() - began >= DOUBT_S


def test_a_rank_that_is_staged_and_cannot_say_so_gives_up(cut: SimpleNamespace) -> None:
    with pytest.raises(InDoubt, match="between loading and restoring"):
        cut.control.staged(met(1), Outcome(ok=True, step=1))


def test_a_rank_that_sees_no_sign_of_rank_0_calls_it_off_and_obeys_what_holds(
    cut: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "_LOOK_S", 0.05)
    cut.line.mended.set()
    for number, (written, goes) in enumerate(((None, False), (COMMIT, True)), 1):
        armed = met(number)
        if written is not None:
            cut.other.decide(f"c/{number}", written)
        assert cut.control.staged(armed, Outcome(ok=True, step=1)) is goes
        assert cut.other.decide(f"c/{number}", COMMIT) == (written or CANCEL), (
            "rank 0 reads that, however late it comes"
        )


def test_the_patience_follows_what_agreements_take() -> None:
    assert [patience(slowest_s) for slowest_s in (0.0, 0.01, 0.103, 0.5, 60.0)] == [0.1, 0.1, 0.309, 1.5, 2.0]
    slow = Proposal(number=1, command=_COMMAND, actor="mk", step=1, patience_s=0.5)
    began = time.monotonic()
    assert Armed(slow).going() is None
    assert time.monotonic() - began >= 0.5, "it travels with the proposal"


def test_a_line_that_is_mended_in_time_brings_the_decision_of_the_others(
    cut: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "DOUBT_S", 30.0)
    assert cut.other.decide("d/1", GO) == GO
    threading.Timer(0.3, cut.line.mended.set).start()
    assert cut.control.going(cut.armed) is True


def test_a_rank_that_leaves_its_loop_takes_back_what_is_not_decided(cut: SimpleNamespace) -> None:
    cut.line.mended.set()
    cut.boundary.arm(cut.armed)
    cut.boundary.close()
    assert cut.other.decide("d/1", GO) != GO, "the others cannot go any more"


def test_leaving_does_not_hang_on_a_store_that_is_cut_off(cut: SimpleNamespace) -> None:
    cut.control.start()
    cut.control.leave(0.3)
    assert cut.control.is_alive(), "nobody heard the goodbye"
    cut.line.mended.set()
    cut.control.leave(10)
    assert not cut.control.is_alive()


def test_a_rank_that_left_after_all_were_ready_is_named_and_nobody_is_told_that_nothing_happened() -> None:
    store, told, boundary = HashStore(), list[CommandUpdate](), Boundary()
    ranks = Connection(store, "p", Seal(b"", 1))
    leader = Leader(
        world_size=2,
        boundary=boundary,
        connection=Connection(store, "p", Seal(b"", 1)),
        prepare=lambda _: Prepared(),
        tell=told.append,
        incarnation=lambda: 1,
    )
    left = Outcome(ok=False, step=1, reason="the run ended at step 1, before the boundary of step 2", declined=True)
    for rank, outcome in enumerate((Outcome(ok=True, step=2, after=1), left)):
        ranks.put(f"a/1/{rank}", encode({"verdict": "ready", "step": 0}))
        ranks.put(f"r/1/{rank}", encode(outcome))
    leader.start()
    command = Command(id="c", action=SetTunable(name="x", value=1))
    leader.submit(LinkCommand(command=command, actor="mk", accepted=0.0))
    final = until(lambda: next((update for update in told if update.state != "scheduled"), None), 10)
    leader.close()
    leader.join(10)
    assert final is not None
    assert final.state == "failed", "rejected would say that nothing was changed"
    assert "rank 1: the run ended at step 1" in str(final.reason)
    assert "it was applied on rank 0" in str(final.reason)
