"""Run by test_checkpoint_faults.py and test_checkpoint_power_cut.py with effects.c preloaded.

usage: faulty_saves.py DIRECTORY SCENARIO...

Each scenario writes a line of JSON into DIRECTORY/SCENARIO/points for each point of a save at which it did something.
"""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from effects import FAIL, KILL, LIE, PASS, STOP, TEAR, Effects, read_record
from test_checkpoint_safety import Small
from torch import nn
from torch.distributed.fsdp import fully_shard

from trainctl.trainer.checkpoint import Checkpointer, Retention, State, prune
from trainctl.wire.manifest import list_checkpoints
from trainctl.wire.rundir import RunDir

effects = Effects()


def forked(work: Callable[[], None]) -> int:
    """Do it in a process of its own; its pid."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - a forked process may not go on with its parent's work
            print(f"the forked process: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    return child


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def new_save_and_retention(training: Small) -> str | None:
    """What a run does again and again: a new checkpoint, then older ones go. The save's error."""
    error = training.save("c")
    if error is None:
        prune(training.directory, Retention(last=1))
    return error


def found(directory: Path) -> dict[str, Any]:
    """What the next start finds: which checkpoints are called good, which of them load, what else lies there."""
    listed = [info.id for info in list_checkpoints(directory)]
    again = Small(directory, width=8)
    loads, problems = [], []
    for name in listed:
        try:
            again.checkpointer.load(name)
            loads.append(name)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            problems.append(f"{name}: {type(error).__name__}: {error}")
    known = {name for one in listed for name in (one, f"{one}.checked.json", f"{one}.pinned")}
    left = sorted(path.name for path in directory.iterdir() if path.name not in known)
    saves_again = again.save("d")
    return {"listed": listed, "loads": loads, "problems": problems, "left": left, "saves_again": saves_again}


def prepared(directory: Path) -> Path:
    """A run with two checkpoints, the older one with a mark that has to go with it."""
    checkpoints = directory / "prepared" / "checkpoints"
    training = Small(checkpoints, width=8)
    for name in "ab":
        assert training.save(name) is None
        training.checkpointer.load(name)
    return checkpoints


def at_each_point(directory: Path, how: int, kinds: tuple[str, ...] = (), error: int = 0, every: int = 1) -> None:
    """The same save again and again, with something done to its first, second, … last effect, or to some of them."""
    template, number = prepared(directory), 1 - every
    while True:
        number += every
        checkpoints = directory / f"run-{number}" / "checkpoints"
        shutil.copytree(template, checkpoints)
        told = directory / f"told-{number}.json"

        def work(checkpoints: Path = checkpoints, told: Path = told, number: int = number) -> None:
            training = Small(checkpoints, width=8)
            effects.arm(checkpoints.parent, how, number, kinds=kinds, error=error)
            try:
                failed = new_save_and_retention(training)
            except Exception as raised:  # noqa: BLE001 - it is what the test asks about
                failed = f"retention: {type(raised).__name__}: {raised}"
            reached = effects.seen() >= number
            effects.arm(None)
            names = [path.name for path in checkpoints.iterdir()]
            told.write_text(json.dumps({"error": failed, "reached": reached, "names": names}))

        status = os.waitpid(forked(work), 0)[1]
        said = json.loads(told.read_text()) if told.exists() else {"reached": True}
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise SystemExit(f"the save itself went wrong at point {number}")
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not said["reached"]:
            break
        say(point=number, killed=killed, **said, **found(checkpoints))
        shutil.rmtree(checkpoints.parent)


def record(directory: Path) -> None:
    """The first checkpoints of a new run and a retention, recorded; the files themselves stay to compare with."""
    run = directory / "disk" / "runs" / "one"
    (directory / "disk").mkdir()
    effects.arm(directory / "disk", PASS, record=directory / "record")
    RunDir(run).create()
    training = Small(RunDir(run).checkpoints, width=8)
    for name in "abc":
        assert training.save(name) is None
        effects.note(f"saved {name}")
    prune(training.directory, Retention(last=1))
    effects.note("pruned")
    effects.arm(None)
    say(effects=sum(1 for _ in read_record(directory / "record")))


def mounted(image: Path, at: Path) -> None:
    at.mkdir(exist_ok=True)
    # The journal is committed by a sync or not at all, and data is not written before the names that lead to it.
    subprocess.run(["mount", "-o", "loop,data=writeback,commit=300", str(image), str(at)], check=True, timeout=30)


def after_a_cut(image: Path, directory: Path) -> dict[str, Any]:
    """What is found after the power went now: the image as it is, without what waits in memory, mounted again."""
    copy, at = directory / "after", directory / "after-mount"
    shutil.copyfile(image, copy)
    mounted(copy, at)
    try:
        checkpoints = at / "run" / "checkpoints"
        return found(checkpoints) if checkpoints.is_dir() else {"listed": [], "loads": [], "problems": [], "left": []}
    finally:
        subprocess.run(["umount", str(at)], check=True, timeout=30)


def power_cuts(directory: Path, *, honest: bool) -> None:
    """A save and a retention on a file system in an image, which is looked at whenever names or syncs are to come."""
    image, at, saved = directory / "image", directory / "mount", directory / "saved"
    with image.open("wb") as file:
        file.truncate(8 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=30)
    mounted(image, at)
    try:
        assert Small(at / "run" / "checkpoints", width=8).save("b") is None

        def work() -> None:
            training = Small(at / "run" / "checkpoints", width=8)
            how = STOP if honest else STOP | LIE
            effects.arm(at, how, kinds=("fsync", "rename", "mkdir", "unlink"))
            assert training.save("c") is None
            saved.touch()
            effects.note("saved c")
            prune(training.directory, Retention(last=1))
            effects.note("pruned")

        child = forked(work)
        while os.WIFSTOPPED(status := os.waitpid(child, os.WUNTRACED)[1]):
            say(confirmed=saved.exists(), **after_a_cut(image, directory))
            os.kill(child, signal.SIGCONT)
        assert status == 0, "the save itself went wrong"
    finally:
        subprocess.run(["umount", str(at)], check=True, timeout=30)


def one_of_two_ranks(directory: Path, rank: int, dies: int, number: int) -> None:
    """One rank of a sharded run that saves c; rank `dies` is killed before its `number`-th effect."""
    meeting = f"file://{directory}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model = nn.Linear(8, 8)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    checkpointer = Checkpointer(
        directory=directory / "checkpoints",
        run_id="test",
        rank=rank,
        world_size=2,
        group=group,
        state=State(models=[model], optimizers=[torch.optim.AdamW(model.parameters())]),
    )
    if rank == dies:
        effects.arm(directory / "checkpoints", KILL, number)
    error = checkpointer.begin_save(id="c", step=3, incarnation=1, attempt=1, metrics={}).result(60).error
    (directory / f"told-{rank}.json").write_text(json.dumps({"error": error, "seen": effects.seen()}))


def either_of_two_ranks(directory: Path) -> None:
    """Rank 1 is killed before each effect of its own, rank 0 before every second one."""
    template = prepared(directory)
    for dies, every in ((1, 1), (0, 2)):
        number, reached = 1, True
        while reached:
            run = directory / f"rank-{dies}-{number}"
            shutil.copytree(template, run / "checkpoints")
            ranks = [forked(partial(one_of_two_ranks, run, rank, dies, number)) for rank in (0, 1)]
            ended = [os.waitpid(pid, 0)[1] for pid in ranks]
            reached = os.WIFSIGNALED(ended[dies])
            assert ended[1 - dies] == 0, "the rank that lives did not come to an end of its save"
            told = json.loads((run / f"told-{1 - dies}.json").read_text())
            say(dies=dies, point=number, killed=reached, error=told["error"], **found(run / "checkpoints"))
            shutil.rmtree(run)
            number += every


SCENARIOS: dict[str, Callable[[Path], None]] = {
    "kill": lambda directory: at_each_point(directory, KILL),
    "some kills": lambda directory: at_each_point(directory, KILL, every=4),
    "tear": lambda directory: at_each_point(directory, TEAR, ("write",)),
    "fsync": lambda directory: at_each_point(directory, FAIL, ("fsync",), errno.EIO),
    "write": lambda directory: at_each_point(directory, FAIL, ("write", "create", "mkdir", "rename"), errno.ENOSPC),
    "record": record,
    "ranks": either_of_two_ranks,
    "cut": lambda directory: power_cuts(directory, honest=True),
    "cut after lies": lambda directory: power_cuts(directory, honest=False),
}

if __name__ == "__main__":
    for scenario in sys.argv[2:]:
        place = Path(sys.argv[1]) / scenario.replace(" ", "-")
        place.mkdir()
        with contextlib.redirect_stdout((place / "points").open("w")):
            SCENARIOS[scenario](place)
