"""What a real run of the reference loop takes on disk: while it lives, and after its hub packed it. One JSON line.

usage: recorded.py [--steps 2000]

Trains a very small GPT on the standard library's text with the reference loop, seeded, on one rank, with hub and agent
as always. Counted are all bytes of the journal (figures of ranks and nodes and events too) for each metric value. While
the run lives its newest segments are as they were published, at most 16 MiB of them; the rest is packed. journal.py
takes the values from here.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from trainctl.store.replay import load_record
from trainctl.wire.cards import read_cards

NAME = "bench-recorded"


def train(steps: int) -> None:
    """One rank of a real run, in this process."""
    import torch

    from trainctl.trainer.demo.data import LoaderConfig, WindowLoader, read_corpus, validation_batches
    from trainctl.trainer.demo.model import GPT, ModelConfig
    from trainctl.trainer.loop import TrainConfig
    from trainctl.trainer.loop import train as train_model
    from trainctl.trainer.parallel import process_group

    corpus = read_corpus(None)
    cut = LoaderConfig(context=32, batch_size=4, seed=0, rank=0, world_size=1)
    with process_group() as device:
        torch.manual_seed(0)
        model = GPT(ModelConfig(layers=1, width=32, heads=2, context=32, dropout=0.1))
        train_model(
            NAME,
            model=model,
            loader=WindowLoader(corpus.train, cut),
            validation=validation_batches(corpus.validation, cut, count=2),
            config=TrainConfig(total_steps=steps, warmup_steps=100, eval_every=50, checkpoint_every=500, amp="off"),
            device=device,
        )


def journal_bytes(run: Path) -> dict[str, int]:
    """Bytes in the journal by kind of file."""
    found: dict[str, int] = {}
    for path in (run / "journal").iterdir():
        found[path.suffix or path.name] = found.get(path.suffix or path.name, 0) + path.stat().st_size
    return found


def record(home: Path, steps: int) -> tuple[Path, dict[str, int]]:
    """Train, let the hub end; the run's directory, and what its journal took just before that."""
    os.environ |= {"TRAINCTL_HOME": str(home / "state"), "TRAINCTL_CONFIG": str(home / "config")}
    os.environ["OMP_NUM_THREADS"] = "1"
    subprocess.run([sys.executable, __file__, "--train", "--steps", str(steps)], check=True)
    run = next((home / "state" / "runs").iterdir())
    live = journal_bytes(run)
    hubs = [card.pid for card in read_cards() if card.kind == "hub"]
    for pid in hubs:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in hubs) and time.monotonic() < deadline:
        time.sleep(0.05)
    return run, live


def values_of(run: Path) -> dict[str, NDArray[np.generic]]:
    """Every metric that has a value at each step, float32 where that loses nothing."""
    metrics = load_record(run).metrics
    found = {name: metrics.query(name)["value"].astype("f8") for name in metrics.names}
    most = max(len(column) for column in found.values())
    whole = {name: column for name, column in found.items() if len(column) == most}
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = {name: column.astype("<f4") for name, column in whole.items()}
    exact = {name for name in whole if np.array_equal(narrow[name].astype("f8"), whole[name], equal_nan=True)}
    return {name: narrow[name] if name in exact else column.astype("<f8") for name, column in whole.items()}


def recorded_values(steps: int = 2000) -> dict[str, NDArray[np.generic]]:
    """The values of a real run that is trained now: ten metrics of it, as they were recorded."""
    with tempfile.TemporaryDirectory(prefix="tcb-") as home:
        run, _ = record(Path(home), steps)
        return dict(list(values_of(run).items())[:10])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        train(given.steps)
        return
    with tempfile.TemporaryDirectory(prefix="tcb-") as home:
        run, live = record(Path(home), given.steps)
        ended, metrics = journal_bytes(run), load_record(run).metrics
        values = sum(len(metrics.query(name)["step"]) for name in metrics.names)
        line = {
            "bench": "recorded",
            "steps": given.steps,
            "values": values,
            "metrics": len(metrics.names),
            "live_bytes_per_value": round(sum(live.values()) / values, 2),
            "packed_bytes_per_value": round(ended.get(".col", 0) / values, 2),
            "with_index_bytes_per_value": round(sum(ended.values()) / values, 2),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
