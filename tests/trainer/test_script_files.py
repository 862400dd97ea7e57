"""A script's own checkpointer, in one process: what ours vouches for, and what happens when it fails."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainctl.trainer import Run
from trainctl.trainer.checkpoint import Accessor, Checkpointer, CheckpointError, State
from trainctl.trainer.checkpoint.script_files import ScriptFiles
from trainctl.wire.manifest import list_checkpoints, read_manifest


class Script:
    """Keeps one number in a file of its own; what it does instead is up to the test."""

    def __init__(self, directory: Path) -> None:
        self.value = 1
        self.tracked: Any = torch.ones(3)
        self.counters: dict[str, Any] = {"step": 0}
        self.checkpointer = Checkpointer(
            directory=directory / "checkpoints",
            run_id="r",
            rank=0,
            world_size=1,
            group=None,
            state=State(
                script=ScriptFiles(save=self.write, load=self.read),
                tracked={"mine": Accessor(get=lambda: self.tracked, set=self._track)},
                counters=self.counters,
            ),
        )

    def _track(self, value: Any) -> None:
        self.tracked = value

    def write(self, directory: Path) -> None:
        (directory / "deep").mkdir()
        (directory / "deep" / "value").write_text(str(self.value))

    def read(self, directory: Path) -> None:
        self.value = int((directory / "deep" / "value").read_text())

    def save(self, checkpoint: str) -> str | None:
        return (
            self.checkpointer.begin_save(id=checkpoint, step=1, incarnation=1, attempt=1, metrics={}).result(30).error
        )


def test_the_scripts_files_and_our_own_parts_come_back_together(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.counters["step"] = 7
    before = torch.get_rng_state()
    assert script.save("a") is None
    script.value, script.tracked, script.counters["step"] = 2, torch.zeros(3), 9
    torch.rand(5)
    loaded = script.checkpointer.load("a")
    assert (script.value, script.counters["step"]) == (2, 9), "loading touches nothing"
    script.checkpointer.commit(loaded)
    loaded.restore_rng()
    assert (script.value, script.counters["step"]) == (1, 7)
    assert torch.equal(script.tracked, torch.ones(3))
    assert torch.equal(torch.get_rng_state(), before)
    files = {file.name for file in read_manifest(tmp_path / "checkpoints" / "a").files}
    assert "script/deep/value" in files


def test_a_flipped_bit_in_a_file_of_the_scripts_is_found_before_the_script_reads_it(tmp_path: Path) -> None:
    script = Script(tmp_path)
    assert script.save("a") is None
    (tmp_path / "checkpoints" / "a" / "script" / "deep" / "value").write_text("0")
    with pytest.raises(CheckpointError, match="a/script/deep/value is damaged"):
        script.checkpointer.load("a")


def raises(_directory: Path) -> None:
    raise RuntimeError("no quota left")


def nothing(_directory: Path) -> None:
    pass


def link_to_a_directory(directory: Path) -> None:
    (directory / "value").write_text("1")
    (directory / "outside").symlink_to("/etc")


def link(directory: Path) -> None:
    (directory / "outside").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("does", "words"),
    [
        (raises, "no quota left"),
        (nothing, "wrote no file"),
        (link, "script/outside.*no regular"),
        (link_to_a_directory, "script/outside.*no regular"),
    ],
)
def test_what_save_does_wrong_costs_that_checkpoint_and_nothing_else(tmp_path: Path, does: Any, words: str) -> None:
    script = Script(tmp_path)
    assert script.save("a") is None
    right = script.checkpointer.state.script
    object.__setattr__(script.checkpointer.state, "script", ScriptFiles(save=does, load=script.read))
    error = str(script.save("b"))
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(error)
    object.__setattr__(script.checkpointer.state, "script", right)
    assert script.save("c") is None
    assert [info.id for info in list_checkpoints(tmp_path / "checkpoints")] == ["a", "c"]
    assert not list((tmp_path / "checkpoints").glob(".*")), "nothing half-written is left"


def test_what_save_takes_is_told_as_the_stall(tmp_path: Path) -> None:
    script = Script(tmp_path)
    waited: list[float] = []

    def slow(directory: Path) -> None:
        began = torch.rand(1).item()
        script.write(directory)
        waited.append(began)

    object.__setattr__(script.checkpointer.state, "script", ScriptFiles(save=slow, load=script.read))
    pending = script.checkpointer.begin_save(id="a", step=1, incarnation=1, attempt=1, metrics={})
    assert waited, "it was called before begin_save came back"
    assert pending.result(30).stall_s > 0


def test_save_is_not_called_while_an_earlier_checkpoint_is_written(tmp_path: Path) -> None:
    """The ranks write over one group: whoever is in `save` then would meet another rank's write."""
    script, ended = Script(tmp_path), list[bool]()

    def write(directory: Path) -> None:
        ended.append(all(pending.done() for pending in begun))
        script.write(directory)

    object.__setattr__(script.checkpointer.state, "script", ScriptFiles(save=write, load=script.read))
    begun: list[Any] = []
    begun += (
        script.checkpointer.begin_save(id=name, step=1, incarnation=1, attempt=1, metrics={}, may_leave_out=name == "c")
        for name in "abc"
    )
    assert [pending.result(30).error for pending in begun] == [None] * 3
    assert ended == [True] * 3


def test_none_of_the_scripts_states_is_said_to_be_in_memory(tmp_path: Path) -> None:
    script = Script(tmp_path)
    pending = script.checkpointer.begin_save(id="a", step=1, incarnation=1, attempt=1, metrics={})
    assert script.checkpointer.in_memory == []
    assert pending.result(30).error is None
    assert script.checkpointer.in_memory == []
    assert not script.checkpointer.load("a").from_memory
    (tmp_path / "checkpoints" / "a" / "script" / "deep" / "value").unlink()
    with pytest.raises(CheckpointError, match="a/script/deep/value is missing"):
        script.checkpointer.load("a")


def test_under_a_umask_of_0_the_scripts_files_are_read_and_through_a_link_they_are_not(tmp_path: Path) -> None:
    script, before = Script(tmp_path), os.umask(0)
    try:
        assert script.save("a") is None
    finally:
        os.umask(before)
    folder = tmp_path / "checkpoints" / "a" / "script" / "deep"
    assert folder.stat().st_mode & 0o777 == 0o777
    script.checkpointer.load("a")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a/script/deep is not a directory: links are not followed"):
        script.checkpointer.load("a")


def test_a_checkpoint_of_the_other_kind_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    script = Script(tmp_path)
    assert script.save("theirs") is None
    model = nn.Linear(2, 2)
    ours = Checkpointer(
        directory=tmp_path / "checkpoints", run_id="r", rank=0, world_size=1, group=None, state=State(models=[model])
    )
    assert ours.begin_save(id="ours", step=2, incarnation=1, attempt=1, metrics={}).result(30).error is None
    with pytest.raises(CheckpointError, match="theirs was written by the script's own save="):
        ours.load("theirs")
    with pytest.raises(CheckpointError, match="ours was written by trainctl"):
        script.checkpointer.load("ours")


@pytest.mark.parametrize("given", [{"save": nothing}, {"load": nothing}, {"save": nothing, "load": 3}])
def test_one_without_the_other_is_a_wrong_call(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"save= and load="):
        Run.attach("r", **given)


def test_a_policy_is_made_by_its_own_class() -> None:
    with pytest.raises(TypeError, match=r"Retention\(last=3\)"):
        Run.attach("r", keep=3)  # type: ignore[arg-type]
