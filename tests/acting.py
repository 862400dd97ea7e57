"""What tests of real jobs on tests/scripts/steered.py ask and do, by the command line, as an operator would."""

import json
from typing import Any

from jobs import Job, trainctl, trainctl_json
from waiting import until


def act(running: Job, *words: str, code: int | None = 0) -> dict[str, Any]:
    """Send a command and wait for its outcome; `code` is the exit status that it must have."""
    done = trainctl(*words, "-r", str(running.directory), "--json", check=False)
    assert code is None or done.returncode == code, done.stdout + done.stderr + running.log()
    return dict(json.loads(done.stdout))


def agreed(running: Job, *words: str) -> dict[str, Any]:
    """Send a command until the ranks find a step for it: on a busy machine three tries may be too few."""

    def once() -> dict[str, Any] | None:
        told = act(running, *words, code=None)
        return None if "could not agree" in str(told["reason"]) else told

    told = until(once, 60, what=" ".join(words))
    assert told is not None
    assert told["state"] == "applied", told
    return told


def applied(running: Job) -> list[list[tuple[str, int, object]]]:
    """What each rank itself wrote down of what it applied: id, step and the value after it."""
    found = []
    for rank in range(running.ranks):
        path = running.output / f"applied-{rank}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        found.append([(line["id"], line["step"], line["after"]) for line in lines])
    return found


def status(running: Job) -> Any:
    return trainctl_json("status", "-r", str(running.directory))


def events(running: Job, kind: str) -> list[dict[str, Any]]:
    """The newest events of a kind."""
    words = ["log", "-r", str(running.directory), "-n", "2000", "--kind", kind, "--json"]
    return [json.loads(line) for line in trainctl(*words, check=False).stdout.splitlines()]


def anomaly(running: Job, what: str, severity: str) -> dict[str, Any]:
    """The first one that is told of `what`."""

    def find() -> dict[str, Any] | None:
        found = (line for line in events(running, "anomaly") if (line["what"], line["severity"]) == (what, severity))
        return next(found, None)

    found = until(find, 40, what=f"{what} {severity}")
    assert found is not None
    return found


def trains_on(running: Job) -> None:
    before = running.step()
    until(lambda: running.step() > before + 3, 30, what="training goes on")
