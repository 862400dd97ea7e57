"""A file server that hangs over what operators set holds up the outcome of such commands, and nothing else."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from one_rank import OneRank

from trainctl.trainer import saved as saved_module
from trainctl.trainer import steering
from trainctl.trainer.sender import Sender
from trainctl.trainer.steering_file import SteeringFile
from trainctl.wire.commands import CheckpointSave, Command, CommandState, SetTunable
from trainctl.wire.messages import Anomaly, CommandUpdate, Event
from waiting import until


class Server:
    """A file server that hangs until it is `back`; `reached` once somebody waits for it."""

    def __init__(self) -> None:
        self.back = threading.Event()
        self.reached = threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.back.wait(30)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made, write, pin = Server(), steering.write_atomic, saved_module.pin

    def slow_write(path: Path, data: bytes) -> None:
        made.wait()
        write(path, data)

    def slow_pin(directory: Path, *, pinned: bool) -> None:
        made.wait()
        pin(directory, pinned=pinned)

    monkeypatch.setattr(steering, "write_atomic", slow_write)
    monkeypatch.setattr(saved_module, "pin", slow_pin)
    yield made
    made.back.set()


class Telling:
    """The part of a sender that tells events, over one real rank."""

    def __init__(self, rank: OneRank) -> None:
        self.rank = rank
        self.told: list[Event] = []
        self.file = SteeringFile(rank.core)
        rank.core.events.clear()
        self._sender = SimpleNamespace(
            _core=rank.core,
            _link=SimpleNamespace(record=lambda event, _now: self.told.append(event)),
            _preemption=None,
            _steering=self.file,
        )
        self._sender._tell_events = lambda events, now: Sender._tell_events(self._sender, events, now)

    def set(self, value: float) -> None:
        self.rank.do(SetTunable(name="clip", value=value))
        self.rank.core.events.pop()  # that of the one rank names no command
        self.rank.core.event(outcome("set", f"set-{value}"))

    def tick(self) -> list[str]:
        """What was told in all, after one round."""
        Sender._record_events(self._sender, 0.0)  # type: ignore[arg-type]
        return [event.id if isinstance(event, CommandUpdate) else getattr(event, "what", "?") for event in self.told]


def outcome(command: str, name: str, state: CommandState = "applied") -> CommandUpdate:
    return CommandUpdate(time=1.0, step=3, incarnation=1, id=name, command=command, args={}, actor="mk", state=state)


@pytest.fixture
def telling(tmp_path: Path) -> Telling:
    rank = OneRank(tmp_path)
    rank.train(3)
    return Telling(rank)


def on_disk(path: Path) -> object:
    return json.loads((path / "overrides.json").read_text())["tunables"]["clip"]


def test_what_is_set_is_told_as_applied_once_it_is_on_disk_and_everything_else_at_once(
    telling: Telling, server: Server, tmp_path: Path
) -> None:
    telling.set(2.0)
    assert telling.tick() == [], "this returns though the write does not"
    assert server.reached.is_set()
    core = telling.rank.core
    core.event(outcome("pause", "p"))
    core.event(outcome("set", "refused", "rejected"))
    core.event(Anomaly(time=1.0, step=3, incarnation=1, what="data", text="t"))
    assert telling.tick() == ["p", "refused", "data"]
    telling.set(3.0)
    assert telling.tick() == ["p", "refused", "data"]
    server.back.set()
    until(lambda: len(telling.tick()) == 5, 10)
    assert telling.tick()[3:] == ["set-2.0", "set-3.0"]
    assert on_disk(tmp_path) == 3.0


def test_where_the_disk_answers_it_is_on_disk_in_the_same_round(telling: Telling, tmp_path: Path) -> None:
    telling.set(2.0)
    until(lambda: telling.tick() == ["set-2.0"], 10)
    assert on_disk(tmp_path) == 2.0


def test_an_operator_is_told_why_there_is_no_outcome(
    telling: Telling, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainctl.trainer.steering_file._TELL_S", 0.0)
    telling.set(2.0)
    until(lambda: "overrides" in telling.tick(), 10)
    (event,) = (event for event in telling.told if isinstance(event, Anomaly))
    assert "does the file system hang?" in event.text
    server.back.set()


def test_a_rank_that_leaves_tells_what_was_applied_and_that_a_restart_may_not_know_it(
    telling: Telling, server: Server
) -> None:
    telling.set(2.0)
    assert telling.tick() == []
    telling.file.finish(0.0)
    telling.rank.core.event(outcome("set", "last"))
    assert telling.tick() == ["set-2.0", "overrides", "last"]
    assert "a restart may not know" in next(event.text for event in telling.told if isinstance(event, Anomaly))
    server.back.set()


def test_a_write_that_fails_in_an_odd_way_holds_no_outcome_back(
    telling: Telling, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*_: object) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(steering, "write_atomic", odd)
    telling.set(2.0)
    until(lambda: sorted(telling.tick()) == ["overrides", "set-2.0"], 10)


def test_the_mark_of_a_pinned_checkpoint_is_made_beside_what_is_told(
    telling: Telling, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    done = SimpleNamespace(
        done=lambda: True, result=lambda: SimpleNamespace(error=None, bytes=1, stall_s=0.0, write_s=0.0)
    )
    save = SimpleNamespace(
        id="step-3",
        step=3,
        incarnation=1,
        metrics={},
        note=None,
        actor="mk",
        command=Command(id="c", action=CheckpointSave(pin=True)),
        pending=done,
    )
    found = saved_module.Saved(telling.rank.core, save)  # type: ignore[arg-type]
    assert not found.settled
    server.back.set()
    until(lambda: found.settled, 10)
    checkpoint, told = found.events()
    assert getattr(checkpoint, "pinned", False)
    assert isinstance(told, CommandUpdate)
    assert (told.id, told.state) == ("c", "applied")
    assert (tmp_path / "checkpoints" / "step-3.pinned").exists()
