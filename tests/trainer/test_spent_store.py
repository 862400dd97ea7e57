"""However many commands a run is sent, the job's store holds the keys of the last few, and a store that takes none away
costs nothing else."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import test_agreement_threads
from test_agreement_threads import Job
from torch.distributed import FileStore, HashStore, Store, TCPStore

from trainctl.trainer.agreement import Seal
from trainctl.trainer.evaluated import Evaluated
from trainctl.trainer.meeting import Connection, StoreSilent
from trainctl.trainer.spent import of_all, of_rank
from trainctl.wire.commands import Pause, Resume, SetTunable
from waiting import until

RANKS = 2
OF_ONE = len(of_all(1)) + RANKS * len(of_rank(1, 0))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """A real store; every connection of a job that is made under it is one of its own, as in a run."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def connect(_: Store, prefix: str, seal: Seal) -> Connection:
        return Connection(TCPStore("127.0.0.1", server.port, wait_for_workers=False), prefix, seal)

    monkeypatch.setattr(test_agreement_threads, "Connection", connect)
    return server


def set_often(job: Job, count: int, look: Callable[[], None] = lambda: None) -> None:
    """In a pause, where every rank is at the boundary: each command is agreed on at once, some in two phases."""
    assert job.outcome(job.send(Pause())).state == "applied"
    for number in range(1, count + 1):
        sent = job.send(SetTunable(name="x", value=number), condition="step >= 0" if number % 4 == 0 else None)
        assert job.outcome(sent).state == "applied"
        look()
    assert job.outcome(job.send(Resume())).state == "applied"


def test_two_hundred_commands_leave_no_more_keys_than_a_few(served: TCPStore, tmp_path: Path) -> None:
    job, found = Job(RANKS, tmp_path), list[int]()
    set_often(job, 200, lambda: found.append(served.num_keys()))
    job.close()
    print(f"{max(found)} keys at most, of {OF_ONE} for each command")
    assert max(found) <= 3 * OF_ONE


def test_what_a_silent_store_kept_is_taken_away_behind_a_later_command_and_no_command_suffers(
    served: TCPStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, silent = Connection.delete, [True]

    def delete(self: Connection, keys: Sequence[str]) -> None:
        if silent[0]:
            raise StoreSilent("nothing is taken away")
        honest(self, keys)

    monkeypatch.setattr(Connection, "delete", delete)
    job = Job(RANKS, tmp_path)
    set_often(job, 20)
    kept = served.num_keys()
    silent[0] = False
    set_often(job, 2)
    job.close()
    assert kept > 20 * 7
    assert served.num_keys() <= 3 * OF_ONE


@pytest.mark.parametrize("make", [lambda _: HashStore(), lambda path: FileStore(str(path), -1)])
def test_every_store_takes_keys_away_that_are_there_or_are_not(make: Callable[[Path], Store], tmp_path: Path) -> None:
    line = Connection(make(tmp_path / "store"), "p", Seal(b"", 1))
    line.put("a", b"1")
    line.delete(["a", "b"])
    assert not line.has(["a"])


def test_the_reports_of_an_evaluation_go_behind_the_next_that_was_asked_for() -> None:
    line = Connection(HashStore(), "p", Seal(b"", 1))
    newest: list[Evaluated | None] = [None, None]
    for number in (1, 2, 3):
        for rank in (0, 1):
            survey = Evaluated(
                line, number=number, rank=rank, ranks=2, tell=lambda _: None, collectives=lambda: 1, before=newest[rank]
            )
            survey.start()
            survey.report(complete=rank == 0, reason="bad", raised=rank == 1)
            newest[rank] = survey
        for made in newest:
            assert made is not None
            until(lambda made=made: not made.is_alive(), 20)  # type: ignore[misc]
        assert [line.has([f"e/{which}/0", f"e/{which}/1", f"x/{which}"]) for which in range(1, number + 1)] == [
            which == number for which in range(1, number + 1)
        ]
