"""Which processes of this machine are ranks: small files that ranks write and their node's agent reads.

They lie in the node-local socket directory, not on a shared file system. A rank removes its file when it ends well;
a file whose process is gone without that is a death.
"""

import contextlib
import os
from pathlib import Path

import msgspec

from trainctl.wire.paths import private_dir, socket_dir


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One rank on this machine."""

    run_id: str
    run: str
    rank: int
    local_rank: int
    pid: int
    started: float  # when the process started, as in /proc, so that a recycled pid is not taken for it
    attempt: int
    gpu_uuid: str | None = None


def places_dir() -> Path:
    return private_dir(socket_dir() / "ranks")


def place_file(place: Place) -> Path:
    return places_dir() / f"{place.run_id}-{place.rank}-{place.pid}.json"


def write_place(place: Place) -> Path:
    """Announce a rank. Raises OSError."""
    path = place_file(place)
    beside = path.with_suffix(".new")
    beside.write_bytes(msgspec.json.encode(place))
    beside.replace(path)
    return path


def read_places() -> list[Place]:
    found = []
    for path in sorted(places_dir().glob("*.json")):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            found.append(msgspec.json.decode(path.read_bytes(), type=Place))
    return found


def agent_lock(job: str) -> Path:
    """The file that the agent of a job on this node holds with flock while it lives."""
    return socket_dir() / f"agent-{job[:48]}.lock"


def process_started(pid: int) -> float:
    """Start time of a process in clock ticks since boot. Raises OSError when it does not exist."""
    return float(stat_fields(pid)[19])


def is_rank(pid: int, rank: int) -> bool:
    """Whether the process of this id, as seen from here, was started as that rank of a job."""
    try:
        return f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def stat_fields(pid: int) -> list[bytes]:
    """What proc(5) says of a process from field 3 on: the name before that is cut at any byte. Raises OSError."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()


def has_ended(pid: int, started: float) -> bool:
    """Whether the process that `started` then runs no more, though its parent may not have taken note."""
    try:
        fields = stat_fields(pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False  # too many files are open: nothing is known
    return fields[0] in b"ZX" or float(fields[19]) != started


def own_started() -> float:
    return process_started(os.getpid())
