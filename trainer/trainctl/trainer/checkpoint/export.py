"""The weights of a checkpoint as one plain safetensors file, for tools that know nothing of trainctl.

usage: python -m trainctl.trainer.checkpoint.export CHECKPOINT_DIRECTORY FILE [--model I] [--force]

The checkpoint is verified first, and shards of all ranks are put together. Tensors are named as the model's state_dict
names them; `run`, `step`, `id` and `incarnation` are in the file's metadata. What was done is said as one JSON line,
what went wrong as one line on stderr, with exit code 1. Needs torch and safetensors; no rank, no hub.
"""

import argparse
import io
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainctl.trainer.checkpoint.errors import CheckpointError
from trainctl.trainer.checkpoint.index import read_index
from trainctl.trainer.checkpoint.save import DCP_METADATA, rank_file
from trainctl.trainer.checkpoint.script_files import has_script_files
from trainctl.wire.manifest import DamagedCheckpoint, Manifest, read_vouched, verify
from trainctl.wire.rundir import fsync_dir

if TYPE_CHECKING:
    from trainctl.trainer.checkpoint.tree import Node


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What was written; `skipped` are entries of the state_dict that are no tensors."""

    id: str
    run: str
    step: int
    file: str
    bytes: int
    tensors: int
    skipped: list[str]


def export(directory: Path, file: Path, *, model: int | None = None, force: bool = False) -> Exported:
    """Write the weights of the checkpoint in `directory` to `file`, at once or not at all.

    Raises CheckpointError for a checkpoint that is damaged or holds no model, and where `file` exists without `force`;
    OSError; ModuleNotFoundError without safetensors.
    """
    if file.exists() and not force:
        raise CheckpointError(f"{file} exists already: nothing was written; --force replaces it")
    manifest = _verified(directory)
    try:
        names, skipped = _names_of(directory, manifest, model)
        tensors = _read(directory, manifest, names)
    except DamagedCheckpoint as damage:  # it changed since it was verified
        raise CheckpointError(f"{damage}; nothing was written") from None
    metadata = {"format": "pt", "run": manifest.run, "step": str(manifest.step), "id": manifest.id}
    metadata |= {"incarnation": str(manifest.incarnation)}
    size = _write(file, tensors, metadata, force=force)
    return Exported(
        id=manifest.id,
        run=manifest.run,
        step=manifest.step,
        file=str(file.absolute()),
        bytes=size,
        tensors=len(tensors),
        skipped=skipped,
    )


def _verified(directory: Path) -> Manifest:
    try:
        manifest = verify(directory)
    except DamagedCheckpoint as damage:
        raise CheckpointError(f"{damage}; nothing was written") from None
    if has_script_files(manifest):
        raise CheckpointError(
            f"{manifest.id} was written by the script's own save=: its weights are in {directory / 'script'}, in that "
            "script's format"
        )
    listed_names = {listed.name for listed in manifest.files}
    if missing := {DCP_METADATA, rank_file(0)} - listed_names:
        raise CheckpointError(f"the manifest of {manifest.id} does not list {min(missing)}: not one of ours")
    return manifest


def _names_of(directory: Path, manifest: Manifest, model: int | None) -> tuple[dict[str, str], list[str]]:
    """The model's own names of its tensors, each with its name in the checkpoint; and what is no tensor."""
    content = torch.load(
        io.BytesIO(read_vouched(directory, manifest, rank_file(0))), map_location="cpu", weights_only=True
    )
    shared: dict[str, Node] = content["shared"]
    count = sum(name.startswith("model.") for name in shared)
    if count == 0:
        raise CheckpointError(f"{manifest.id} holds no model: none was given to Run.attach")
    if model is None and count > 1:
        raise CheckpointError(f"{manifest.id} holds {count} models: say which with --model 0 to --model {count - 1}")
    if f"model.{model or 0}" not in shared:
        raise CheckpointError(f"{manifest.id} has no model {model}: there are {count}, counted from 0")
    names, skipped = {}, []
    for key, value in shared[f"model.{model or 0}"][1]:
        if value[0] == "ref":
            names[str(key[1])] = str(value[1])
        else:
            skipped.append(str(key[1]))
    return names, skipped


def _read(directory: Path, manifest: Manifest, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Whole tensors by the model's own names, whatever ranks wrote their parts."""
    reader = FileSystemReader(directory)
    metadata = read_index(directory, manifest)
    whole: dict[str, Any] = {}
    for stored_name in names.values():
        stored = metadata.state_dict_metadata.get(stored_name)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"the checkpoint has no tensor {stored_name}: nothing was written")
        whole[stored_name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(whole, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(planner.finish_plan(plan), planner).wait()
    return {name: whole[stored_name] for name, stored_name in names.items()}


def _write(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], *, force: bool) -> int:
    from safetensors.torch import save_file

    beside = file.with_name(f".{file.name}.{secrets.token_hex(6)}.new")
    try:
        save_file(tensors, beside, metadata=metadata)
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        if force or not _linked(beside, file):
            beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    fsync_dir(file.absolute().parent)
    return file.stat().st_size


def _linked(beside: Path, file: Path) -> bool:
    """Give it its name unless that is taken, which a rename would replace. False where there are no hard links."""
    try:
        os.link(beside, file)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", type=int)
    parser.add_argument("--force", action="store_true")
    given = parser.parse_args()
    try:
        done = export(given.directory, given.file, model=given.model, force=given.force)
    except FileExistsError:
        print(f"{given.file} came to be there meanwhile: nothing was written; --force replaces it", file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or given.file}: {error.strerror or error}; nothing was written", file=sys.stderr)
    except Exception as error:  # noqa: BLE001 - safetensors has errors of its own; whoever started us reads one line
        print(str(error).strip() or type(error).__name__, file=sys.stderr)
    else:
        print(msgspec.json.encode(done).decode())
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
