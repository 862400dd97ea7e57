"""Ranks whose data end at different steps: while all train commands work, and afterwards none is half applied."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import job, trainctl
from waiting import until

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]


def test_in_the_shadow_of_join_nothing_is_applied_on_the_ranks_that_still_train(tmp_path: Path) -> None:
    with job("uneven.py", 2, tmp_path, ["250", "100000"]) as running:
        running.until_step(3)
        run = ["-r", str(running.directory)]

        def act(*words: str) -> dict[str, Any]:
            return dict(json.loads(trainctl(*words, *run, "--json", check=False).stdout))

        def newest(rank: int) -> tuple[int, float]:
            line = running.lines(rank)[-1]
            return line["step"], line["x"]

        assert act("set", "x", "1")["state"] == "applied"
        paused = act("pause")
        assert paused["state"] == "applied"
        assert act("resume")["state"] == "applied"
        until(lambda: newest(1)[0] == 250, 60, what="the end of rank 1's data")
        running.until_step(260)
        for words in (["set", "x", "2"], ["pause"], ["checkpoint", "save"], ["stop", "--yes"]):
            told = act(*words)
            assert told["state"] == "rejected", told
        assert "rank 1: it only shadows the other ranks in torch's Join" in act("set", "x", "3")["reason"]
        step = running.step()
        running.until_step(step + 10)
        assert (newest(0)[1], newest(1)[1]) == (1.0, 1.0)
