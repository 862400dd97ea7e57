"""A checkpoint read as docs/checkpoints.md describes it, with nothing of trainctl's: as another tool would."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainctl.trainer.checkpoint import Checkpointer, State


def verified_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, once its digest and all its files have been checked."""
    manifest: dict[str, Any] = json.loads((directory / "MANIFEST.json").read_bytes())
    unsigned = json.dumps(manifest | {"digest": ""}, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(unsigned.encode()).hexdigest() == manifest["digest"]
    for file in manifest["files"]:
        data = (directory / file["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    return manifest


def value_of(node: tuple[Any, ...], tensors: dict[str, torch.Tensor]) -> Any:
    match node:
        case ("v", plain):
            return plain
        case ("ref", key, _device):
            return tensors[key]
        case ("tensor", tensor):
            return tensor
        case ("flat", "list" | "tuple", items):
            return items
        case ("list" | "tuple", nodes):
            return [value_of(item, tensors) for item in nodes]
        case ("dict" | "odict" | "counter", items):
            return {value_of(key, tensors): value_of(item, tensors) for key, item in items}
        case other:
            return other


def test_another_tool_reads_it_by_the_page_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    state = State(models=[model], optimizers=[optimizer], counters={"step": 7})
    ours = Checkpointer(
        directory=tmp_path / "checkpoints", run_id="test", rank=0, world_size=1, group=None, state=state
    )
    saved = ours.begin_save(
        id="step-00000007-1.1", step=7, incarnation=1, attempt=1, metrics={"val_loss": 2.5}, note="größer"
    )
    assert saved.result(30).error is None

    directory = tmp_path / "checkpoints" / "step-00000007-1.1"
    manifest = verified_manifest(directory)
    assert (manifest["format"], manifest["step"], manifest["metrics"], manifest["note"]) == (
        1,
        7,
        {"val_loss": 2.5},
        "größer",
    )
    listed = {file["name"] for file in manifest["files"]}
    assert {path.name for path in directory.iterdir()} == listed | {"MANIFEST.json"}

    reader = dcp.FileSystemReader(directory)
    index = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in index.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    with pytest.warns(UserWarning, match="load in a single process"):
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    for name, parameter in model.state_dict().items():
        assert torch.equal(tensors[f"model.0.{name}"], parameter)
    content = torch.load(directory / "rank-00000.pt", weights_only=True)
    assert (content["id"], content["rank"], content["world_size"]) == ("step-00000007-1.1", 0, 1)
    assert value_of(content["own"]["counters"], tensors) == {"step": 7}
    restored = value_of(content["shared"]["optimizer.0"], tensors)
    assert restored["param_groups"][0]["lr"] == 0.25
    assert torch.equal(restored["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
