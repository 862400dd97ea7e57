"""What benchmarks of many simulated ranks share: a job's store and the ranks, in processes of their own."""

import multiprocessing as mp
import os
import time
from multiprocessing.connection import Connection as Pipe
from typing import Any


def quiet_torch() -> None:
    """Before any process is started."""
    # torch looks up the name of every peer it connects to, and where there is none that takes its time-out.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def serve(pipe: Pipe) -> None:
    """The job's store, as under torchrun: tells its port, and its CPU time when asked, until told to leave."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    while pipe.recv() != "leave":
        pipe.send(time.process_time())


class Processes:
    """Started with a pipe to each."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._started: list[Any] = []

    def start(self, target: Any, *arguments: Any) -> Pipe:
        """Call `target` with the arguments and its end of the pipe; ours is returned."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=target, args=(*arguments, theirs), daemon=True)
        process.start()
        self._started.append(process)
        return ours

    def join(self) -> None:
        for process in self._started:
            process.join(10)


def shares(total: int, processes: int) -> list[range]:
    """The numbers from 0, in as many parts as there are processes."""
    each = -(-total // processes)
    return [range(first, min(first + each, total)) for first in range(0, total, each)]
