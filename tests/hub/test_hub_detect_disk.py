"""Room in the run's file system: told once when it gets short, once when there is enough again."""

import asyncio
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainctl.hub.aside import Aside, StillBusy
from trainctl.hub.detect_disk import CHECKPOINT_FOR_S, GB, HANGS_S, DiskWatch, Room
from trainctl.hub.detect_lookout import DiskLookout, is_saving, read_room
from trainctl.wire.messages import Anomaly, CheckpointSaved, Envelope, Event
from trainctl.wire.rundir import RunDir


def room(free_gb: float, total_gb: float = 1000) -> Room:
    return Room(total_bytes=int(total_gb * GB), free_bytes=int(free_gb * GB))


def told(watch: DiskWatch, *frees: float, total_gb: float = 1000, checkpoint_gb: float = 0) -> list[tuple[str, str]]:
    """What is told of readings that come a minute apart."""
    return [
        (finding.what, finding.severity)
        for minute, free in enumerate(frees)
        for finding in watch.observe(room(free, total_gb), int(checkpoint_gb * GB), minute * 60.0)
    ]


def test_a_disk_that_fills_is_low_then_full_then_has_room_again_each_once() -> None:
    frees = [500, 21, 19, 18, 19.9, 1.9, 1.5, 2.1, 15, 30, 500]
    assert told(DiskWatch("/run", set()), *frees) == [
        ("disk-low", "warning"),
        ("disk-full", "error"),
        ("disk-full", "good"),
        ("disk-low", "good"),
    ]


def test_a_disk_that_hovers_around_the_threshold_is_told_of_once() -> None:
    assert told(DiskWatch("/run", set()), *[19.9, 20.1] * 20) == [("disk-low", "warning")]


@pytest.mark.parametrize(
    ("free_gb", "total_gb", "expected"),
    [
        (45_000, 1_000_000, []),  # 4.5 % of a petabyte is plenty
        (0.5, 8, []),  # a small disk is not low all the time
        (0.3, 8, [("disk-low", "warning")]),
        (0.05, 8, [("disk-full", "error")]),  # full is low too, and told once
        (0, 0, []),  # a file system that does not know its size
    ],
)
def test_the_threshold_is_the_smaller_of_a_share_and_a_size(
    free_gb: float, total_gb: float, expected: list[tuple[str, str]]
) -> None:
    assert told(DiskWatch("/run", set()), free_gb, total_gb=total_gb) == expected


def test_room_that_will_not_hold_the_next_checkpoint_is_told_of_after_a_minute() -> None:
    watch = DiskWatch("/run", set())
    assert told(watch, 100, 50, checkpoint_gb=60) == [], "a retention may be about to delete the oldest"
    (finding,) = watch.observe(room(50), 60 * GB, 60 + CHECKPOINT_FOR_S)
    assert (finding.what, finding.severity) == ("disk-checkpoint", "error")
    assert finding.text == (
        "50.0 GB of 1.0 TB are free in /run: that will not hold the next checkpoint, which takes 66.0 GB"
    )
    assert watch.observe(room(80), 60 * GB, 500.0) == [], "a quarter more than needed ends it"
    assert [found.severity for found in watch.observe(room(83), 60 * GB, 501.0)] == ["good"]


def test_nothing_is_said_of_the_next_checkpoint_while_one_is_being_written() -> None:
    watch = DiskWatch("/run", set())
    for minute in range(10):
        assert watch.observe(room(50), 60 * GB, minute * 60.0, saving=True) == []


@given(frees=st.lists(st.floats(0, 1000), max_size=50))
def test_each_kind_alternates_between_short_and_enough(frees: list[float]) -> None:
    found = told(DiskWatch("/run", set()), *frees, checkpoint_gb=10)
    for what in ("disk-full", "disk-checkpoint"):
        severities = [severity == "good" for kind, severity in found if kind == what]
        assert severities == [number % 2 == 1 for number in range(len(severities))]


def test_a_file_system_that_does_not_answer_is_told_of_once_and_when_it_does_again() -> None:
    watch = DiskWatch("/run", set())
    assert watch.silent(10.0) == []
    assert [finding.what for finding in watch.silent(HANGS_S)] == ["disk-hangs"]
    assert watch.silent(HANGS_S + 10) == []
    assert [(found.what, found.severity) for found in watch.observe(room(500), 0, 100.0)] == [("disk-hangs", "good")]


# --- looking


def test_what_was_told_before_a_restart_is_not_told_again(tmp_path: Path) -> None:
    free = read_room(tmp_path).free_bytes
    events: list[Event] = [CheckpointSaved(time=1.0, step=10, incarnation=1, id="s10", bytes=2 * free)]
    assert heard(tmp_path, events) == [], "not before a minute is over"
    again = Anomaly(time=2.0, step=11, incarnation=1, what="disk-checkpoint", text="", severity="error")
    events = [events[0], again, CheckpointSaved(time=3.0, step=12, incarnation=1, id="s12", bytes=1000)]
    assert heard(tmp_path, events) == [("disk-checkpoint", "good")]


def heard(run_dir: Path, events: list[Event]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    made = RunDir(run_dir)
    made.create()
    lookout = DiskLookout(run_dir=made, events=events, tell=lambda what, text, severity: found.append((what, severity)))

    async def scenario() -> None:
        await lookout.look()
        checkpoint = CheckpointSaved(time=4.0, step=20, incarnation=1, id="s20", bytes=1)
        lookout.follow(Envelope(source="s", epoch=1, stream="events", seq=1, time=4.0, body=checkpoint))
        await lookout.look()

    asyncio.run(scenario())
    return found


def test_a_directory_that_is_gone_is_another_ones_news(tmp_path: Path) -> None:
    assert read_room(tmp_path).total_bytes > 0
    found: list[str] = []
    lookout = DiskLookout(run_dir=RunDir(tmp_path / "no"), events=[], tell=lambda what, *_: found.append(what))
    asyncio.run(lookout.look())
    assert found == []


def test_a_checkpoint_is_being_written_while_its_stage_is_young(tmp_path: Path) -> None:
    (tmp_path / "s10").mkdir()
    assert not is_saving(tmp_path, 0.0)
    stage = tmp_path / ".s20.stage"
    stage.mkdir()
    os.utime(stage, (1000.0, 1000.0))
    assert is_saving(tmp_path, 1100.0)
    assert not is_saving(tmp_path, 10_000.0), "a crash left it behind"


def test_work_that_hangs_costs_one_thread_and_its_answer_is_had_later() -> None:
    answer = threading.Event()
    calls: list[int] = []

    def work() -> str:
        calls.append(1)
        answer.wait(20)
        return "done"

    async def scenario() -> None:
        aside = Aside(work)
        for _ in range(3):
            with pytest.raises(StillBusy):
                await aside.run(0.01)
        assert len(calls) == 1
        answer.set()
        assert await aside.run(20) == "done"
        assert await aside.run(20) == "done"
        assert len(calls) == 2

    asyncio.run(scenario())


def test_what_the_work_raises_is_raised_to_who_asked() -> None:
    async def scenario() -> None:
        with pytest.raises(FileNotFoundError):
            await Aside(lambda: read_room(Path("/nonexistent/x"))).run(20)

    asyncio.run(scenario())
