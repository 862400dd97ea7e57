"""Real jobs for tests: torchrun with real ranks, and the real command line beside them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from waiting import until

TRAINCTL = [str(Path(sys.executable).with_name("trainctl"))]
_SCRIPTS = Path(__file__).parent / "scripts"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def trainctl(*words: str, timeout_s: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line; with `check`, fail with what it said."""
    done = subprocess.run(
        [*TRAINCTL, *words], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
    )
    if check and done.returncode != 0:
        raise AssertionError(f"trainctl {' '.join(words)} → {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def trainctl_json(*words: str, timeout_s: float = 60.0) -> Any:
    return json.loads(trainctl(*words, "--json", timeout_s=timeout_s).stdout)


class Job:
    """A torchrun job of `ranks` ranks on one of tests/scripts. Each rank writes `rank-N.jsonl` in `output`.

    `restarts`: under `trainctl run`, whose torchrun may start the ranks again so often.
    """

    def __init__(
        self,
        script: str,
        ranks: int,
        output: Path,
        arguments: Sequence[str] = (),
        *,
        arguments_before: Sequence[str] = (),
        restarts: int | None = None,
        **env: str,
    ) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.output = output
        self.ranks = ranks
        self.directory = output / "run"
        self._home = Path((os.environ | env)["TRAINCTL_HOME"])
        self._log = (output / "torchrun.log").open("w")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        if restarts is not None:
            command = [*TRAINCTL, "run", "--dir", str(self.directory), "--nproc-per-node", str(ranks)]
            command += ["--max-restarts", str(restarts)]
        self.process = subprocess.Popen(
            [*command, str(_SCRIPTS / script), *arguments_before, str(output), *arguments],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TRAINCTL_RUN_DIR": str(self.directory)} | env,
        )

    def lines(self, rank: int = 0) -> list[dict[str, Any]]:
        """What a rank wrote so far, whole lines only."""
        path = self.output / f"rank-{rank}.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def step(self, rank: int = 0) -> int:
        written = self.lines(rank)
        return int(written[-1]["step"]) if written else 0

    def until_step(self, step: int, timeout_s: float = 60.0) -> None:
        """Wait until rank 0 is that far and the run can be asked about."""
        until(lambda: self.step() >= step or self.ended(), timeout_s, what=f"step {step}")
        assert self.step() >= step, self.log()
        until((self.directory / "run.json").exists, 30, what="the hub")

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, timeout_s: float = 60.0) -> int:
        return self.process.wait(timeout_s)

    def log(self) -> str:
        return (self.output / "torchrun.log").read_text()

    def close(self) -> None:
        """End everything this job started: ranks are in sessions of their own, and so are its hub and agent."""
        end_tree(self.process, self._home)
        self._log.close()


def end_tree(process: subprocess.Popen[Any], home: Path | None = None) -> None:
    """Kill a launcher, its ranks (each leads a session of its own) and the sources whose cards lie in `home`."""
    doomed = [process.pid] if process.poll() is None else []
    with contextlib.suppress(psutil.NoSuchProcess):
        doomed += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    cards = (home or Path(os.environ["TRAINCTL_HOME"])) / "cards"
    doomed += [json.loads(card.read_text())["pid"] for card in cards.glob("*.json")]
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(10)


@contextmanager
def job(
    script: str,
    ranks: int,
    output: Path,
    arguments: Sequence[str] = (),
    *,
    arguments_before: Sequence[str] = (),
    **env: str,
) -> Iterator[Job]:
    running = Job(script, ranks, output, arguments, arguments_before=arguments_before, **env)
    try:
        yield running
    finally:
        running.close()
