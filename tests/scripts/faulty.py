"""tests/scripts/steered.py with a fault in it, of rank 0's unless it says otherwise.

usage: faulty.py FAULT OUTPUT [arguments of steered.py]

FAULT: cut-before-commit   the leader's connection to the store is cut when all are staged
       cut-when-told       … once OUTPUT/cut is there, and nobody listens at the store's address until that is gone
       die-before-go       killed when all are ready and nothing is decided
       silent-store        torchrun, which holds the store, is stopped when all are staged; doubt begins after 1 s
       refuse-13           the tunable's callback on rank 1 raises when it becomes 13
       eval-raises RANKS   on_eval raises on these ranks (0, 1 or 01) when it is asked for, with the model in eval mode
       eval-splits         … on rank 1, before a collective in which rank 0 then waits
       starve              rank 1's training thread keeps the GIL for about half a second in every 20th step
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import steered
import torch
import torch.distributed as dist
from torch import nn

from trainctl.trainer import Run
from trainctl.trainer import control as control_module
from trainctl.trainer.agreement import COMMIT, GO
from trainctl.trainer.control import InDoubt
from trainctl.trainer.meeting import Connection, Meeting

_DOUBT_S = 1.0


def sockets_to_the_store() -> set[int]:
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        try:
            with socket.socket(fileno=os.dup(int(path.name))) as seen:
                if seen.getpeername()[1] == int(os.environ["MASTER_PORT"]):
                    found.add(int(path.name))
        except OSError:
            continue
    return found


def cut(line: int) -> None:
    """What a reset does: whatever is under way on this connection, and whatever comes, fails."""
    with socket.socket(fileno=os.dup(line)) as held:
        held.shutdown(socket.SHUT_RDWR)


def the_leaders_line() -> list[int]:
    """Filled when the third connection is made, the leader's: rank 0 makes four."""
    made, line, connect = [], list[int](), Meeting.connect

    def connecting(self: Meeting, **given: Any) -> Connection:
        before = sockets_to_the_store()
        connection = connect(self, **given)
        made.append(connection)
        if len(made) == 3:
            line.extend(sockets_to_the_store() - before)
        return connection

    Meeting.connect = connecting  # type: ignore[method-assign]
    return line


def before_deciding(wanted: bytes, fault: Callable[[], None]) -> None:
    """Let `fault` happen once, when rank 0 is about to write that decision."""
    decide, done = Connection.decide, threading.Event()

    def deciding(self: Connection, key: str, content: bytes) -> bytes | None:
        if content == wanted and not done.is_set():
            done.set()
            fault()
        return decide(self, key, content)

    Connection.decide = deciding  # type: ignore[method-assign]


def cut_while_told(line: list[int], output: Path) -> None:
    open_again = Meeting._open_again

    def refused(self: Meeting) -> Any:
        if (output / "cut").exists():
            raise ConnectionRefusedError("Connection refused")
        return open_again(self)

    def watch() -> None:
        while not (output / "cut").exists():
            time.sleep(0.05)
        cut(line[0])
        (output / "is-cut").touch()

    Meeting._open_again = refused  # type: ignore[method-assign]
    threading.Thread(target=watch, daemon=True).start()


def starve() -> None:
    step_done, numbers = Run.step_done, [0.5] * 10_000_000

    def stepping(self: Run, **given: int) -> None:
        if self.step % 20 == 0:
            torch.tensor(numbers)  # no other thread runs meanwhile
        step_done(self, **given)

    Run.step_done = stepping  # type: ignore[method-assign]


def refuse_13(output: Path) -> None:
    tunable, leads = Run.tunable, os.environ["RANK"] == "0"

    def changed(value: object) -> None:
        if value == 13 and not leads:
            raise ValueError("an unlucky number")
        with (output / f"changed-{os.environ['RANK']}").open("a") as file:
            print(value, file=file)

    def listening(self: Run, name: str, value: Any, **given: Any) -> Any:
        return tunable(self, name, value, **given | ({"on_change": changed} if name == "x" else {}))

    Run.tunable = listening  # type: ignore[method-assign]


def raise_in_eval(output: Path, *, raises: bool, splits: bool) -> None:
    attach, rank = Run.attach, os.environ["RANK"]

    def attaching(name: str, *, model: nn.Module, **given: Any) -> Run:
        def evaluate() -> dict[str, float]:
            model.eval()
            if raises:
                raise ValueError(f"a bad batch on rank {rank}")
            if splits:
                dist.all_reduce(torch.zeros(1))
            model.train()
            return {"val_loss": 1.0}

        def stepping(self: Run, **stepped: int) -> None:
            if not model.training:
                (output / "trains-in-eval-mode").touch()
            step_done(self, **stepped)

        step_done = Run.step_done
        Run.step_done = stepping  # type: ignore[method-assign]
        return attach(name, model=model, **given | {"on_eval": evaluate})

    Run.attach = attaching  # type: ignore[method-assign, assignment]


def main() -> None:
    fault = sys.argv.pop(1)
    raising = sys.argv.pop(1) if fault == "eval-raises" else "1"
    output, leads = Path(sys.argv[1]), os.environ["RANK"] == "0"
    if fault in {"eval-raises", "eval-splits"}:
        raise_in_eval(output, raises=os.environ["RANK"] in raising, splits=fault == "eval-splits")
    if fault == "refuse-13":
        refuse_13(output)
    if fault == "starve" and not leads:
        starve()
    if fault == "silent-store":
        control_module.DOUBT_S = control_module._LOOK_S = _DOUBT_S
        if leads:
            before_deciding(COMMIT, lambda: os.kill(os.getppid(), signal.SIGSTOP))
    if leads and fault in {"cut-before-commit", "cut-when-told"}:
        line = the_leaders_line()
        if fault == "cut-before-commit":
            before_deciding(COMMIT, lambda: cut(line[0]))
        else:
            cut_while_told(line, output)
    if leads and fault == "die-before-go":
        before_deciding(GO, lambda: os.kill(os.getpid(), signal.SIGKILL))
    try:
        steered.main()
    except InDoubt as doubt:
        (output / f"doubt-{os.environ['RANK']}").write_text(str(doubt))
        os._exit(7)  # a thread waits in the store that does not answer, and would hold up the exit


if __name__ == "__main__":
    main()
