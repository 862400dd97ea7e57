"""`checkpoint export` from one process: what is written, what is refused, and that it is all or nothing."""

import json
import resource
import signal
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from jobs import trainctl
from trainctl.trainer.checkpoint import Checkpointer, CheckpointError, State
from trainctl.trainer.checkpoint.export import export
from trainctl.wire.messages import RunInfo
from trainctl.wire.rundir import RunDir


class Odd(nn.Module):
    """Every dtype that a model may have, no dimension, a tied weight, and something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.tied = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.tied.weight = self.first.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("small", torch.randn(3, dtype=torch.float16))

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: object) -> None:
        pass


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    """A model of which there is a checkpoint `a` in the run's directory."""
    torch.manual_seed(1)
    made = Odd()
    run = RunDir(tmp_path / "run")
    run.create()
    checkpointer = Checkpointer(
        directory=run.checkpoints, run_id="r", rank=0, world_size=1, group=None, state=State(models=[made])
    )
    assert checkpointer.begin_save(id="a", step=5, incarnation=1, attempt=1, metrics={}).result(30).error is None
    return made


def test_the_weights_are_the_models_own_by_name_and_to_the_bit(model: nn.Module, tmp_path: Path) -> None:
    done = export(tmp_path / "run/checkpoints/a", tmp_path / "w")
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    found = load_file(tmp_path / "w")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value)
    assert done.skipped == ["_extra_state"]
    assert (done.id, done.step, done.tensors) == ("a", 5, len(expected))


def test_a_file_that_is_there_is_replaced_only_by_force(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "w").write_text("mine")
    with pytest.raises(CheckpointError, match="--force"):
        export(tmp_path / "run/checkpoints/a", tmp_path / "w")
    assert (tmp_path / "w").read_text() == "mine"
    export(tmp_path / "run/checkpoints/a", tmp_path / "w", force=True)
    assert load_file(tmp_path / "w")


def test_a_damaged_checkpoint_gives_no_file(model: nn.Module, tmp_path: Path) -> None:
    (shard,) = (tmp_path / "run/checkpoints/a").glob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"distcp is damaged.*nothing was written"):
        export(tmp_path / "run/checkpoints/a", tmp_path / "w")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_file_that_cannot_be_written_whole_leaves_nothing_behind(model: nn.Module, tmp_path: Path) -> None:
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(Exception, match=r"(?i)too large"):
            export(tmp_path / "run/checkpoints/a", tmp_path / "w")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_command_line_exports_from_a_recorded_run(model: nn.Module, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    made = RunInfo(run="odd", id="r", dir=str(directory), host="h", created=1.0, started=1.0, world_size=1, attempt=1)

    (directory / "run.json").write_bytes(msgspec.json.encode(made))
    file = tmp_path / "w.safetensors"
    done = json.loads(trainctl("checkpoint", "export", "5", str(file), "-r", str(directory), "--json").stdout)
    assert (done["schema"], done["run"], done["id"], done["step"]) == (1, "odd", "a", 5)
    assert done["bytes"] == file.stat().st_size
    again = trainctl("checkpoint", "export", "a", str(file), "-r", str(directory), check=False)
    assert again.returncode == 2
    assert "--force" in again.stderr
