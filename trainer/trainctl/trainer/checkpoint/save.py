"""Writing a staged state: together with all ranks, in one background thread, good only once it has its name.

    .ID.stage/   every rank writes and syncs its files and says their size and hash
                 rank 0 writes MANIFEST.json, syncs, renames to ID, syncs the parent directory
    ID/          now it is a checkpoint

Whatever fails on whichever rank, all ranks get the same error and rank 0 removes the stage directory.
"""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan

from trainctl.trainer.checkpoint.errors import CheckpointError
from trainctl.trainer.checkpoint.ranks import Ranks
from trainctl.trainer.checkpoint.script_files import ScriptFiles, let_save, vouch_for
from trainctl.trainer.checkpoint.sharded import local_part
from trainctl.trainer.checkpoint.tree import Node
from trainctl.wire.manifest import Manifest, ManifestFile, hash_file, write_manifest
from trainctl.wire.rundir import RunDir, fsync_dir

# The files' own headers and the manifest come on top of the tensors.
_SPACE_FACTOR = 1.1
_SPACE_EXTRA_BYTES = 1024 * 1024
DCP_METADATA = ".metadata"


@dataclass(frozen=True, kw_only=True)
class SaveResult:
    """How a save ended; `error`, the same on every rank, says why there is no new checkpoint. `bytes`: of all files."""

    id: str
    bytes: int
    stall_s: float
    write_s: float
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state in host memory, as one rank writes it. `problem`: why this rank has none; it tells the others."""

    id: str
    run_id: str
    step: int
    incarnation: int
    attempt: int
    metrics: dict[str, float]
    note: str | None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    shared: dict[str, Node] = field(default_factory=dict)
    own: dict[str, Node] = field(default_factory=dict)
    problem: str | None = None
    agreed: bool = False  # every rank has the same problem, and knows it
    staged: bool = False  # the script's own files are in the stage directory already


class PendingSave:
    """A save that runs in the background."""

    def __init__(self, *, id: str, stall_s: float, write: Callable[[], int]) -> None:  # noqa: A002 - the field's word
        self.id = id
        self.stall_s = stall_s
        self._write = write
        self._result: SaveResult | None = None
        self._thread = threading.Thread(target=self._run, name=f"trainctl-save-{id}", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether `result` would answer at once."""
        return self._result is not None

    def result(self, timeout_s: float | None = None) -> SaveResult:
        """Wait for the end. Raises TimeoutError when it takes longer; the save goes on."""
        self._thread.join(timeout_s)
        if self._result is None:
            raise TimeoutError(f"checkpoint {self.id} is still being written")
        return self._result

    def _run(self) -> None:
        started = time.perf_counter()
        size, problem = 0, None
        try:
            size = self._write()
        except CheckpointError as error:
            problem = str(error)
        except BaseException as error:  # noqa: BLE001 - the thread ends here, and the result must say so
            problem = f"{type(error).__name__}: {error}"
        self._result = SaveResult(
            id=self.id, bytes=size, stall_s=self.stall_s, write_s=time.perf_counter() - started, error=problem
        )


def write(directory: Path, snapshot: Snapshot, ranks: Ranks) -> int:
    """Make the snapshot a checkpoint; its size in bytes. A collective. Raises CheckpointError, alike on all ranks."""
    stage = directory / f".{snapshot.id}.stage"
    if snapshot.agreed:
        raise CheckpointError(str(snapshot.problem))
    try:
        needed = _needed(snapshot, ranks)
        if snapshot.staged:
            theirs = ranks.gather(vouch_for(stage, ranks))
        else:
            ranks.on_first("the checkpoint cannot be begun", lambda: _open_stage(directory, stage, snapshot.id, needed))
            theirs = []
        files = [*(file for share in theirs for file in share), *_write_files(stage, snapshot, ranks)]
        ranks.on_first("the checkpoint cannot be completed", lambda: _commit(directory, stage, snapshot, ranks, files))
    except CheckpointError:
        if ranks.first:
            # What cannot be removed now is swept at the next start; it never looks like a checkpoint.
            shutil.rmtree(stage, ignore_errors=True)
        raise
    return sum(file.bytes for file in files)


def stage_script(directory: Path, checkpoint_id: str, files: ScriptFiles, ranks: Ranks) -> None:
    """Open the stage directory and have the script write into it. A collective for the training thread.

    Raises CheckpointError, alike on all ranks; then nothing of it is left.
    """
    stage = directory / f".{checkpoint_id}.stage"
    try:
        ranks.on_first("the checkpoint cannot be begun", lambda: _open_stage(directory, stage, checkpoint_id, 0))
        let_save(files, stage, ranks)
    except CheckpointError:
        if ranks.first:
            shutil.rmtree(stage, ignore_errors=True)
        raise


def _needed(snapshot: Snapshot, ranks: Ranks) -> int:
    ranks.together("the state cannot be taken", lambda: _refuse(snapshot.problem))
    plain = sharded = 0
    for tensor in snapshot.tensors.values():
        part = local_part(tensor)
        size = part.numel() * part.element_size()
        if part is tensor:
            plain += size
        else:
            sharded += size
    sizes = ranks.gather((plain, sharded))
    return max(size[0] for size in sizes) + sum(size[1] for size in sizes)


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise CheckpointError(problem)


def _open_stage(directory: Path, stage: Path, checkpoint_id: str, needed: int) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (directory / checkpoint_id).exists():
        raise CheckpointError(f"checkpoint {checkpoint_id} exists already: it is kept, nothing was written")
    free = shutil.disk_usage(directory).free
    wanted = int(needed * _SPACE_FACTOR) + _SPACE_EXTRA_BYTES
    if free < wanted:
        raise CheckpointError(
            f"{directory} has {free / 1e6:.0f} MB free and the checkpoint needs {wanted / 1e6:.0f} MB: "
            "free some space; training goes on and the last good checkpoint stands"
        )
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(stage)
    stage.mkdir(mode=0o700)


def _write_files(stage: Path, snapshot: Snapshot, ranks: Ranks) -> list[ManifestFile]:
    """Write and sync all files; on every rank the list of all of them."""
    # Not dcp.save: it warns about a single rank, and its failures are a BaseException that other ranks wait on.
    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    writer = FileSystemWriter(stage, thread_count=1, sync_files=True)

    def local_plan() -> SavePlan:
        planner.set_up_planner(snapshot.tensors, writer.storage_meta(), ranks.first)
        writer.set_up_storage_writer(ranks.first)
        return writer.prepare_local_plan(planner.create_local_plan())

    plans = ranks.collect(ranks.together("the checkpoint cannot be planned", local_plan))
    agreed = ranks.on_first("the checkpoint cannot be planned", lambda: planner.create_global_plan(plans))
    plan = planner.finish_plan(ranks.scatter(writer.prepare_global_plan(agreed[0]) if agreed else []))

    def data() -> Any:
        written = writer.write_data(plan, planner)
        written.wait()
        _write_rank(stage, snapshot, ranks)
        return written.value()

    results = ranks.collect(ranks.together(f"writing to {stage.parent} failed", data))
    ranks.on_first(
        "the checkpoint's index cannot be written", lambda: writer.finish(agreed[1], results) if agreed else None
    )
    mine = ranks.together("the checkpoint cannot be hashed", lambda: _hash_own(stage, ranks))
    return [file for files in ranks.gather(mine) for file in files]


def rank_file(rank: int) -> str:
    """Where the own state of a rank lies within a checkpoint."""
    return f"rank-{rank:05d}.pt"


def _write_rank(stage: Path, snapshot: Snapshot, ranks: Ranks) -> None:
    content = {
        "id": snapshot.id,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "shared": snapshot.shared,
        "own": snapshot.own,
    }
    with (stage / rank_file(ranks.rank)).open("xb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _hash_own(stage: Path, ranks: Ranks) -> list[ManifestFile]:
    """Size and hash of the files that this rank wrote, read back from the file system."""
    names = [path.name for path in stage.glob(f"__{ranks.rank}_*.distcp")]
    names.append(rank_file(ranks.rank))
    if ranks.first:
        names.append(DCP_METADATA)
    found = []
    for name in sorted(names):
        size, digest = hash_file(stage / name)
        found.append(ManifestFile(name=name, bytes=size, sha256=digest))
    return found


def _commit(directory: Path, stage: Path, snapshot: Snapshot, ranks: Ranks, files: list[ManifestFile]) -> None:
    manifest = Manifest(
        id=snapshot.id,
        run=snapshot.run_id,
        step=snapshot.step,
        incarnation=snapshot.incarnation,
        attempt=snapshot.attempt,
        world_size=ranks.world_size,
        time=time.time(),
        files=files,
        metrics=snapshot.metrics,
        note=snapshot.note,
        audit_head=RunDir(directory.parent).audit_head(),
    )
    write_manifest(stage, manifest)
    fsync_dir(stage)
    stage.rename(directory / snapshot.id)
    fsync_dir(directory)
