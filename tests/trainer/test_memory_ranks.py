"""Rolling back to memory on two ranks, DDP and FSDP2 over gloo, in real processes: what is checked is in the worker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("memory_ranks.py")


@pytest.mark.ranks
def test_two_ranks_roll_back_to_memory_exactly_or_all_read_from_disk(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning:trainctl"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path), str(rank), "2"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, (said, complained) in zip(ranks, told, strict=True):
        assert process.returncode == 0, complained[-4000:]
        assert "all fine" in said
