"""A checkpoint read as docs/checkpoints.md describes it, with nothing of trainctl's: as another tool would."""

import hashlib
import json
import re
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainctl.trainer.checkpoint import Checkpointer, State
from trainctl.wire.manifest import Manifest, ManifestFile, read_manifest, write_manifest


def verified_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, once its digest and all its files have been checked."""
    text = (directory / "MANIFEST.json").read_text(encoding="utf-8")
    manifest: dict[str, Any] = json.loads(text)
    compact = re.sub(r'("(?:[^"\\]|\\.)*")|\s+', lambda found: found[1] or "", text)
    unsigned = compact.replace(f'"digest":"{manifest["digest"]}"', '"digest":""')
    assert hashlib.sha256(unsigned.encode()).hexdigest() == manifest["digest"]
    assert compact == written(manifest)
    for file in manifest["files"]:
        data = (directory / file["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    return manifest


def written(value: Any) -> str:
    """A manifest, or a value in it, as another tool writes it for trainctl."""
    match value:
        case dict():
            return "{" + ",".join(f"{written(name)}:{written(item)}" for name, item in value.items()) + "}"
        case list():
            return "[" + ",".join(written(item) for item in value) + "]"
        case float():
            number = Decimal(repr(value))  # the fewest digits
            sign, digits, exponent = number.normalize().as_tuple()
            if not number or 1e-5 <= abs(value) < 1e16:
                plain = f"{number:f}"
                return plain if "." in plain else f"{plain}.0"
            fraction = "".join(f"{digit}" for digit in digits[1:])
            point = "." if fraction else ""
            return f"{'-' * sign}{digits[0]}{point}{fraction}e{len(digits) - 1 + int(exponent)}"
        case _:
            return json.dumps(value, ensure_ascii=False)


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


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": 1e-5},
        {"loss": 8.4e-7, "rate": 1.5e-7},
        {"tokens": 1e16},
        {"tokens": 1.5e300},
        {"a b": -0.0, "n": 5e-324},
    ],
)
def test_the_digest_is_computed_by_the_page_whatever_the_numbers_are(tmp_path: Path, metrics: dict[str, float]) -> None:
    state = State(counters={"step": 7})
    ours = Checkpointer(directory=tmp_path, run_id="test", rank=0, world_size=1, group=None, state=state)
    note = 'a "b" : {c} \\ d\n\x01é\u2028'
    saved = ours.begin_save(id="a", step=7, incarnation=1, attempt=1, metrics=metrics, note=note)
    assert saved.result(30).error is None
    manifest = verified_manifest(tmp_path / "a")
    assert (manifest["metrics"], manifest["note"]) == (metrics, note)


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.text())
def test_numbers_and_text_are_written_as_the_page_says(number: float, text: str) -> None:
    files: list[ManifestFile] = []
    manifest = Manifest(
        id="a",
        run="r",
        step=1,
        incarnation=1,
        attempt=1,
        world_size=1,
        time=number,
        files=files,
        metrics={text: number},
    )
    with TemporaryDirectory() as directory:
        write_manifest(Path(directory), manifest)
        verified_manifest(Path(directory))
        Path(directory, "MANIFEST.json").write_text(written(json.loads(Path(directory, "MANIFEST.json").read_text())))
        assert read_manifest(Path(directory)).metrics == {text: number}


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
