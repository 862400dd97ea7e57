"""A node is lost from an elastic job, and what is left of it goes on with fewer ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import end_tree, free_port, trainctl, trainctl_json
from waiting import until

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]
_SCRIPT = Path(__file__).parents[1] / "scripts" / "regression.py"


class Node:
    """One torchrun of an elastic job of one to two nodes, on the loopback."""

    def __init__(self, output: Path, port: int, *, first: bool) -> None:
        self.log = output / f"node-{first}.log"
        rendezvous = [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic", "--rdzv-backend=c10d"]
        rendezvous += [f"--rdzv-conf=is_host={int(first)},last_call_timeout=1", "--local-addr=127.0.0.1"]
        script = [str(_SCRIPT), str(output), "--steps", "100000", "--sleep", "0.05"]
        torchrun = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", *rendezvous]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *torchrun, *script, "--checkpoint-every", "5"],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "TRAINCTL_RUN_DIR": str(output / "run"), "TRAINCTL_RUN_ID": "elastic"}
                | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            )

    def lost(self) -> None:
        """As when the power goes: nobody says goodbye."""
        torchrun = psutil.Process(self.process.pid)
        for process in [torchrun, *torchrun.children()]:
            process.kill()


def steps(output: Path) -> list[int]:
    path = output / "rank-0.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def noted(run: list[str], actor: str) -> list[str]:
    lines = trainctl("log", *run, "-n", "1000", "--kind", "note", "--json").stdout.splitlines()
    return [line["text"] for line in map(json.loads, lines) if line["actor"] == actor]


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint_and_the_rest_goes_on_with_fewer_ranks(
    tmp_path: Path,
) -> None:
    port = free_port()
    nodes = [Node(tmp_path, port, first=True)]
    run = ["-r", str(tmp_path / "run")]
    try:
        nodes.append(Node(tmp_path, port, first=False))
        until(lambda: steps(tmp_path)[-1:] > [12], 90, what="step 12 on two nodes")
        until((tmp_path / "run" / "run.json").exists, 30, what="the hub")
        assert trainctl_json("status", *run)["world_size"] == 2
        nodes[1].lost()

        def goes_on() -> Any:
            found = trainctl_json("status", *run)
            return found["attempt"] == 2 and found["state"] == "running" and found

        status = until(goes_on, 90, what=f"the next attempt\n{nodes[0].log.read_text()[-2000:]}")
        assert (status["id"], status["world_size"], len(status["ranks"])) == ("elastic", 1, 1)
        resumed = until(lambda: steps(tmp_path), 20, what="a step of the next attempt")[0] - 1
        assert resumed % 5 == 0
        assert resumed >= 5
        assert until(lambda: trainctl_json("status", *run)["ranks"][0]["data_first"], 20) >= 2 * resumed
        notes = noted(run, "resume")
        assert any("written by 2 ranks and read by 1: random numbers are not restored" in text for text in notes), notes
        place = f"the data goes on at micro-batch {2 * resumed} of each of 1 rank, after {resumed} of each of 2 ranks"
        assert any(place in text for text in notes), notes
        assert place in nodes[0].log.read_text()
        plan = trainctl("rollback", str(resumed), "--dry-run", *run).stdout
        assert "written by 2 ranks and read by 1" in plan
        assert trainctl_json("rollback", str(resumed), "--yes", *run)["after"] == resumed
        assert noted(run, "rollback") == [text.partition(": ")[2] for text in notes]
    finally:
        for node in nodes:
            end_tree(node.process)
