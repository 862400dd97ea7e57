"""How often a noisy run that is in order wakes somebody, through a real hub with all detectors. One JSON line.

Each seed is a real training process that attaches, with a hub and an agent of its own: a regression on Student's t
noise whose steps of about 5 ms are held up at random (lognormal, now and then for seconds, up to 6 s), with
evaluations and saves of the script's own of 12 s, and one that `on_eval` makes. Nothing is wrong: every event of
severity warning or error, every `stalled` and every `stuck` is a false alarm. At the end one step takes 25 s:
`stalled` and `stuck` have to be told of it, and how long that took is printed. The seeds were not used for choosing
any threshold.

usage: live_alarms.py [--seeds N] [--first 1000] [--seconds 90]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HANG_S = 25.0
LONGEST_S = 6.0


def train(output: Path, seed: int, seconds: float) -> None:
    import torch
    from torch import nn

    from trainctl.trainer import Run

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    chance = random.Random(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    noise, weights = torch.distributions.StudentT(3.0), torch.randn(8, 1)
    run = Run.attach(
        "bench-alarms", model=model, optimizer=optimizer, on_eval=lambda: time.sleep(12.0), eval_every=4000
    )

    def step(held_up_s: float) -> None:
        inputs = torch.randn(16, 8)
        with run.phase("forward"):
            targets = torch.sin(inputs @ weights) + 0.5 * noise.sample((16, 1))
            loss = (model(inputs) - targets).square().mean()
        with run.phase("backward"):
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        time.sleep(held_up_s)
        run.log(loss=loss)
        run.step_done()

    with run:
        began, own = time.monotonic(), iter(("eval", "checkpoint", "eval", "checkpoint"))
        due = began + seconds / 5
        while time.monotonic() - began < seconds:
            step(min(LONGEST_S, chance.lognormvariate(-5.5, 1.6)))
            if time.monotonic() > due and (name := next(own, None)) is not None:
                with run.phase(name):
                    time.sleep(12.0)
                due = time.monotonic() + seconds / 5
        (output / "hang.json").write_text(json.dumps({"at": time.time(), "steps": run.step}))
        step(HANG_S)


def alarm_of(event: object) -> str | None:
    """What would have woken somebody."""
    from trainctl.wire.messages import Anomaly, NodeChanged, RankChanged, StateChanged

    match event:
        case Anomaly(severity="warning" | "error", what=name):
            return name
        case RankChanged(severity="warning" | "error", state=name):
            return name
        case NodeChanged(severity="warning" | "error", state=name):
            return f"node {name}"
        case StateChanged(state="stalled" | "lost" | "failed" as name):
            return name
    return None


def judge(directory: Path, hang: dict[str, float]) -> tuple[list[str], dict[str, float]]:
    """False alarms, and after how many seconds of the real one each detector spoke."""
    from trainctl.store.replay import load_record

    alarms: list[str] = []
    spoke: dict[str, float] = {}
    for event in load_record(directory).events:
        name = alarm_of(event)
        if name is not None and event.time < hang["at"]:
            alarms.append(name)
        elif name is not None:
            spoke.setdefault(name, round(event.time - hang["at"], 2))
    return alarms, spoke


def one(seed: int, seconds: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="tcb-", dir="/tmp", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        settings = {
            "TRAINCTL_HOME": f"{name}/state",
            "TRAINCTL_CONFIG": f"{name}/config",
            "TRAINCTL_RUN_DIR": f"{name}/run",
        }
        command = [sys.executable, __file__, "--train", name, "--first", str(seed), "--seconds", str(seconds)]
        subprocess.run(
            command, env=os.environ | settings | {"OMP_NUM_THREADS": "1"}, check=True, stderr=subprocess.DEVNULL
        )
        hang = json.loads((directory / "hang.json").read_text())
        alarms, spoke = judge(directory / "run", hang)
    return {"steps": hang["steps"], "alarms": alarms, "spoke": spoke}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train is not None:
        train(given.train, given.first, given.seconds)
        return
    runs = {seed: one(seed, given.seconds) for seed in range(given.first, given.first + given.seeds)}
    steps = sum(int(str(run["steps"])) for run in runs.values())
    alarms = [alarm for run in runs.values() for alarm in list(run["alarms"])]  # type: ignore[call-overload]
    print(json.dumps({"bench": "live_alarms", "steps": steps, "false_alarms": alarms, "runs": runs}))


if __name__ == "__main__":
    main()
