"""How a warning that the machine will be taken away reaches the ranks, and what becomes of it: four small files.

    WARNING             node-local, named by TRAINCTL_PREEMPT_FILE: `trainctl run` of this node was warned
    WARNING.heard       a rank of this node took it up, or says why nothing can come of it
    WARNING.left        the ranks of this node left their loop because of it, or of another node's
    RUN/preempted.json  the last attempt that was preempted: for the hub, and for the next `trainctl run`

Files, because a hub may be down when the machine goes, and a signal would end a rank that has not attached yet.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

import msgspec

from trainctl.wire.rundir import RunDir, write_atomic

ACTOR = "preemption"  # in whose name the run is stopped
FILE_VARIABLE = "TRAINCTL_PREEMPT_FILE"
SIGNAL_VARIABLE = "TRAINCTL_PREEMPT_SIGNAL"
REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: to be tried again


class Warned(msgspec.Struct, frozen=True, kw_only=True):
    """The machine will be taken away; `reason` in words, such as "SIGUSR1 on node-a"."""

    reason: str
    time: float


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """A rank knows of the warning. `problem`: why the ranks cannot stop at a boundary."""

    problem: str | None = None


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """The ranks left their loop after step `step` because of a warning."""

    step: int
    reason: str


class Preempted(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt that ended because the machine was taken away."""

    attempt: int
    step: int | None
    reason: str
    time: float


def signal_number(name: str) -> int | None:
    """The signal that warns: `USR1`, `SIGUSR1` or a number; None for `none` and an empty name.

    Raises ValueError for what is no signal, and for those that cannot be caught or mean something else.
    """
    word = name.strip().upper()
    if word in {"", "NONE"}:
        return None
    try:
        number = signal.Signals(int(word)) if word.isdigit() else signal.Signals[f"SIG{word.removeprefix('SIG')}"]
    except (KeyError, ValueError):
        raise ValueError(f"{name!r} is no signal: give USR1, USR2, TERM or another by its name, or none") from None
    refused = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGINT, signal.SIGSEGV, signal.SIGPIPE}
    if number in refused:
        raise ValueError(f"{number.name} cannot warn of a preemption: give USR1, USR2 or TERM")
    return int(number)


def beside(warning: Path, what: str) -> Path:
    """The file `WARNING.what`."""
    return warning.with_name(f"{warning.name}.{what}")


def write_note(path: Path, note: msgspec.Struct) -> None:
    """Write one of the node-local files, whole or not at all; no power cut is survived. Raises OSError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    unfinished.write_bytes(msgspec.json.encode(note))
    unfinished.replace(path)


def read_warned(warning: Path) -> Warned | None:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(warning.read_bytes(), type=Warned)
    return None


def read_heard(warning: Path) -> Heard | None:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(beside(warning, "heard").read_bytes(), type=Heard)
    return None


def read_left(warning: Path) -> Left | None:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(beside(warning, "left").read_bytes(), type=Left)
    return None


def forget(warning: Path, *, answers_only: bool = False) -> None:
    """Remove the node-local files; `answers_only` leaves the warning itself for ranks that start again."""
    names = [beside(warning, "heard"), beside(warning, "left"), *([] if answers_only else [warning])]
    for path in names:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _run_file(directory: Path) -> Path:
    return directory / "preempted.json"


def record_preempted(directory: Path, *, attempt: int, step: int | None, reason: str) -> None:
    """Write down that an attempt was preempted. Raises OSError."""
    told = Preempted(attempt=attempt, step=step, reason=reason, time=time.time())
    write_atomic(_run_file(directory), msgspec.json.encode(told))


def read_preempted(directory: Path, attempt: int | None = None) -> Preempted | None:
    """What is written down of `attempt`, by default of the newest one; None where that one ended in another way."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        told = msgspec.json.decode(_run_file(directory).read_bytes(), type=Preempted)
        wanted = RunDir(directory).newest("attempt") if attempt is None else attempt
        return told if told.attempt == wanted else None
    return None
