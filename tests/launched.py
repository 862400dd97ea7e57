"""`trainctl run` for tests: two ranks on tests/scripts/collectives.py, seen from outside."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from jobs import TRAINCTL, end_tree, trainctl, trainctl_json
from waiting import until

_SCRIPT = Path(__file__).parent / "scripts" / "collectives.py"


class Launched:
    """`trainctl run` with two ranks on tests/scripts/collectives.py."""

    def __init__(self, output: Path, *torchrun: str, script: tuple[str, ...] = ()) -> None:
        self.output, self.directory = output, output / "run"
        self._log = (output / "launcher.log").open("w")
        command = [*TRAINCTL, "run", "--dir", str(self.directory), "--nproc-per-node", "2", *torchrun]
        self.process = subprocess.Popen(
            [*command, str(_SCRIPT), str(output), *script],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    @property
    def run(self) -> list[str]:
        return ["-r", str(self.directory)]

    def lines(self, attempt: int, rank: int = 0) -> list[dict[str, Any]]:
        path = self.output / f"rank-{rank}.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if line["attempt"] == attempt]

    def until_step(self, step: int, attempt: int = 1) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.log()
            return any(line["step"] >= step for line in self.lines(attempt))

        until(there, 60, what=f"step {step} of attempt {attempt}")
        until((self.directory / "run.json").exists, 30, what="the hub")

    def status(self) -> Any:
        return trainctl_json("status", *self.run)

    def until_agent(self) -> None:
        """An agent that has seen both ranks."""
        until(lambda: (nodes := self.status()["nodes"]) and len(nodes[0]["processes"]) == 2, 30, what="the agent")

    def pids(self) -> list[int]:
        return [rank["pid"] for rank in self.status()["ranks"]]

    def log(self) -> str:
        return (self.output / "launcher.log").read_text()

    def close(self) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        end_tree(self.process)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._log.close()


@contextlib.contextmanager
def launched(output: Path, *torchrun: str, script: tuple[str, ...] = ()) -> Iterator[Launched]:
    running = Launched(output, *torchrun, script=script)
    try:
        yield running
    finally:
        running.close()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def states(run: list[str]) -> list[tuple[str, str]]:
    lines = trainctl("log", *run, "-n", "1000", "--kind", "state", "--json", check=False).stdout.splitlines()
    return [(line["state"], line["reason"] or "") for line in map(json.loads, lines)]
