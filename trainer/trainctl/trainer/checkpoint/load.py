"""Reading a checkpoint: every file is verified first, then all goes into new host memory; nothing live is touched."""

import contextlib
import io
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from trainctl.trainer.checkpoint.capture import Captured
from trainctl.trainer.checkpoint.errors import CheckpointError, RanksLost, UnreadFile
from trainctl.trainer.checkpoint.index import read_index
from trainctl.trainer.checkpoint.param_groups import compare_groups
from trainctl.trainer.checkpoint.ranks import Ranks
from trainctl.trainer.checkpoint.resized import not_exact
from trainctl.trainer.checkpoint.rng import restore_rng
from trainctl.trainer.checkpoint.save import DCP_METADATA, rank_file
from trainctl.trainer.checkpoint.script_files import FOLDER, has_script_files
from trainctl.trainer.checkpoint.sharded import local_part, twin
from trainctl.trainer.checkpoint.state import State
from trainctl.trainer.checkpoint.tree import Node, decode
from trainctl.wire.manifest import (
    DamagedCheckpoint,
    Manifest,
    UnreadCheckpoint,
    list_checkpoints,
    read_manifest,
    read_vouched,
    remember_check,
    verify,
)
from trainctl.wire.save_order import next_older

_OPTIMIZER_STATE = re.compile(r"^optimizer\.(\d+)\.state\.(\d+)\.")
_TRY_AGAIN = "nothing was changed; it may be whole: try again, or take an older one (trainctl checkpoint ls)"
_REPLACE = "nothing was changed; roll back to an older checkpoint (trainctl checkpoint ls)"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint in host memory. It can be committed any number of times: committing copies out of it.

    One `from_memory` lies in the buffers that saves use, and is good until the next save begins.

    `notes` tells what will not be as it was, for the plan that an operator confirms; empty means exact to the bit.
    """

    id: str
    step: int
    incarnation: int
    attempt: int
    world_size: int
    metrics: dict[str, float]
    note: str | None
    notes: tuple[str, ...] = ()
    shared: dict[str, Node] = field(default_factory=dict, repr=False)
    own: dict[str, Node] = field(default_factory=dict, repr=False)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    same_ranks: bool = True
    from_memory: bool = False
    whole: Callable[[], bool] = field(default=lambda: True, repr=False)  # false once a later save took its memory
    script: Path | None = None  # where the script's own files are, verified
    later: dict[str, Node] = field(default_factory=dict, repr=False)  # tracked then, and not, or not yet, now
    # Reads the tensors of those once they are tracked: alone, without the other ranks.
    read_later: Callable[[dict[str, Node], Captured], dict[str, torch.Tensor]] = field(
        default=lambda _nodes, _live: {}, repr=False
    )

    @property
    def counters(self) -> dict[str, Any]:
        """The counters as they were."""
        return dict(self.value("counters") or {})

    @property
    def tunables(self) -> dict[str, Any]:
        """The tunables as they were, whether or not a commit restores them."""
        return dict(self.value("tunables") or {})

    @property
    def overrides(self) -> dict[str, Any] | None:
        """The state of the optimizer overrides as they were, or None."""
        value: dict[str, Any] | None = self.value("overrides")
        return value

    def value(self, name: str) -> Any:
        """A part of this rank's own state, newly made, or None."""
        node = self.own.get(name)
        return None if node is None else decode(node, _no_reference)

    def restore_rng(self) -> None:
        """Set this rank's random number generators; call it last, after the data iterator was made anew.

        With another number of ranks than the checkpoint's there is nothing to restore, as `notes` says.
        """
        state = self.value("rng")
        if state is not None and self.same_ranks:
            restore_rng(state)


def _no_reference(name: str, _device: str) -> Any:
    raise CheckpointError(f"a rank's own state refers to the tensor {name!r}: the checkpoint is not one of ours")


def read(directory: Path, checkpoint_id: str, *, ranks: Ranks, state: State, live: Captured) -> Loaded:
    """Verify and read a checkpoint for this rank. A collective. Raises CheckpointError, alike on all ranks."""
    path = directory / checkpoint_id
    damage: str | None = None  # what this rank found, beside errors of the disk and of itself

    def verified() -> Manifest:
        nonlocal damage
        try:
            return _verified(path, checkpoint_id, ranks)
        except CheckpointError as error:
            damage = None if isinstance(error, UnreadFile) else str(error)
            raise

    try:
        manifest = ranks.together("the checkpoint cannot be verified", verified)
    except RanksLost:
        raise
    except CheckpointError:
        found = [text for text in ranks.gather(damage) if text is not None]
        if ranks.first and found and path.is_dir():
            remember_check(path, ok=False, text=found[0])
        raise
    if ranks.first:
        remember_check(path, ok=True, text="every file has the size and hash of the manifest")
    return ranks.together(
        f"checkpoint {checkpoint_id} cannot be read", lambda: _read_whole(path, manifest, ranks, state, live)
    )


def _verified(path: Path, checkpoint_id: str, ranks: Ranks) -> Manifest:
    """The manifest. The ranks share the hashing: each file is hashed by one, and `together` makes it count for all."""
    try:
        manifest = read_manifest(path)
        names = [file.name for file in sorted(manifest.files, key=lambda file: -file.bytes)]
        verify(path, only=names[ranks.rank :: ranks.world_size])
    except UnreadCheckpoint as error:
        raise UnreadFile(f"{error}; {_TRY_AGAIN}{_older(path)}") from None
    except DamagedCheckpoint as error:
        raise CheckpointError(f"{error}; {_REPLACE}{_older(path)}") from None
    if manifest.id != checkpoint_id:
        raise CheckpointError(f"{checkpoint_id} holds the checkpoint {manifest.id}: it was renamed; {_REPLACE}")
    for name in (DCP_METADATA, rank_file(0)):
        if name not in names:
            raise CheckpointError(f"the manifest of {checkpoint_id} does not list {name}; {_REPLACE}")
    return manifest


def _older(path: Path) -> str:
    """The next older checkpoint that may be whole, for the operator's next try."""
    known = list_checkpoints(path.parent)
    changed = math.inf
    with contextlib.suppress(OSError):  # where its manifest is damaged: that was the last thing to come into it
        changed = path.stat().st_mtime
    older = next_older(known, path.name, changed)
    return f": the next older one is {older.id} (step {older.step})" if older else ""


def _read_whole(path: Path, manifest: Manifest, ranks: Ranks, state: State, live: Captured) -> Loaded:
    try:
        return _read_rank(path, manifest, ranks, state, live)
    except DamagedCheckpoint as error:  # it changed since it was verified
        raise CheckpointError(f"{error}; {_REPLACE}{_older(path)}") from None


def _read_rank(path: Path, manifest: Manifest, ranks: Ranks, state: State, live: Captured) -> Loaded:
    same = manifest.world_size == ranks.world_size
    name = rank_file(ranks.rank if same else 0)
    if all(file.name != name for file in manifest.files):
        raise CheckpointError(f"the manifest of {manifest.id} does not list {name}; {_REPLACE}")
    content = torch.load(io.BytesIO(read_vouched(path, manifest, name)), map_location="cpu", weights_only=True)
    if content["id"] != manifest.id:
        raise CheckpointError(f"{manifest.id}/{name} belongs to {content['id']}; {_REPLACE}")
    shared: dict[str, Node] = content["shared"]
    own: dict[str, Node] = content["own"]
    apart: dict[str, torch.Tensor] = content.get("tensors", {})  # before there were any, all had the lowest rank's
    by_script = has_script_files(manifest)
    if by_script is not (state.script is not None):
        written, wants = ("by the script's own save=", "load=") if by_script else ("by trainctl", "none of load=")
        raise CheckpointError(f"{manifest.id} was written {written}, so Run.attach needs {wants}: nothing was changed")
    notes = compare_parts(state, live, shared, own)
    compare_groups(state, live, shared)
    if not same:
        loader = decode(own["loader"], _no_reference) if "loader" in own else None
        notes += not_exact(
            before=manifest.world_size, now=ranks.world_size, loader=loader, apart=content.get("apart", [])
        )
    wanted = {name: node for name, node in shared.items() if name in live.nodes}
    reader = FileSystemReader(path)
    metadata = read_index(path, manifest)
    common = _targets(wanted, metadata, state, live, without=apart.keys())
    tensors = common | apart
    compare_models(tensors, live)
    _read_tensors(reader, metadata, common)

    def read_later(nodes: dict[str, Node], live: Captured) -> dict[str, torch.Tensor]:
        targets = _targets(nodes, metadata, state, live, without=apart.keys())
        try:
            _read_tensors(FileSystemReader(path), metadata, targets)
        except Exception as error:  # it was verified, so this is the file system, or somebody who deleted it
            raise CheckpointError(f"{manifest.id} cannot be read any more: {error}; {_TRY_AGAIN}") from error
        return targets | apart

    return Loaded(
        id=manifest.id,
        step=manifest.step,
        incarnation=manifest.incarnation,
        attempt=manifest.attempt,
        world_size=manifest.world_size,
        metrics=manifest.metrics,
        note=manifest.note,
        notes=tuple(notes),
        shared=wanted,
        own=own,
        tensors=tensors,
        same_ranks=same,
        script=path / FOLDER if by_script else None,
        later={name: node for name, node in shared.items() if name.startswith("tracked.") and name not in live.nodes},
        read_later=read_later,
    )


def left_out(name: str) -> str:
    """The note on a part of the checkpoint that nobody tracks."""
    return f"{name} is in the checkpoint and not tracked now: left out"


def compare_parts(state: State, live: Captured, shared: dict[str, Node], own: dict[str, Node]) -> list[str]:
    """What is on one side only. Raises where training could not go on from it, else tells in words."""
    for what, count in (("model", len(state.models)), ("optimizer", len(state.optimizers))):
        saved = sum(name.startswith(f"{what}.") for name in shared)
        if saved != count:
            raise CheckpointError(f"the checkpoint holds {saved} {what}s and the run has {count}: nothing was changed")
    notes = [
        f"{name} is not in the checkpoint and stays as it is"
        for name in live.nodes
        if name.startswith("tracked.") and name not in shared
    ]
    notes += [left_out(name) for name in shared if name not in live.nodes]
    present = {f"scheduler.{index}" for index in range(len(state.schedulers))}
    present |= {name for name in ("scaler", "loader") if getattr(state, name) is not None}
    for name in sorted(present - own.keys()):
        notes.append(f"the checkpoint has no {name}: it stays as it is")
    for name in sorted(own.keys() - present - {"overrides", "tunables", "trials", "counters", "rng"}):
        notes.append(f"{name} is in the checkpoint and not in the run: left out")
    return notes


def _references(node: Any, found: set[str]) -> set[str]:
    if isinstance(node, tuple) and node and node[0] == "ref":
        found.add(node[1])
    elif isinstance(node, tuple | list) and not (node and node[0] in ("v", "flat", "numpy", "bytes")):
        for item in node:
            _references(item, found)
    return found


def _targets(
    nodes: dict[str, Node], metadata: Metadata, state: State, live: Captured, *, without: Collection[str]
) -> dict[str, torch.Tensor]:
    """New host tensors for what this rank reads, sharded like the live ones; state to be made like its parameter."""
    names: set[str] = set()
    for node in nodes.values():
        _references(node, names)
    targets = {}
    for name in sorted(names.difference(without)):
        stored = metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"the checkpoint has no tensor {name}; {_REPLACE}")
        like = live.tensors.get(name)
        if like is None:
            like = _parameter_of(name, state)
        if like is not None and like.shape == stored.size:
            targets[name] = twin(like, torch.empty(local_part(like).shape, dtype=stored.properties.dtype))
        else:
            targets[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    return targets


def _parameter_of(name: str, state: State) -> torch.Tensor | None:
    found = _OPTIMIZER_STATE.match(name)
    if found is None:
        return None
    groups = state.optimizers[int(found[1])].param_groups
    parameters: list[torch.Tensor] = [parameter for group in groups for parameter in group["params"]]
    return parameters[int(found[2])] if int(found[2]) < len(parameters) else None


def compare_models(saved: dict[str, torch.Tensor], live: Captured) -> None:
    """Committing may not fail half-way, so a model that differs is refused here."""
    names = {name for name in live.tensors if name.startswith("model.")}
    stored = {name for name in saved if name.startswith("model.")}
    if names != stored:
        one = min(names ^ stored)
        where = "the run's model only" if one in names else "the checkpoint only"
        raise CheckpointError(f"{one} is in {where}: this checkpoint is of another model, nothing was changed")
    for name in sorted(names):
        ours, theirs = live.tensors[name], saved[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise CheckpointError(
                f"{name} is {tuple(theirs.shape)} {theirs.dtype} in the checkpoint and {tuple(ours.shape)} "
                f"{ours.dtype} in the run: this checkpoint is of another model, nothing was changed"
            )


def _read_tensors(reader: FileSystemReader, metadata: Metadata, tensors: dict[str, torch.Tensor]) -> None:
    # Not dcp.load: every rank reads for itself, and a reader needs no collective.
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(planner.finish_plan(plan), planner).wait()
