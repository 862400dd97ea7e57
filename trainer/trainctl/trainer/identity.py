"""Who this process is: its place in the job, and the run it belongs to."""

import contextlib
import hashlib
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainctl.wire.paths import runs_dir, socket_dir
from trainctl.wire.places import process_started
from trainctl.wire.rundir import RUN_ID, RunDir, new_run_id, write_atomic


@dataclass(frozen=True, kw_only=True)
class RankIdentity:
    """This process among the job's ranks, from the process group or the launcher's variables."""

    rank: int
    world_size: int
    local_rank: int
    node: str

    @property
    def leads(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The run as all ranks know it. `attempt` and `incarnation` were allocated for this start."""

    name: str
    id: str
    directory: Path
    attempt: int
    incarnation: int
    created: float
    authenticated: bool
    problem: str | None  # why the directory cannot be written, if it cannot


def rank_identity() -> RankIdentity:
    """The process group knows best; torchrun, srun and other launchers set the usual variables."""
    ready = dist.is_available() and dist.is_initialized()
    rank = dist.get_rank() if ready else int(os.environ.get("RANK", "0"))
    world_size = dist.get_world_size() if ready else int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", str(rank))))
    return RankIdentity(rank=rank, world_size=world_size, local_rank=local_rank, node=socket.gethostname())


def job_id() -> str | None:
    """The cluster's number for this job, where there is one."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("PBS_JOBID") or os.environ.get("LSB_JOBID")


def found_run(name: str) -> tuple[str, Path]:
    """Run id and directory: the launcher's, those that torchrun's last attempt had, or new ones.

    Raises ValueError on an id that is no file name.
    """
    if (before := _before_restart()) is not None:
        return before
    run_id = os.environ.get("TRAINCTL_RUN_ID") or new_run_id(name, time.time())
    if not RUN_ID.match(run_id):
        raise ValueError(
            f"TRAINCTL_RUN_ID is {run_id!r}: use at most 48 letters, digits, dots, dashes and underscores, "
            "the first a letter or digit"
        )
    given = os.environ.get("TRAINCTL_RUN_DIR")
    directory = Path(given).absolute() if given else runs_dir() / run_id
    return (_id_in(directory) if given and _started_again() else None) or run_id, directory


def _started_again() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _id_in(directory: Path) -> str | None:
    """The run in a directory: each node's `trainctl run` made up an id, and rank 0 may be on another node now."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = str(json.loads(RunDir(directory).info_file.read_text())["id"])
        return found if RUN_ID.match(found) else None
    return None


def _before_restart() -> tuple[str, Path] | None:
    """The run of the attempt before, where torchrun starts ranks again and its user named no run."""
    if os.environ.get("TRAINCTL_RUN_ID") or "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # rank 0 was on another node then: a new run
        found = json.loads(_torchruns_run().read_text())
        # A node that came or went is a restart that torchrun does not count; a second run of one script is none.
        if _started_again() or int(found["pid"]) != os.getpid():
            return str(found["id"]), Path(found["dir"])
    return None


def _remember_for_restart(run_id: str, directory: Path) -> None:
    """Tell rank 0 of torchrun's next attempt on this node which run it goes on with. Raises OSError."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not os.environ.get("TRAINCTL_RUN_ID"):
        write_atomic(_torchruns_run(), json.dumps({"id": run_id, "dir": str(directory), "pid": os.getpid()}).encode())


def _torchruns_run() -> Path:
    """torchrun is our parent in every attempt; its start time tells it from another process with its pid."""
    parent = os.getppid()
    return socket_dir() / f"torchrun-{parent}-{process_started(parent):.0f}.json"


def share_run(name: str, place: RankIdentity, group: Any) -> tuple[RunIdentity, bytes]:
    """Agree on one identity: rank 0 allocates, everybody learns it over `group`; return it with the run's secret.

    `group` is a gloo process group, None with a single rank. The secret never travels over it: it comes by the
    launcher's environment, or from a 0600 file in the run's directory.
    """
    name = os.environ.get("TRAINCTL_RUN_NAME") or name
    told: list[Any] = [None]
    if place.leads:
        told = [_allocate(name)]
    if group is not None:
        dist.broadcast_object_list(told, src=0, group=group)
    if told[0] is None:
        return _alone(name), b""
    if isinstance(told[0], str):
        raise ValueError(told[0])  # noqa: TRY004 - a wrong value from the environment
    run_id, directory, attempt, incarnation, created, problem = told[0]
    secret = _secret(Path(directory), may_create=place.leads and problem is None)
    authenticated = bool(secret)
    if group is not None:
        dist.barrier(group=group)  # rank 0's file is written before others look for it
        secret = secret or _secret(Path(directory), may_create=False)
        digests: list[Any] = [None] * place.world_size
        dist.all_gather_object(digests, hashlib.sha256(b"trainctl" + secret).hexdigest() if secret else "", group=group)
        authenticated = bool(secret) and len(set(digests)) == 1
    identity = RunIdentity(
        name=name,
        id=run_id,
        directory=Path(directory),
        attempt=attempt,
        incarnation=incarnation,
        created=created,
        authenticated=authenticated,
        problem=problem,
    )
    return identity, secret if authenticated else b""


def _alone(name: str) -> RunIdentity:
    """A rank that cannot hear what rank 0 allocated, for want of a process group: it trains, and tells nothing."""
    run_id, directory = found_run(name)
    return RunIdentity(
        name=name,
        id=run_id,
        directory=directory,
        attempt=1,
        incarnation=1,
        created=time.time(),
        authenticated=False,
        problem="there is no process group: call torch.distributed.init_process_group before Run.attach",
    )


def _allocate(name: str) -> tuple[str, str, int, int, float, str | None] | str:
    try:
        run_id, directory = found_run(name)
    except ValueError as error:
        return str(error)
    run_dir, created = RunDir(directory), time.time()
    with contextlib.suppress(OSError):  # then an attempt that torchrun starts again is shown as a run of its own
        _remember_for_restart(run_id, directory)
    try:
        run_dir.create()
        if run_dir.info_file.exists():
            created = run_dir.info_file.stat().st_ctime
        attempt, incarnation, problem = run_dir.allocate("attempt"), run_dir.allocate("incarnation"), None
    except OSError as error:
        # Training goes first: without a directory the run is watched from memory, and cannot be saved.
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        attempt = incarnation = restarts + 1
        problem = f"the run's directory {directory} cannot be written: {error.strerror or error}"
    return run_id, str(directory), attempt, incarnation, created, problem


def _secret(directory: Path, *, may_create: bool) -> bytes:
    """The key of the MAC between ranks, or nothing: then control is unauthenticated, and shown as such."""
    if given := os.environ.get("TRAINCTL_RUN_SECRET"):
        return hashlib.sha256(given.encode()).digest()
    path = directory / "secret"
    try:
        if may_create and not path.exists():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(32))
        found = path.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            return b""
        return path.read_bytes()
    except OSError:
        return b""
