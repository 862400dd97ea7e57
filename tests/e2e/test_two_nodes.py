"""Two nodes and a head node, as network namespaces: everything works across them, and survives their cables."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from histories.history import Applied, History, RankRecord, Told, problems
from jobs import TRAINCTL
from namespaces import Machines, unavailable
from waiting import until

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.timeout(240),
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]
SCRIPT = Path(__file__).parent.parent / "scripts" / "steered.py"


class Cluster:
    """A job with one rank on each of two nodes, and a head node from which it is steered."""

    def __init__(self, machines: Machines, output: Path, sleep_s: float) -> None:
        output.mkdir()
        self.machines = machines
        self.output = output
        self.directory = output / "run"
        self.told: list[Told] = []
        os.environ["TRAINCTL_RUN_DIR"] = str(self.directory)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        launcher += ["--master-addr", machines.addresses["first"], "--master-port", "29511"]
        self.logs = [(output / f"node-{rank}.log").open("w") for rank in (0, 1)]
        self.nodes = [
            machines.popen(
                name,
                [*launcher, "--node-rank", str(rank), str(SCRIPT), str(output), "--sleep", str(sleep_s)],
                stdout=self.logs[rank],
                stderr=subprocess.STDOUT,
            )
            for rank, name in enumerate(("first", "second"))
        ]
        until(lambda: min(self.step(0), self.step(1)) >= 5 or self.over(), 90, what="5 steps")
        assert not self.over(), self.log()
        until((self.directory / "run.json").exists, 60, what="the hub")  # training does not wait for it

    def over(self) -> bool:
        return any(node.poll() is not None for node in self.nodes)

    def log(self) -> str:
        return "\n".join((self.output / f"node-{rank}.log").read_text()[-4000:] for rank in (0, 1))

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.output / f"{name}.jsonl"
        whole = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in whole if line.endswith("\n")]

    def step(self, rank: int) -> int:
        found = self.lines(f"rank-{rank}")
        return int(found[-1]["step"]) if found else 0

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """A `trainctl` on the head node, which reaches the hub over TCP alone."""
        return self.machines.popen(
            "head", [*TRAINCTL, *words, "-r", str(self.directory)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def ask(self, *words: str) -> Any:
        out, err = self.start(*words, "--json").communicate(timeout=60)
        assert out.strip(), err
        return json.loads(out)

    def act(self, *words: str) -> dict[str, Any]:
        return self.hear(self.start(*words, "--json"))

    def hear(self, command: "subprocess.Popen[str]") -> dict[str, Any]:
        """What a command in the background says in the end."""
        out, err = command.communicate(timeout=90)
        assert out.strip(), err
        found: dict[str, Any] = json.loads(out)
        step = found["step"] if found["state"] == "applied" else None
        self.told.append(Told(operator="head", id=found["id"], state=found["state"], step=step, after=found["after"]))
        return found

    def judge(self) -> list[str]:
        ranks = [
            RankRecord(rank=rank, applied=[Applied(**line) for line in self.lines(f"applied-{rank}")])
            for rank in (0, 1)
        ]
        audit = (self.directory / "audit.jsonl").read_text().splitlines()
        return problems(History(ranks=ranks, told=self.told, audit=audit, complete=False))

    def close(self) -> None:
        for node in self.nodes:
            if node.poll() is None:
                node.kill()
            node.wait(10)
        for log in self.logs:
            log.close()


@contextmanager
def cluster(home: Path, output: Path, sleep_s: float = 0.03) -> Iterator[Cluster]:
    with Machines(home, ("first", "second", "head")) as machines:
        made = Cluster(machines, output / "out", sleep_s)
        try:
            yield made
        finally:
            made.close()


def test_from_a_head_node_everything_works_and_a_cut_line_leaves_no_hole(own_home: Path, tmp_path: Path) -> None:
    with cluster(own_home, tmp_path) as job, (tmp_path / "seen").open("w+") as seen:
        nodes = until(lambda: len(found := job.ask("status").get("nodes", [])) == 2 and found, 30, what="both agents")
        assert {node["node"] for node in nodes} == {"first", "second"}
        watching = job.machines.popen(
            "head", [*TRAINCTL, "log", "-f", "--json", "-r", str(job.directory)], stdout=seen, stderr=subprocess.DEVNULL
        )

        held = job.act("pause")
        assert (held["state"], held["ranks"]) == ("applied", 2)
        scaled = job.act("lr", "scale", "0.5")
        assert (scaled["state"], scaled["step"]) == ("applied", held["step"])
        assert job.act("resume")["state"] == "applied"
        saved = job.act("checkpoint", "save")
        assert saved["state"] == "applied"

        job.machines.cut("head")
        before = job.step(0)
        until(lambda: job.step(0) >= before + 150, 30, what="training goes on without the head node")
        job.machines.mend("head")
        assert job.act("set", "x", "7")["state"] == "applied", "the line is back"

        back = job.act("rollback", "last", "--yes")
        assert (back["state"], back["after"]) == ("applied", saved["step"])
        stopped = job.act("stop", "--yes")
        assert stopped["state"] == "applied"
        for node in job.nodes:
            assert node.wait(60) == 0, job.log()
        assert job.judge() == []

        def watched() -> list[tuple[int, int]]:
            lines = (tmp_path / "seen").read_text().splitlines()
            found = [json.loads(line) for line in lines if '"kind": "metrics"' in line or '"kind":"metrics"' in line]
            return [(line["incarnation"], line["step"]) for line in found]

        last = (2, stopped["step"])
        until(lambda: last in watched(), 20, what=f"the last step on the head node: {last}")
        watching.terminate()
        watching.wait(10)
        first = [step for incarnation, step in watched() if incarnation == 1]
        assert first == list(range(first[0], first[0] + len(first))), "each step once and in order, over the cut too"
        assert first[-1] >= before + 150


@pytest.mark.thorough
def test_nodes_that_lose_each_other_while_a_command_is_under_way_apply_all_of_it_or_nothing(
    own_home: Path, tmp_path: Path
) -> None:
    with cluster(own_home, tmp_path, sleep_s=0.1) as job:
        states = []
        for number in range(1, 7):
            command = job.start("set", "x", str(number), "--json")
            # Sometimes before it arrives, sometimes between a rank's word and the decision, sometimes after it.
            if number % 2:
                until_accepted(job, number)
            cut = "second" if number % 3 else "first"
            job.machines.cut(cut)
            standing = time.monotonic() + (1.0 if number % 2 else 2.5)
            until(lambda standing=standing: time.monotonic() > standing, 10)  # type: ignore[misc]
            job.machines.mend(cut)
            states.append(job.hear(command)["state"])
            assert job.judge() == [], job.log()
            before = min(job.step(0), job.step(1))
            until(lambda before=before: min(job.step(0), job.step(1)) > before + 2, 60, what="both train on")  # type: ignore[misc]
        assert "applied" in states
        assert job.act("stop", "--yes")["state"] == "applied"
        for node in job.nodes:
            assert node.wait(60) == 0, job.log()
        assert job.judge() == []


def until_accepted(job: Cluster, number: int) -> None:
    """Wait until the audit log has the command."""
    audit = job.directory / "audit.jsonl"
    value = f'\\"value\\":{number}'
    until(lambda: audit.exists() and value in audit.read_text(), 30, what=f"command {number} in the audit log")
