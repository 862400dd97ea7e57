"""Who would start the next attempt: `trainctl run`, or torchrun while it has restarts left."""

import contextlib
from pathlib import Path

import msgspec

from trainctl.hub.disk import Disk, DiskHangs
from trainctl.wire.launcher import find_launchers
from trainctl.wire.messages import RunInfo

_HOW = "end it with abort --now and start it again: trainctl run --resume"


class StartsAgain:
    """`learn` at every hello of a rank 0, while its process can still be looked at."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self._by_launcher = False  # when the disk last answered
        self._restarts_left: int | None = None  # None: not started by torchrun

    def learn(self, pid: int) -> None:
        """Read what torchrun told rank 0, which is a process of this machine."""
        self._restarts_left = _restarts_left(pid)

    @property
    def by_launcher(self) -> bool:
        """Whether a `trainctl run` would start it, which resumes from any checkpoint."""
        with contextlib.suppress(DiskHangs):
            self._by_launcher = bool(self._disk.do(lambda: find_launchers(self._directory)))
        return self._by_launcher

    def told_of(self, info: RunInfo) -> RunInfo:
        """The run's particulars, with whether it can be restarted, or why not: no rank knows that."""
        able = {"restart": self.refusal("last") or True}
        return msgspec.structs.replace(info, capabilities=info.capabilities | able)

    def refusal(self, target: str) -> str | None:
        """Why a restart from `target` cannot be had, with what to do instead, or None."""
        if self.by_launcher:
            return None
        if self._restarts_left is None:
            return f"nothing would start the next attempt: this run was not started by trainctl run; {_HOW}"
        if self._restarts_left <= 0:
            return f"torchrun has no restart left (--max-restarts) and there is no trainctl run; {_HOW}"
        if target != "last":
            return (
                "torchrun restarts from the last checkpoint only: say `restart`, which does that, or roll back "
                f"at a boundary; to start from {target}, start with trainctl run"
            )
        return None


def _restarts_left(pid: int) -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError):  # it is gone, or of another launcher
        items = (item.partition(b"=") for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        told = {name: value for name, _, value in items if name.startswith(b"TORCHELASTIC_")}
        return int(told[b"TORCHELASTIC_MAX_RESTARTS"]) - int(told[b"TORCHELASTIC_RESTART_COUNT"])
    return None
