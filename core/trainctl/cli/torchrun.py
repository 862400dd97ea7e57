"""torchrun's own options, checked before a run is begun: its tracebacks are no answer to a mistyped number."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence

import click

_CHECK_TIMEOUT_S = 60.0

# Options whose values can be judged here. Whatever else is given costs the second that asking torchrun itself takes.
_PLAIN = {
    "--nproc-per-node": re.compile(r"[1-9]\d*|auto|cpu"),
    "--nnodes": re.compile(r"[1-9]\d*"),
    "--node-rank": re.compile(r"\d+"),
    "--max-restarts": re.compile(r"\d+"),
    "--master-addr": re.compile(r".+"),
    "--master-port": re.compile(r"\d+"),
    "--standalone": re.compile(r""),
}
_ASK = (
    "import sys; from torch.distributed.run import config_from_args, parse_args; "
    "config_from_args(parse_args(sys.argv[1:]))"
)


def check_options(words: Sequence[str]) -> None:
    """Raises click.UsageError in one line when torchrun would not start with these options."""
    given = list(pairs(words))
    for name, value in given:
        if name == "--nproc-per-node" and re.fullmatch(r"-\d+|0+", value):
            raise click.UsageError(f"--nproc-per-node is {value}: give 1 or more")
    if all(name in _PLAIN and _PLAIN[name].fullmatch(value) for name, value in given):
        return
    if (problem := _asked_of_torchrun(words)) is not None:
        raise click.UsageError(f"torchrun does not take {' '.join(words)}: {problem}")


def restarts_wanted(words: Sequence[str]) -> bool:
    """Whether torchrun is to start ranks again that failed."""
    given = [value for name, value in pairs(words) if name == "--max-restarts"]
    value = given[-1] if given else os.environ.get("PET_MAX_RESTARTS", "0")
    return value.isdigit() and int(value) > 0


def several_nodes(words: Sequence[str]) -> bool:
    """Whether other nodes start ranks of this job, too; also where their number may change (`1:2`)."""
    given = [value for name, value in pairs(words) if name == "--nnodes"]
    value = given[-1] if given else os.environ.get("PET_NNODES", "1")
    return value not in {"1", "1:1"}


def pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """torchrun's options and their values, in torchrun's own spelling."""
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        name = f"--{name[2:].replace('_', '-')}" if name.startswith("--") else name
        if not equals and name != "--standalone" and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        yield name, value


def _asked_of_torchrun(words: Sequence[str]) -> str | None:
    with contextlib.suppress(subprocess.TimeoutExpired):  # a slow file system is no wrong usage
        done = subprocess.run(
            [sys.executable, "-c", _ASK, *words, "script.py"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_CHECK_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it did not say why"])[-1]
            return re.sub(r"^(-c: error|\w+Error): ", "", last)
    return None
