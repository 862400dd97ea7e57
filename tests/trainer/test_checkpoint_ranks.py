"""Checkpoints of several ranks: DDP and FSDP2 over gloo, in real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from trainctl.trainer.checkpoint import Accessor, Checkpointer, CheckpointError, State
from trainctl.trainer.checkpoint.export import export
from trainctl.wire.manifest import list_checkpoints, verify

WORKER = Path(__file__).with_name("checkpoint_ranks.py")


@pytest.fixture(scope="module")
def made_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left behind, after all that they check themselves held."""
    directory = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning:trainctl"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(directory), str(rank), "2"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == 0, told[0][1][-4000:] + told[1][1][-4000:]
    assert ranks[1].returncode == -signal.SIGKILL, told[1][1][-4000:]
    assert "all fine" in told[0][0]
    return directory


@pytest.mark.ranks
def test_two_ranks_are_exact_after_rollback_and_agree_on_every_failure(made_by_two: Path) -> None:
    assert [info.id for info in list_checkpoints(made_by_two / "ddp")] == ["two"]
    assert verify(made_by_two / "fsdp" / "two").world_size == 2


def alone(directory: Path) -> tuple[Checkpointer, nn.Sequential, torch.optim.Optimizer, list[int]]:
    model = nn.Sequential(nn.Linear(6, 17), nn.BatchNorm1d(17), nn.Dropout(0.4), nn.Linear(17, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    values: list[int] = []
    checkpointer = Checkpointer(
        directory=directory,
        run_id="test",
        rank=0,
        world_size=1,
        group=None,
        state=State(
            models=[model],
            optimizers=[optimizer],
            tracked={
                "value": Accessor(get=lambda: 0, set=values.append),
                "seen": Accessor(get=lambda: torch.zeros(2), set=lambda seen: values.append(seen.numel())),
                "generator": Accessor(get=torch.get_rng_state, set=lambda _state: None),
            },
        ),
    )
    return checkpointer, model, optimizer, values


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_reads_what_two_ranks_wrote(made_by_two: Path, name: str) -> None:
    checkpointer, model, optimizer, values = alone(made_by_two / name)
    loaded = checkpointer.load("two")
    checkpointer.commit(loaded)
    (numbers, apart) = loaded.notes
    assert numbers == "written by 2 ranks and read by 1: random numbers are not restored"
    assert apart == (
        "each rank had its own model.0.1.running_mean, model.0.1.running_var, tracked.generator and 1 more: "
        "every rank gets that of the lowest rank"
    )
    assert values == [0, 2]
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == parameter.shape
        assert state["step"].item() == 2
        assert state["exp_avg"].abs().sum() > 0
    before = torch.get_rng_state()
    loaded.restore_rng()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_what_two_ranks_wrote_is_exported_bit_for_bit(made_by_two: Path, name: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    done = export(made_by_two / name / "two", file)
    expected = torch.load(made_by_two / f"{name}-weights.pt", weights_only=True)
    found = load_file(file)
    assert found.keys() == expected.keys(), "named as the model's state_dict names them"
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)
    assert (done.tensors, done.bytes, done.skipped) == (len(expected), file.stat().st_size, [])
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "run": "test", "step": "2", "id": "two", "incarnation": "1"}


@pytest.mark.ranks
def test_a_missing_shard_is_named(made_by_two: Path) -> None:
    shard = made_by_two / "fsdp" / "two" / "__1_0.distcp"
    hidden = shard.rename(made_by_two / "hidden")
    try:
        with pytest.raises(CheckpointError, match=r"two/__1_0\.distcp is missing"):
            alone(made_by_two / "fsdp")[0].load("two")
    finally:
        hidden.rename(shard)


def test_several_ranks_without_a_group_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 ranks need a gloo group"):
        Checkpointer(directory=tmp_path, run_id="test", rank=0, world_size=2, group=None, state=State())
