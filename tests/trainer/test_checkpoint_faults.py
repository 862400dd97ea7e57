"""Whatever goes wrong at whatever point of a save or a retention, in every such point in turn.

Every sync, every fourth kill and a disk that fills are tried each time; the rest is thorough.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from one_rank import OneRank
from test_checkpoint_power_cut import run_worker
from test_checkpoint_safety import Small

import trainctl.trainer.checkpoint.save as saving
from trainctl.trainer.actions import begin_save
from trainctl.wire.manifest import list_checkpoints

STANDS = "training goes on and the last good checkpoint stands"


def assert_safe(point: dict[str, Any]) -> None:
    """What holds after any fault: what is called good loads, a good one is there, leftovers go, saving works again."""
    assert point["loads"] == point["listed"], point
    assert point["problems"] == [], point
    assert "b" in point["loads"] or "c" in point["loads"], point
    assert point["left"] == [], point
    assert point["saves_again"] is None, point


Points = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found_at(tmp_path_factory: pytest.TempPathFactory) -> Points:
    """What was found after each fault at each point."""
    return run_worker(tmp_path_factory.mktemp("faults"), "kill", "tear", "write", "ranks")


@pytest.fixture(scope="module")
def found_at_some(tmp_path_factory: pytest.TempPathFactory) -> Points:
    return run_worker(tmp_path_factory.mktemp("faults"), "some kills", "fsync")


def test_kill_9_before_every_fourth_effect(found_at_some: Points) -> None:
    points = found_at_some["some kills"]
    assert len(points) >= 9
    for point in points:
        assert point["killed"], point
        assert_safe(point)
    assert [points[0]["loads"], points[-1]["loads"][-1]] == [["a", "b"], "c"], "some before it counts, some behind"


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["kill", "tear"])
def test_kill_9_before_any_effect_and_within_any_write(found_at: Points, how: str) -> None:
    points = found_at[how]
    assert len(points) >= (35 if how == "kill" else 5)
    for point in points:
        assert point["killed"], point
        assert_safe(point)
    assert points[0]["loads"] == ["a", "b"]
    if how == "kill":  # and then come those of the retention
        assert next(point["loads"] for point in points if "c" in point["loads"]) == ["a", "b", "c"]
        assert points[-1]["loads"] == ["c"]


@pytest.mark.thorough
@pytest.mark.ranks
def test_kill_9_of_either_of_two_ranks(found_at: Points) -> None:
    points = found_at["ranks"]
    assert sum(point["killed"] for point in points) >= 12
    for point in points:
        assert_safe(point)
        if point["killed"] and "c" not in point["loads"]:
            assert "lost touch" in point["error"], point
            assert "the last good checkpoint stands" in point["error"], point
    whole = [point for point in points if not point["killed"]]
    assert [(point["error"], point["loads"]) for point in whole] == [(None, ["a", "b", "c"])] * 2


def test_any_sync_that_fails_makes_no_checkpoint_and_is_told(found_at_some: Points) -> None:
    points = found_at_some["fsync"]
    saves = [point for point in points if point["error"] and not point["error"].startswith("retention")]
    assert len(saves) >= 7, "three files, the manifest and twice its directory, and the directory above"
    for point in saves:
        assert "Input/output error" in point["error"], point
        assert point["error"].endswith(STANDS), point
        assert (point["listed"], "c" in point["names"]) == (["a", "b"], False), point
        assert not [name for name in point["names"] if name.startswith(".")], point
    for point in points:
        assert_safe(point)


@pytest.mark.thorough
def test_any_file_name_or_byte_for_which_there_is_no_room_makes_no_checkpoint_and_is_told(found_at: Points) -> None:
    points = found_at["write"]
    saves = [point for point in points if point["error"] and not point["error"].startswith("retention")]
    assert len(saves) >= 10
    for point in saves:
        assert "No space left on device" in point["error"], point
        assert point["error"].endswith(f"free some space; {STANDS}"), point
        assert point["listed"] == ["a", "b"], point
        assert not [name for name in point["names"] if name.startswith(".")], point
    for point in points:
        assert_safe(point)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    at = tmp_path / "small"
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(at)]
    mounted = subprocess.run(command, capture_output=True, text=True, timeout=10)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield at
    subprocess.run(["umount", str(at)], check=True, timeout=10)


def test_a_disk_that_fills_while_a_save_is_written(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody takes the room after it was looked for: the kernel refuses the bytes in the middle of a file."""
    training = Small(small_disk / "checkpoints", width=256)
    assert training.save("a") is None
    filler = small_disk / "somebody-elses"
    look = saving.shutil.disk_usage

    def look_and_lose_it(path: Path) -> Any:
        usage = look(path)
        filler.write_bytes(bytes(usage.free - 100_000))
        return usage

    with monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "disk_usage", look_and_lose_it)
        error = str(training.save("b"))
    assert "No space left on device" in error
    assert error.endswith(f"free some space; {STANDS}")
    assert sorted(path.name for path in training.directory.iterdir()) == ["a"]
    training.step()
    training.checkpointer.load("a")
    assert "MB free and the checkpoint needs" in str(training.save("b"))
    filler.unlink()
    assert training.save("b") is None
    assert [info.id for info in list_checkpoints(training.directory)] == ["a", "b"]


def test_a_run_on_a_full_disk_trains_on(small_disk: Path) -> None:
    rank = OneRank(small_disk / "run")
    rank.train(2)
    first = rank.save()
    filler = small_disk / "somebody-elses"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(65536)):
            pass
    save = begin_save(rank.core)
    rank.train(2)
    assert str(save.pending.result(30).error).endswith(f"free some space; {STANDS}")
    assert rank.step == 4
    filler.unlink()
    rank.train(1)
    second = rank.save()
    assert [info.id for info in list_checkpoints(small_disk / "run" / "checkpoints")] == [first, second]
