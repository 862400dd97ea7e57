"""Start training under torchrun, in a process group of its own, with a run's identity in its environment."""

import contextlib
import importlib.util
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import msgspec
import psutil

from trainctl.client.discover import read_info
from trainctl.client.errors import BadRequest
from trainctl.wire.paths import runs_dir
from trainctl.wire.rundir import RUN_ID, RunDir, new_run_id

_RENDEZVOUS = ("--standalone", "--rdzv", "--master", "--nnodes", "--node-rank", "--node_rank")
_PORT = "--master-port="
_RESTARTABLE = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
_TAIL_BYTES = 4000
_ENDING = (signal.SIGINT, signal.SIGTERM)


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What is started: who the run is, where it keeps its files, and the command line."""

    name: str
    run_id: str
    directory: Path
    command: list[str]
    environment: dict[str, str]
    fresh: bool = False  # the directory was made for this launch
    own_port: bool = False  # the port in the command was found by us, and another does as well

    def again(self, target: str) -> "Launch":
        """The same run started once more, from a checkpoint."""
        command = self.command
        if self.own_port:
            # The old port may be held for a while yet by what the last attempt left behind.
            port = f"{_PORT}{free_port()}"
            first = next(index for index, word in enumerate(command) if word.startswith(_PORT))
            command = [*command[:first], port, *command[first + 1 :]]
        environment = self.environment | {"TRAINCTL_RESUME": target}
        return msgspec.structs.replace(self, command=command, environment=environment, fresh=False)

    def is_a_run(self) -> bool:
        """Whether the script came as far as attaching, so that there is a log to look at."""
        return RunDir(self.directory).info_file.is_file()

    def unwritable(self) -> str | None:
        """Why the directory takes no files, or None. Read-only mounts tell nobody until somebody writes."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.directory, prefix=".trainctl-"):
                return None
        except OSError as error:
            return error.strerror or str(error)

    def forget_if_empty(self) -> None:
        """Take away a directory that was made for a run that never was."""
        if self.fresh:
            with contextlib.suppress(OSError):  # something is in it, so it stays
                self.directory.rmdir()


def prepare(
    name: str,
    torchrun: Sequence[str],
    *,
    directory: Path | None = None,
    run_id: str | None = None,
    resume: bool = False,
    threads: bool = False,
    named: bool = True,
    restarts: bool = False,
) -> Launch:
    """`torchrun` is everything after its name. `threads` bounds OpenMP to one thread a rank unless the user says else.

    `restarts`: torchrun may start the ranks again, which a fixed port and a shared store do not survive.

    `named`: the user chose the name, so it goes before the one that the script gives to `Run.attach`.

    Raises `BadRequest` when torch is missing or the directory cannot be made.
    """
    require_torch()
    if run_id is None and directory is not None:
        refuse_another_runs(directory)
    run_id = run_id or new_run_id(name, time.time())
    if not RUN_ID.match(run_id):
        raise BadRequest(f"{run_id!r} is no run id", "use at most 48 letters, digits, dots, dashes and underscores")
    directory = (directory or runs_dir() / run_id).absolute()
    fresh = not directory.exists()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"the run's directory {directory} cannot be made: {error.strerror or error}",
            "give another with --dir, or set TRAINCTL_HOME",
        ) from None
    given = {
        "TRAINCTL_RUN_ID": run_id,
        "TRAINCTL_RUN_DIR": str(directory),
    }
    if not _several_nodes(torchrun):  # else each node's launcher would make one up: they share that of the directory
        given["TRAINCTL_RUN_SECRET"] = secrets.token_hex(32)
    given |= {"TRAINCTL_RUN_NAME": name} if named else {}
    given |= {"TRAINCTL_RESUME": "1"} if resume else {}
    given |= {"OMP_NUM_THREADS": "1"} if threads and "OMP_NUM_THREADS" not in os.environ else {}
    rendezvous: list[str] = []
    if not _has_rendezvous(torchrun):
        rendezvous = _RESTARTABLE if restarts else ["--master-addr=127.0.0.1", f"{_PORT}{free_port()}"]
    if restarts:
        # Since torch 2.4 the store of the attempt before is used again by default, and with what is left in it the next
        # one finds addresses of dead ranks (pytorch 135712).
        given |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")}
    return Launch(
        name=name,
        run_id=run_id,
        directory=directory,
        command=[sys.executable, "-m", "torch.distributed.run", *rendezvous, *torchrun],
        environment=dict(os.environ) | given,
        fresh=fresh,
        own_port=bool(rendezvous) and not restarts,
    )


def refuse_another_runs(directory: Path) -> None:
    """Two runs in one directory would be one history, and the second would go on from the first one's checkpoints."""
    if (info := read_info(directory)) is not None:
        raise BadRequest(
            f"{directory} holds the run {info.id} already; nothing was started",
            f"give another --dir, or go on from its last checkpoint: `trainctl run --resume {directory} …`",
        )


def torch_found() -> bool:
    """Whether this environment has a torch to start; it is not loaded."""
    try:
        return importlib.util.find_spec("torch") is not None
    except (ImportError, ValueError, AttributeError):
        return False  # something of that name stands in its place without being it


def require_torch() -> None:
    """Raises `BadRequest` when nothing can be trained here."""
    if not torch_found():
        raise BadRequest(
            f"there is no torch in this environment ({sys.executable}), so nothing can be trained here",
            "activate the training environment, and install trainctl-cockpit into it",
        )


def _several_nodes(torchrun: Sequence[str]) -> bool:
    words = " ".join(torchrun)
    found = re.search(r"(?:^| )--nnodes[= ](\S+)", words)
    return found is not None and found[1] not in {"1", "1:1"}


def _has_rendezvous(torchrun: Sequence[str]) -> bool:
    before_script = [word for word in torchrun if word.startswith("-")]
    return any(word.startswith(_RENDEZVOUS) for word in before_script)


def free_port() -> int:
    """A port of the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """A started launch. `code` is torchrun's exit code once it is done."""

    def __init__(self, launch: Launch, output: Path | None = None) -> None:
        """`output` takes what the job prints; without it the job prints here. Raises `BadRequest`."""
        self.launch = launch
        self.output = output
        self.interrupted = False
        file: IO[bytes] | None = None
        try:
            file = self._opened(output)
            # A session of its own: Ctrl-C and a closed terminal reach it through us only, if at all.
            self._process = subprocess.Popen(
                launch.command,
                env=launch.environment,
                stdin=subprocess.DEVNULL if output is not None else None,
                stdout=file,
                stderr=subprocess.STDOUT if file is not None else None,
                start_new_session=True,
            )
        except OSError as error:
            raise BadRequest(f"training could not be started: {error}") from None
        finally:
            if file is not None:
                file.close()

    @staticmethod
    def _opened(output: Path | None) -> IO[bytes] | None:
        try:
            return None if output is None else output.open("ab")
        except OSError as error:
            raise BadRequest(
                f"the run's directory {output.parent if output else ''} cannot be written "
                f"({error.strerror or error}); nothing was started",
                "give another with --dir, or set TRAINCTL_HOME",
            ) from None

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def wait(self) -> int:
        return self._process.wait()

    def wait_s(self, timeout_s: float) -> int | None:
        """Its exit code, or None when it still runs after this time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def signal(self, number: int) -> None:
        """Send a signal to torchrun alone: it passes SIGTERM and SIGINT on to its ranks and waits for them."""
        self.interrupted = True
        self.end(number)

    def end(self, number: int) -> None:
        """The same where it was not the user of this terminal who wanted it."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to torchrun and the ranks it started: each leads a session of its own and would live on."""
        if self.code is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for rank in psutil.Process(self._process.pid).children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        rank.kill()
            self.end(signal.SIGKILL)

    @contextlib.contextmanager
    def forwarding(self, numbers: Sequence[int] = _ENDING) -> Generator[None, None, None]:
        """Pass these signals on to the job, so that it ends and its own exit code is what counts."""

        def forward(number: int, _frame: FrameType | None) -> None:
            self.signal(number)

        before = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def tail(self) -> str:
        """The end of what it printed."""
        if self.output is None:
            return ""
        with contextlib.suppress(OSError), self.output.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return file.read().decode(errors="replace").strip()
        return ""
