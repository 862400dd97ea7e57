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
from torch.distributed.checkpoint.planner import SavePlan

from trainctl.trainer.checkpoint.apart import Apart, find_apart
from trainctl.trainer.checkpoint.background import Background, Pace
from trainctl.trainer.checkpoint.errors import CheckpointError, RanksLost
from trainctl.trainer.checkpoint.paced_files import PacedWriter
from trainctl.trainer.checkpoint.ranks import Ranks
from trainctl.trainer.checkpoint.script_files import ScriptFiles, let_save, vouch_for
from trainctl.trainer.checkpoint.sharded import local_part
from trainctl.trainer.checkpoint.tree import Node
from trainctl.wire.manifest import MANIFEST, Manifest, ManifestFile, hash_file, write_manifest
from trainctl.wire.rundir import RunDir, fsync_dir, make_dir

# The files' own headers and the manifest come on top of the tensors.
_SPACE_FACTOR = 1.1
_SPACE_EXTRA_BYTES = 1024 * 1024
_STANDS = "the last good checkpoint stands"
DCP_METADATA = ".metadata"


@dataclass(frozen=True, kw_only=True)
class SaveResult:
    """How a save ended; `error` says why there is no new checkpoint. `bytes`: of all files.

    `agreed`: every rank has this result. Else this one lost touch, and others may have another.
    """

    id: str
    bytes: int
    stall_s: float
    write_s: float
    error: str | None
    agreed: bool = True


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state in host memory, as one rank writes it. `problem`: why this rank has none; it tells the others.

    `may_differ` names the tensors that are not known to be the same on every rank.
    """

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
    may_differ: frozenset[str] = frozenset()
    problem: str | None = None
    time: float = field(default_factory=time.time)
    agreed: bool = False  # every rank has the same problem, and knows it
    staged: bool = False  # the script's own files are in the stage directory already


class PendingSave:
    """A save that runs in the background, or waits there for the one before it."""

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - the field's word
        stall_s: float,
        write: Callable[[], int],
        background: Background,
        pace: Pace,
    ) -> None:
        self.id = id
        self.stall_s = stall_s
        self._write: Callable[[], int] | None = write
        self._pace = pace
        self._result: SaveResult | None = None
        self._ended = threading.Event()
        background.put(self._run)

    def done(self) -> bool:
        """Whether `result` would answer at once."""
        return self._result is not None

    def result(self, timeout_s: float | None = None) -> SaveResult:
        """Wait for the end. Raises TimeoutError when it takes longer; the save goes on."""
        if self._result is None:
            with self._pace.hurried():
                self._ended.wait(timeout_s)
        if self._result is None:
            raise TimeoutError(f"checkpoint {self.id} is still being written")
        return self._result

    def _run(self) -> None:
        started = time.perf_counter()
        size, problem, agreed = 0, None, True
        # Whoever keeps this result does not keep the state with it.
        write, self._write = self._write, None
        assert write is not None
        try:
            size = write()
        except CheckpointError as error:
            problem, agreed = str(error), not isinstance(error, RanksLost)
        except BaseException as error:  # noqa: BLE001 - the thread goes on to the next, and the result must say so
            problem, agreed = f"{type(error).__name__}: {error}", False
        self._result = SaveResult(
            id=self.id,
            bytes=size,
            stall_s=self.stall_s,
            write_s=time.perf_counter() - started,
            error=problem,
            agreed=agreed,
        )
        self._ended.set()


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A state that every rank has copied: what it takes over all ranks, and which states all of them have in memory."""

    bytes: int
    in_memory: list[str]


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a rank writes. `held` names the states it has in memory; `taken` hears when every rank has copied one."""

    pace: Pace
    held: Callable[[], list[str]]
    taken: Callable[[Taken], None]


def write(directory: Path, snapshot: Snapshot, ranks: Ranks, writing: Writing) -> int:
    """Make the snapshot a checkpoint; its size in bytes. A collective. Raises CheckpointError, alike on all ranks."""
    stage = directory / f".{snapshot.id}.stage"
    if snapshot.agreed:
        raise CheckpointError(str(snapshot.problem))
    try:
        taken = _taken(snapshot, ranks, writing.held())
        writing.taken(taken)
        apart = find_apart(snapshot.tensors, snapshot.may_differ, ranks, writing.pace)
        theirs: list[ManifestFile] = []
        if snapshot.staged:
            theirs = vouch_for(stage, ranks, writing.pace)
        else:
            needed = taken.bytes + apart.bytes
            ranks.on_first("the checkpoint cannot be begun", lambda: _open_stage(directory, stage, snapshot.id, needed))
        files = [*theirs, *_write_files(stage, snapshot, apart, ranks, writing.pace)]
        ranks.on_first("the checkpoint cannot be completed", lambda: _commit(directory, stage, snapshot, ranks, files))
    except CheckpointError as error:
        if ranks.first:
            # What cannot be removed now is swept at the next start; it never looks like a checkpoint.
            shutil.rmtree(stage, ignore_errors=True)
        told = str(error)
        raise CheckpointError(told if _STANDS in told else f"{told}; training goes on and {_STANDS}") from None
    return sum(file.bytes for file in files)


def stage_script(directory: Path, checkpoint_id: str, files: ScriptFiles, ranks: Ranks) -> None:
    """Open the stage directory and have the script write into it. A collective for the training thread.

    No save may be running in the background: it uses the same group. Raises CheckpointError, alike on all ranks; then
    nothing of it is left.
    """
    stage = directory / f".{checkpoint_id}.stage"
    try:
        ranks.on_first("the checkpoint cannot be begun", lambda: _open_stage(directory, stage, checkpoint_id, 0))
        let_save(files, stage, ranks)
    except CheckpointError:
        if ranks.first:
            shutil.rmtree(stage, ignore_errors=True)
        raise


def _taken(snapshot: Snapshot, ranks: Ranks, held: list[str]) -> Taken:
    ranks.together("the state cannot be taken", lambda: _refuse(snapshot.problem))
    plain = sharded = 0
    for tensor in snapshot.tensors.values():
        part = local_part(tensor)
        size = part.numel() * part.element_size()
        if part is tensor:
            plain += size
        else:
            sharded += size
    told = ranks.gather((plain, sharded, held))
    return Taken(
        bytes=max(size for size, _, _ in told) + sum(size for _, size, _ in told),
        in_memory=[name for name in told[0][2] if all(name in names for _, _, names in told)],
    )


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise CheckpointError(problem)


def _open_stage(directory: Path, stage: Path, checkpoint_id: str, needed: int) -> None:
    make_dir(directory)
    if (directory / checkpoint_id).exists():
        raise CheckpointError(f"checkpoint {checkpoint_id} exists already: it is kept, nothing was written")
    free = shutil.disk_usage(directory).free
    wanted = int(needed * _SPACE_FACTOR) + _SPACE_EXTRA_BYTES
    if free < wanted:
        raise CheckpointError(
            f"{directory} has {free / 1e6:.0f} MB free and the checkpoint needs {wanted / 1e6:.0f} MB: "
            f"free some space; training goes on and {_STANDS}"
        )
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(stage)
    stage.mkdir(mode=0o700)


def _write_files(stage: Path, snapshot: Snapshot, apart: Apart, ranks: Ranks, pace: Pace) -> list[ManifestFile]:
    """Write and sync all files; on every rank the list of all of them."""
    # Not dcp.save: it warns about a single rank, and its failures are a BaseException that other ranks wait on.
    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    # Not synced by torch, which does it before it flushes (pytorch 2.13): `_sync_own` does.
    writer = PacedWriter(stage, pace)
    common = {name: tensor for name, tensor in snapshot.tensors.items() if name not in apart.own}

    def local_plan() -> SavePlan:
        planner.set_up_planner(common, writer.storage_meta(), ranks.first)
        writer.set_up_storage_writer(ranks.first)
        return writer.prepare_local_plan(planner.create_local_plan())

    plans = ranks.collect(ranks.together("the checkpoint cannot be planned", local_plan))
    agreed = ranks.on_first("the checkpoint cannot be planned", lambda: planner.create_global_plan(plans))
    plan = planner.finish_plan(ranks.scatter(writer.prepare_global_plan(agreed[0]) if agreed else []))

    def data() -> Any:
        written = writer.write_data(plan, planner)
        written.wait()
        _write_rank(stage, snapshot, apart, ranks)
        return written.value()

    results = ranks.collect(ranks.together(f"writing to {stage.parent} failed", data))
    ranks.on_first(
        "the checkpoint's index cannot be written", lambda: writer.finish(agreed[1], results) if agreed else None
    )
    mine = ranks.together(f"writing to {stage.parent} failed", lambda: _sync_own(stage, ranks, writer.files.hashed))
    return [file for files in ranks.gather(mine) for file in files]


def rank_file(rank: int) -> str:
    """Where the own state of a rank lies within a checkpoint."""
    return f"rank-{rank:05d}.pt"


def _write_rank(stage: Path, snapshot: Snapshot, apart: Apart, ranks: Ranks) -> None:
    content = {
        "id": snapshot.id,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "shared": snapshot.shared,
        "own": snapshot.own,
        "apart": apart.names,
        "tensors": apart.own,
    }
    with (stage / rank_file(ranks.rank)).open("xb") as file:
        torch.save(content, file)


def _sync_own(stage: Path, ranks: Ranks, hashed: dict[str, tuple[int, str]]) -> list[ManifestFile]:
    """Sync the files that this rank wrote; size and hash of the large ones as written, of the others read back.

    What the file system makes of it is judged by whoever verifies: reading back here would only ask the page cache.
    """
    names = [path.name for path in stage.glob(f"__{ranks.rank}_*.distcp")]
    names.append(rank_file(ranks.rank))
    if ranks.first:
        names.append(DCP_METADATA)
    found = []
    for name in sorted(names):
        with (stage / name).open("rb") as file:
            os.fsync(file.fileno())
        size, digest = hashed.get(name) or hash_file(stage / name)
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
    final = directory / snapshot.id
    stage.rename(final)
    try:
        fsync_dir(directory)
    except OSError:
        # Nobody knows whether the name would survive a power cut, so it is not called good: the manifest goes first.
        (final / MANIFEST).unlink()
        final.rename(stage)
        raise
