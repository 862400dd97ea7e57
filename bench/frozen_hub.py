"""What a training loop's steps cost while its hub is frozen, dead or without disk, beside those while it is well.

    python bench/frozen_hub.py [--seconds 60] [--ranks 2]

Then W&B, offline, logs the same ten values in a process of its own while its service process is frozen (`wandb`).

Prints one JSON line: step times in milliseconds (p50, p99, largest) of a real DDP job of about 5 ms steps, of which
rank 0 logs ten values each, in turn `well`, `frozen` (SIGSTOP for the time given), `thawed`, `full` (no file may grow)
and `killed` (SIGKILL, and the hub that takes its place). `lost` is what the run itself says was lost, `missing` the
steps that the journal lacks. `ratio_p99` is of each over well.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEP_S = 0.005


def train(output: Path) -> None:
    """One rank: step until the file `stop` is there; write when each step ended and how long it took."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from trainctl.trainer import Run

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model: nn.Module = nn.Linear(64, 64)
    model = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = torch.randn(16, 64)
    stop, ended = torch.zeros(1), output / "stop"
    run = Run.attach("bench-frozen", model=model, optimizer=optimizer)
    with run, (output / f"steps-{rank}.txt").open("w") as record:
        began = time.perf_counter()
        while not stop:
            loss = model(inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(**{f"metric_{number}": 0.1 * number for number in range(9)}, loss=loss)
            run.step_done()
            time.sleep(max(0.0, STEP_S - (time.perf_counter() - began)))
            now = time.perf_counter()
            record.write(f"{time.time()} {now - began}\n")
            began = now
            if run.step % 50 == 0:  # all ranks leave at the same step
                stop = torch.tensor([float(ended.exists())])
                dist.all_reduce(stop)
                began = time.perf_counter()
    dist.destroy_process_group()


def log_to_wandb(output: Path) -> None:
    """The peer: the same values, each 5 ms, until it is killed; writes how long each `log` took as soon as it knows."""
    import wandb

    run = wandb.init(project="bench", mode="offline", dir=output, settings=wandb.Settings(silent=True))
    values = {f"metric_{number}": 0.1 * number for number in range(10)}
    with (output / "wandb.txt").open("w") as record:
        while True:
            began = time.perf_counter()
            run.log(values)
            record.write(f"{time.time()} {time.perf_counter() - began}\n")
            record.flush()
            time.sleep(STEP_S)


def drive_wandb(output: Path, seconds: float) -> dict[str, object] | str:
    """How long `wandb.log` took while its service process was well, and its longest stall while that was frozen."""
    import importlib.util

    import psutil

    if importlib.util.find_spec("wandb") is None:
        return "not installed: pip install -e .[bench]"
    record = output / "wandb.txt"
    with (output / "wandb.log").open("w") as log:
        job = subprocess.Popen([sys.executable, __file__, "--wandb", str(output)], stdout=log, stderr=log)
    frozen: list[psutil.Process] = []
    try:
        wait_for(lambda: record.exists() and record.stat().st_size > 10_000, 60, "W&B's first values")
        frozen = psutil.Process(job.pid).children(recursive=True)
        for process in frozen:
            process.suspend()
        froze = time.time()
        time.sleep(seconds)  # what is measured is what the log calls do meanwhile
        lines = [line.split() for line in record.read_text().splitlines() if len(line.split()) == 2]
    finally:
        job.kill()
        job.wait(10)
        for process in frozen:
            process.kill()
    well = sorted(float(took) for at, took in lines if float(at) < froze)
    newest = max(float(at) for at, _ in lines)
    longest = max((float(took) for at, took in lines if float(at) >= froze), default=0.0)
    return {
        "well_p99_ms": round(well[len(well) * 99 // 100] * 1000, 3),
        "frozen_s": seconds,
        "longest_stall_s": round(max(longest, froze + seconds - newest), 2),
    }


def wait_for(condition: object, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise SystemExit(f"frozen_hub: {what} did not come within {timeout_s:.0f} s")
        time.sleep(0.1)


def hub_card(*, not_pid: int = 0) -> dict[str, object] | None:
    cards = (Path(os.environ["TRAINCTL_HOME"]) / "cards").glob("hub-*.json")
    found = [json.loads(card.read_text()) for card in cards]
    return next((card for card in found if card["pid"] != not_pid), None)


def quantiles_ms(output: Path, first: float, last: float) -> dict[str, float]:
    lines = [line.split() for line in (output / "steps-0.txt").read_text().splitlines()]
    taken = sorted(float(seconds) for at, seconds in lines if first <= float(at) < last)
    picked = {"p50": taken[len(taken) // 2], "p99": taken[len(taken) * 99 // 100], "max": taken[-1]}
    return {"steps": len(taken)} | {name: round(seconds * 1000, 3) for name, seconds in picked.items()}


def missing_steps(directory: Path) -> tuple[int, int]:
    """(steps the journal lacks, steps trained)."""
    from trainctl.store.replay import load_record

    record = load_record(directory)
    steps = set(record.metrics.query("loss")["step"].tolist())
    return record.state.step - len(steps), record.state.step


def drive(directory: Path, seconds: float, ranks: int) -> dict[str, object]:
    output = directory / "output"
    output.mkdir()
    run_dir = directory / "run"
    os.environ |= {"TRAINCTL_HOME": str(directory / "state"), "TRAINCTL_CONFIG": str(directory / "config")}
    os.environ |= {"TRAINCTL_RUN_DIR": str(run_dir), "TMPDIR": str(directory), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with (output / "torchrun.log").open("w") as log:
        job = subprocess.Popen([*command, __file__, "--train", str(output)], stdout=log, stderr=log)
        try:
            wait_for(lambda: (run_dir / "run.json").exists() and hub_card() is not None, 60, "the hub")
            spans: dict[str, tuple[float, float]] = {}
            well_s = min(seconds, 20.0)

            def span(name: str, length_s: float) -> None:
                began = time.time()
                time.sleep(length_s)  # what is measured is how steps go meanwhile
                spans[name] = (began, time.time())

            time.sleep(2.0)
            span("well", well_s)
            card = hub_card()
            assert card is not None
            pid = int(str(card["pid"]))
            os.kill(pid, signal.SIGSTOP)
            span("frozen", seconds)
            os.kill(pid, signal.SIGCONT)
            span("thawed", well_s)
            soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard))
            span("full", well_s)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
            os.kill(pid, signal.SIGKILL)
            span("killed", well_s)
            wait_for(lambda: hub_card(not_pid=pid) is not None, 30, "the hub that takes the dead one's place")
            (output / "stop").touch()
            code = job.wait(60)
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait(40)
    wait_for(lambda: missing_steps(run_dir)[1] > 0, 20, "the journal")
    missing, steps = missing_steps(run_dir)
    figures = {name: quantiles_ms(output, *ends) for name, ends in spans.items()}
    from trainctl.store.replay import load_record

    lost = load_record(run_dir).state.dropped
    if code != 0 or "Traceback" in (output / "torchrun.log").read_text():
        print((output / "torchrun.log").read_text(), file=sys.stderr)
    return {
        "frozen_s": seconds,
        "ranks": ranks,
        "exit": code,
        "step_ms": figures,
        "steps": steps,
        "missing": missing,
        "lost": lost,
        "ratio_p99": {
            name: round(found["p99"] / figures["well"]["p99"], 3) for name, found in figures.items() if name != "well"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--wandb", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train is not None:
        train(given.train)
        return
    if given.wandb is not None:
        log_to_wandb(given.wandb)
        return
    with tempfile.TemporaryDirectory(prefix="tcb-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        line = {"bench": "frozen_hub"} | drive(Path(directory), given.seconds, given.ranks)
        print(json.dumps(line | {"wandb": drive_wandb(Path(directory), given.seconds)}))


if __name__ == "__main__":
    main()
