"""The documented consumer, in plain zmq and msgpack, reads a real run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import job
from trainctl.wire.paths import cards_dir, config_home

pytestmark = pytest.mark.ranks

CONSUMER = Path(__file__).parents[2] / "examples" / "consumer.py"


def test_twenty_lines_of_zmq_and_msgpack_follow_a_run(tmp_path: Path) -> None:
    with job("regression.py", 1, tmp_path, ["--steps", "100000", "--sleep", "0.03"]) as running:
        running.until_step(5)
        (card,) = cards_dir().glob("hub-*.json")
        consumer = subprocess.Popen(
            [sys.executable, str(CONSUMER), str(card), str(config_home() / "keys" / "user.json")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        assert consumer.stdout is not None
        try:
            seen: dict[int, float] = {}
            while len(seen) < 5:
                step, name, value = consumer.stdout.readline().split()
                if name == "loss":
                    seen[int(step)] = float(value)
        finally:
            consumer.kill()
            consumer.wait(10)
            consumer.stdout.close()
        trained = {line["step"]: float.fromhex(line["loss"]) for line in running.lines()}
        assert seen == {step: trained[step] for step in seen}
    assert len([line for line in CONSUMER.read_text().split('"""')[2].splitlines() if line.strip()]) <= 20
