"""The reference loop, the demo and the example as users start them: torchrun, real ranks, a live run."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from jobs import end_tree, free_port, trainctl_json
from trainctl.wire.manifest import list_checkpoints
from trainctl.wire.messages import CheckpointInfo
from waiting import until

pytestmark = pytest.mark.ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "nanogpt_style.py"
DEMO = ["-m", "trainctl.trainer.demo"]
# Small enough for four ranks on two cores; the model and everything else are the demo's own.
QUICK = ["--batch-size", "1", "--steps", "8", "--checkpoint-every", "4", "--eval-every", "4", "--ema", "0.9"]


@pytest.fixture(autouse=True)
def ended_sources(own_home: Path) -> Iterator[None]:
    """Hubs outlive their run by a minute; after a test nobody waits for them."""
    yield
    for card in (own_home / "state" / "cards").glob("*.json"):
        pid = json.loads(card.read_text())["pid"]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A little text to train on, so that ranks need not read the whole library."""
    directory = tmp_path / "text"
    directory.mkdir()
    for number in range(60):
        (directory / f"module{number}.py").write_text(f"def function_{number}(argument):\n    return argument\n" * 20)
    return directory


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | extra


def command(ranks: int, target: Sequence[str]) -> list[str]:
    if ranks == 1:
        return [sys.executable, *target]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*launcher, "--master-addr", "127.0.0.1", "--master-port", str(free_port()), *target]


def finish(ranks: int, target: Sequence[str], **env: str) -> str:
    """Run to its end; return what it printed, fail when it did not end well."""
    done = subprocess.run(
        command(ranks, target),
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def checkpoints(run_dir: Path) -> dict[int, CheckpointInfo]:
    return {info.step: info for info in list_checkpoints(run_dir / "checkpoints")}


def tensors(run_dir: Path, info: CheckpointInfo, scratch: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: model, optimizer and moving average."""
    file = scratch / f"{run_dir.name}.pt"
    dcp_to_torch_save(run_dir / "checkpoints" / info.id, file)
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            flat[prefix] = value
        elif isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}/{name}", inner)

    walk("", torch.load(file, weights_only=True))
    return flat


@pytest.mark.parametrize(
    "how",
    [
        pytest.param([], marks=pytest.mark.thorough),
        pytest.param(["--sharding", "fsdp", "--amp", "bf16", "--accumulate", "2"], marks=pytest.mark.exhaustive),
        pytest.param(["--sharding", "fsdp", "--amp", "fp16", "--accumulate", "2"], marks=pytest.mark.thorough),
    ],
    ids=lambda how: " ".join(how) or "ddp",
)
def test_a_resumed_demo_goes_on_to_the_bit_as_if_it_had_never_stopped(
    how: list[str], text: Path, tmp_path: Path
) -> None:
    ranks = 3  # two would hide that DDP orders its buckets anew in a fresh process
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    arguments = [*DEMO, *QUICK, *how, "--data", str(text)]
    finish(ranks, arguments, TRAINCTL_RUN_DIR=str(straight), TRAINCTL_RUN_ID="straight")
    first = checkpoints(straight)
    assert sorted(first) == [4, 8]
    assert first[8].metrics["val_loss"] < first[4].metrics["val_loss"] < 5.6
    assert first[8].metrics["val_loss_ema"] < 5.6

    begun = straight / "checkpoints" / first[4].id
    shutil.copytree(begun, resumed / "checkpoints" / begun.name)
    finish(ranks, arguments, TRAINCTL_RUN_DIR=str(resumed), TRAINCTL_RUN_ID="resumed", TRAINCTL_RESUME="1")
    second = checkpoints(resumed)
    assert sorted(second) == [4, 8]
    assert second[8].metrics == first[8].metrics

    one, other = tensors(straight, first[8], tmp_path), tensors(resumed, second[8], tmp_path)
    assert one.keys() == other.keys()
    assert len(one) > 100
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.thorough
def test_the_demo_trains_sharded_and_in_fp16(text: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [*DEMO, *QUICK, "--sharding", "fsdp", "--amp", "fp16", "--data", str(text)]
    finish(2, arguments, TRAINCTL_RUN_DIR=str(run_dir), TRAINCTL_RUN_ID="sharded")
    metrics = checkpoints(run_dir)[8].metrics
    assert metrics["val_loss"] < 5.0
    assert metrics["val_loss_ema"] < 5.6


def test_the_demo_without_enough_data_says_what_to_do_once(tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text("pass\n")
    target = [*DEMO, "--data", str(tmp_path)]
    done = subprocess.run(command(1, target), env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "give --data DIR" in done.stderr


# --- the example


def marked(source: str) -> list[str]:
    return [line for line in source.splitlines() if line.endswith("# trainctl")]


def losses(printed: str) -> list[tuple[int, str]]:
    """Iteration and loss of every line the example printed about its training."""
    return [(int(step), loss) for step, loss in re.findall(r"iter (\d+): loss ([\d.]+)", printed)]


def test_the_example_needs_eight_lines_and_nothing_else_of_trainctl() -> None:
    source = EXAMPLE.read_text()
    assert 0 < len(marked(source)) <= 8
    code = source.split('"""', 2)[2]
    rest = "\n".join(line for line in code.splitlines() if not line.endswith("# trainctl"))
    assert not re.search(r"\brun\b\.|\bRun\b|trainctl", rest)


@pytest.mark.thorough
def test_the_example_trains_the_same_without_the_lines_switched_off_and_live(tmp_path: Path) -> None:
    plain = tmp_path / "plain.py"
    plain.write_text("\n".join(line for line in EXAMPLE.read_text().splitlines() if not line.endswith("# trainctl")))
    arguments = ["--max-iters", "21"]
    without = losses(finish(1, [str(plain), *arguments]))
    assert [step for step, _ in without] == [0, 10, 20]
    assert float(without[-1][1]) < float(without[0][1]) - 1.0
    assert losses(finish(1, [str(EXAMPLE), *arguments], TRAINCTL="off")) == without
    assert losses(finish(1, [str(EXAMPLE), *arguments])) == without


@pytest.mark.thorough
def test_an_operator_rolls_the_example_back_on_two_ranks_and_stops_it(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "printed"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(2, [str(EXAMPLE), "--max-iters", "100000"]),
            env=environment(TRAINCTL_RUN_DIR=str(run_dir), TRAINCTL_RUN_ID="example"),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            until(lambda: (run_dir / "run.json").exists() and losses(log.read_text()), 60, what="the first step")
            saved = trainctl_json("checkpoint", "save", "-r", str(run_dir))
            assert saved["state"] == "applied", saved
            until(lambda: losses(log.read_text())[-1][0] > saved["step"] + 30, 60, what="30 more steps")
            done = trainctl_json("rollback", "last", "--yes", "-r", str(run_dir))
            assert (done["state"], done["after"]) == ("applied", saved["step"]), done
            until(lambda: losses(log.read_text())[-1][0] > done["before"], 60, what="the steps trained again")
            assert trainctl_json("stop", "--yes", "-r", str(run_dir))["state"] == "applied"
            assert process.wait(30) == 0, log.read_text()
        finally:
            end_tree(process)
    printed = losses(log.read_text())
    once, again = printed[: turn_back(printed)], printed[turn_back(printed) :]
    repeated = dict(once).keys() & dict(again).keys()
    assert len(repeated) >= 3
    assert {step: dict(once)[step] for step in repeated} == {step: dict(again)[step] for step in repeated}


def turn_back(printed: list[tuple[int, str]]) -> int:
    """Where the iterations go backwards."""
    return next(at for at in range(1, len(printed)) if printed[at][0] < printed[at - 1][0])
