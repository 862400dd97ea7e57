"""Several nodes, each with a `trainctl run`: what an operator restarts or aborts, all of them do."""

from pathlib import Path
from typing import Any

import pytest

from jobs import free_port, trainctl_json
from launched import launched
from trainctl.store.replay import read_info
from waiting import until

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]


def agent_knows(status: Any) -> bool:
    """Whether the ranks of now are those that the node's agent sees."""
    seen = {process["pid"] for node in status["nodes"] for process in node["processes"]}
    return seen >= {rank["pid"] for rank in status["ranks"]}


def test_a_restart_starts_every_nodes_ranks_again_and_an_abort_ends_them_for_good(tmp_path: Path) -> None:
    rendezvous = [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=two", "--rdzv-backend=c10d"]
    node = ["--nproc-per-node=1", "--nnodes=2", "--local-addr=127.0.0.1", "--max-restarts=2", *rendezvous]
    with launched(tmp_path, *node) as first, launched(tmp_path, *node) as second:
        first.until_step(6)
        first.until_agent()
        assert read_info(first.directory).authenticated_ranks, "one secret for all, in the run's directory"
        done = trainctl_json("restart", "--yes", *first.run)
        assert (done["state"], done["ranks"]) == ("applied", 2)
        first.until_step(done["step"] + 2, attempt=2)
        status = until(lambda: (found := first.status())["state"] == "running" and found, 20)
        assert (status["attempt"], len(status["ranks"])) == (2, 2)
        until(lambda: agent_knows(first.status()), 30, what="the agent has found the new ranks")
        done = trainctl_json("abort", "--now", "--yes", *first.run)
        assert (done["state"], done["ranks"]) == ("applied", 2)
        assert [running.process.wait(60) for running in (first, second)] == [1, 1]
        assert first.status()["state"] == "stopped"
        assert first.lines(attempt=3) == []
