"""The rules of a preemption on one rank: what is listened to, what is saved, how often it is tried."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from one_rank import OneRank

from trainctl.trainer.actions import begin_save
from trainctl.trainer.core import Hold
from trainctl.trainer.outcomes import update_of
from trainctl.trainer.preemption import Preemption, Signalled, farewell, gone_of, listen
from trainctl.wire.commands import Stop
from trainctl.wire.endings import mark_ended
from trainctl.wire.messages import LinkCommand, RankPlace
from trainctl.wire.preemption import Warned, read_heard, read_left, read_preempted, signal_number, write_note
from trainctl.wire.rundir import RunDir

WHY = "SIGUSR1 on node-a"
PAUSED = """
import os, signal, sys
from pathlib import Path
from trainctl.trainer.preemption import Signalled, heard_while_paused
from trainctl.wire.endings import is_ended
heard = Signalled()
heard.by_operator = lambda: is_ended(Path(sys.argv[1]), 1)
with heard_while_paused(heard):
    os.kill(os.getpid(), signal.SIGTERM)
assert heard.name == "SIGTERM"
"""


@pytest.fixture(autouse=True)
def handlers_are_as_they_were() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class TestSaves:
    def test_a_preemption_saves_and_ends_the_run_as_preempted(self, tmp_path: Path) -> None:
        rank = OneRank(tmp_path)
        rank.train(3)
        outcome = rank.do(Stop(preempted=WHY))
        assert (outcome.ok, outcome.after, rank.core.ending) == (True, "preempted", "preempted")
        assert rank.core.newest_save is not None
        assert rank.core.newest_save.pending.result(30).error is None
        assert farewell(rank.core) == f"{WHY}; checkpoint step-00000003-1.1"

    def test_where_the_interval_has_just_begun_a_save_there_is_no_second_one(self, tmp_path: Path) -> None:
        rank = OneRank(tmp_path)
        rank.train(3)
        begin_save(rank.core).pending.result(30)
        rank.do(Stop(preempted=WHY))
        assert rank.core.saves_begun == 1

    def test_a_save_of_a_step_before_is_not_taken_for_it(self, tmp_path: Path) -> None:
        rank = OneRank(tmp_path)
        rank.train(3)
        running = begin_save(rank.core)
        rank.train(1)
        rank.do(Stop(preempted=WHY))
        assert rank.core.saves_begun == 2
        newest = rank.core.newest_save
        assert newest is not None
        assert (newest.step, newest.pending.result(30).error) == (4, None)
        assert running.pending.done(), "they are written one after another, the earlier one first"

    def test_during_a_pause_what_was_set_meanwhile_is_saved_and_the_pause_is_told(self, tmp_path: Path) -> None:
        rank = OneRank(tmp_path)
        rank.train(3)
        begin_save(rank.core).pending.result(30)
        rank.core.hold = Hold(since=0.0, by="mk", resumes_at=None)
        rank.core.tunables.apply("clip", 0.5, steered=True)
        rank.do(Stop(preempted=WHY))
        assert rank.core.saves_begun == 2
        assert rank.core.newest_save is not None
        rank.core.newest_save.pending.result(30)
        assert "while paused by mk: the next attempt is not paused" in farewell(rank.core)

    def test_without_a_checkpointer_it_ends_all_the_same_and_says_why_nothing_was_saved(self, tmp_path: Path) -> None:
        rank = OneRank(tmp_path)
        rank.train(1)
        rank.core.checkpointer = None
        rank.core.capabilities["checkpoint"] = "no model or optimizer was given to Run.attach"
        rank.do(Stop(preempted=WHY))
        assert farewell(rank.core) == f"{WHY}; no checkpoint was saved: no model or optimizer was given to Run.attach"


class Submitted:
    """Stands for the leader: keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[LinkCommand] = []

    def submit(self, message: LinkCommand) -> None:
        self.messages.append(message)


class Elsewhere:
    """Stands for the job's store, in which another rank left a word."""

    def __init__(self, word: bytes | None) -> None:
        self.word = word

    def has(self, keys: list[str]) -> bool:
        return self.word is not None

    def get_all(self, keys: list[str]) -> list[bytes | None]:
        return [self.word]


@pytest.fixture
def warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINCTL_PREEMPT_FILE", str(tmp_path / "warning"))
    return tmp_path / "warning"


def ear(rank: OneRank, leader: Submitted | None = None, **given: Any) -> Preemption:
    given = {"control": None, "reading": None, "signalled": None} | given
    return Preemption(rank.core, leader=leader, **given)  # type: ignore[arg-type]


class TestProposals:
    def test_a_warning_is_proposed_once_whatever_comes_afterwards(self, tmp_path: Path, warning: Path) -> None:
        rank, leader = OneRank(tmp_path / "run"), Submitted()
        heard = ear(rank, leader)
        heard.tick(0.0)
        assert (leader.messages, read_heard(warning)) == ([], None)
        for moment in (1.0, 2.0, 30.0):
            write_note(warning, Warned(reason=WHY, time=0.0))
            heard.tick(moment)
        (message,) = leader.messages
        assert (message.actor, message.command.action) == ("preemption", Stop(preempted=WHY))
        told = read_heard(warning)
        assert told is not None
        assert told.problem is None

    def test_it_is_proposed_again_when_the_ranks_found_no_step_and_not_when_they_did(
        self, tmp_path: Path, warning: Path
    ) -> None:
        rank, leader = OneRank(tmp_path / "run"), Submitted()
        heard = ear(rank, leader)
        write_note(warning, Warned(reason=WHY, time=0.0))
        heard.tick(0.0)
        self.tell(rank, heard, leader, "failed")
        heard.tick(0.5)
        assert len(leader.messages) == 1, "not at once"
        heard.tick(1.5)
        assert [message.command.id for message in leader.messages] == ["preemption-1", "preemption-1.2"]
        rank.core.ending = "preempted"
        self.tell(rank, heard, leader, "applied")
        heard.tick(10.0)
        assert len(leader.messages) == 2

    def tell(self, rank: OneRank, heard: Preemption, leader: Submitted, state: str) -> None:
        command = leader.messages[-1].command
        heard.hear(update_of(command, "preemption", state, 1, rank.core.boundary, 1, 1))

    def test_a_rank_that_cannot_stop_at_a_boundary_says_so_at_once(self, tmp_path: Path, warning: Path) -> None:
        rank, leader = OneRank(tmp_path / "run"), Submitted()
        rank.core.capabilities["stop"] = "the ranks cannot agree"
        heard = ear(rank, leader)
        write_note(warning, Warned(reason=WHY, time=0.0))
        heard.tick(0.0)
        told = read_heard(warning)
        assert told is not None
        assert (told.problem, leader.messages) == ("the ranks cannot agree", [])

    def test_rank_0_takes_up_what_another_rank_heard(self, tmp_path: Path) -> None:
        rank, leader = OneRank(tmp_path), Submitted()
        store = Elsewhere(None)
        heard = ear(rank, leader, reading=store)
        heard.tick(0.0)
        store.word = b"SIGUSR1 on node-b"
        heard.tick(5.0)
        assert leader.messages[0].command.action == Stop(preempted="SIGUSR1 on node-b")

    def test_how_it_ended_is_left_for_the_launcher_and_for_the_next_attempt(
        self, tmp_path: Path, warning: Path
    ) -> None:
        rank = OneRank(tmp_path / "run")
        rank.train(4)
        rank.core.identity.directory.joinpath("numbers", "attempt-000001").touch()
        ear(rank).left("why")
        left, told = read_left(warning), read_preempted(tmp_path / "run")
        assert left is not None
        assert told is not None
        assert (left.step, left.reason, told.attempt, told.step) == (4, "why", 1, 4)
        rank.core.identity.directory.joinpath("numbers", "attempt-000002").touch()
        assert read_preempted(tmp_path / "run") is None, "the newest attempt ended in another way"


class TestSignals:
    @pytest.mark.parametrize(
        ("name", "number"), [("USR1", 10), ("sigusr2", 12), ("15", 15), ("none", None), ("", None)]
    )
    def test_a_signal_is_named_in_many_ways(self, name: str, number: int | None) -> None:
        assert signal_number(name) == number

    @pytest.mark.parametrize("name", ["KILL", "STOP", "INT", "USR9", "0", "999", "-1", "SIG"])
    def test_what_cannot_warn_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"signal|cannot warn"):
            signal_number(name)

    def test_a_signal_is_only_noted(self) -> None:
        heard = listen("USR1")
        assert heard is not None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard.name == "SIGUSR1"

    @pytest.mark.parametrize(("ended", "code"), [(1, -signal.SIGTERM), (2, 0)])
    def test_an_operators_sigterm_ends_a_paused_rank_and_a_machines_is_noted(
        self, tmp_path: Path, ended: int, code: int
    ) -> None:
        RunDir(tmp_path).create()
        mark_ended(tmp_path, ended)
        assert subprocess.run([sys.executable, "-c", PAUSED, str(tmp_path)], check=False, timeout=60).returncode == code

    def test_the_sigterm_by_which_torchrun_ends_what_a_dead_rank_left_is_no_preemption(self, tmp_path: Path) -> None:
        """Nothing can be saved without that rank, and torchrun would wait 30 s for it."""
        other, stranger = (subprocess.Popen(["sleep", "600"], env={"RANK": rank}) for rank in ("1", "7"))
        core = OneRank(tmp_path).core
        pids = {1: other.pid, 2: stranger.pid, 3: 2**22 + 1}
        core.rank_places = [RankPlace(rank=rank, node="n", pid=pid) for rank, pid in pids.items()]
        gone = gone_of(core)
        core.hold = Hold(since=0.0, by="mk", resumes_at=None)
        stranger.kill()
        stranger.wait()
        assert not gone(), "nor is one that was never seen, or was another process than that rank"
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert gone(), "also where its parent has not taken note"
        other.wait()
        assert gone()
        core.hold = None
        assert not gone(), "who is not held has its own way with the signal"
        core.hold = Hold(since=0.0, by="mk", resumes_at=None)
        heard = Signalled()
        heard.a_rank_is_gone = gone
        ended: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "kill", lambda _pid, number: ended.append(number))
            before = signal.getsignal(signal.SIGTERM)
            heard(signal.SIGTERM, None)
            signal.signal(signal.SIGTERM, before)
        assert ended == [signal.SIGTERM]

    def test_what_the_script_does_with_it_stays(self, caplog: pytest.LogCaptureFixture) -> None:
        signal.signal(signal.SIGUSR1, handler := lambda *_: None)
        assert listen("USR1") is None
        assert signal.getsignal(signal.SIGUSR1) is handler
        assert "the script has its own way with it" in caplog.text

    def test_a_second_run_in_the_process_takes_it_over(self) -> None:
        first, second = listen("USR1"), listen("USR1")
        assert signal.getsignal(signal.SIGUSR1) is second
        assert isinstance(first, Signalled)

    def test_another_thread_cannot_take_it(self, caplog: pytest.LogCaptureFixture) -> None:
        found: list[Signalled | None] = []
        thread = threading.Thread(target=lambda: found.append(listen("USR1")))
        thread.start()
        thread.join()
        assert found == [None]
        assert "not called by the main thread" in caplog.text

    def test_nothing_is_taken_unless_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert listen(None) is None
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        monkeypatch.setenv("TRAINCTL_PREEMPT_SIGNAL", "USR2")
        assert listen(None) is not None
        assert signal.getsignal(signal.SIGUSR2) is not signal.SIG_DFL

    def test_under_trainctl_run_the_launcher_hears_it(self, warning: Path, caplog: pytest.LogCaptureFixture) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert listen("USR1") is None
        assert caplog.text == ""
