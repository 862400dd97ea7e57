"""How long ranks take to gather at a boundary, beside what the store itself has to compute for it.

Prints one JSON line. Each simulated rank is a thread with a connection of its own to one real TCPStore, in a few
processes; they come to the boundary of one proposal after another, all but one at once, and that one `--late` seconds
later. `gathered_ms`: from when the last one came until the last one goes on, on one clock; `first_ms`: until rank 0
goes on. Threads share the cores of this machine with one another and with the store, as ranks on machines of their own
do not: it is an upper bound, and a steep one where there are many ranks for each core. `store_cpu_ms` is what the
store's process computes for one gathering, which no arrangement of the ranks saves, and `alone_ms` is the gathering
of two ranks on the same machine.

usage: python bench/gathering.py [--ranks N] [--rounds N] [--processes P] [--late S]
"""

import argparse
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection as Pipe

from store_processes import Processes, quiet_torch, serve, shares

from trainctl.trainer.gathering import Gathering
from trainctl.trainer.meeting import Meeting

_LIMIT_S = 60.0


def come(rank: int, gathering: Gathering, at: float, came: dict[int, float], gone_on: dict[int, float]) -> None:
    """One rank's training thread at one boundary."""
    time.sleep(max(0.0, at - time.time()))
    came[rank] = time.time()
    assert gathering.wait(), "somebody did not come"
    gone_on[rank] = time.time()


def gather(ranks: range, of: int, port: int, pipe: Pipe) -> None:
    """Some of the ranks: for each round, when the last of them came and when each went on."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    meeting = Meeting(world_size=2, run_id="bench", attempt=1, secret=b"secret")
    with ThreadPoolExecutor(32) as pool:
        lines = list(pool.map(lambda _: meeting.connect(), ranks))
    own = list(zip(ranks, lines, strict=True))
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        number, starts_at, late_s = asked
        came: dict[int, float] = {}
        gone_on: dict[int, float] = {}
        due = {rank: starts_at + (late_s if rank == of - 1 else 0.0) for rank in ranks}
        gatherings = [Gathering(line, number=number, rank=rank, ranks=of, limit_s=_LIMIT_S) for rank, line in own]
        jobs = [(rank, one, due[rank], came, gone_on) for rank, one in zip(ranks, gatherings, strict=True)]
        threads = [threading.Thread(target=come, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipe.send((max(came.values()), gone_on))


def measured(ranks: int, parts: int, rounds: int, late_s: float) -> dict[str, float]:
    processes = Processes()
    store = processes.start(serve)
    port = store.recv()
    pipes = [processes.start(gather, share, ranks, port) for share in shares(ranks, parts)]
    for pipe in pipes:
        pipe.recv()
    whole, first, cpu = [], [], []
    for number in range(rounds):
        store.send("cpu")
        cpu_before = store.recv()
        starts_at = time.time() + 0.2 + ranks / 1000
        for pipe in pipes:
            pipe.send((number, starts_at, late_s))
        answers = [pipe.recv() for pipe in pipes]
        store.send("cpu")
        cpu.append(store.recv() - cpu_before)
        came = max(last for last, _ in answers)
        gone_on = {rank: at for _, part in answers for rank, at in part.items()}
        whole.append(max(gone_on.values()) - came)
        first.append(gone_on[0] - came)
    for pipe in pipes:
        pipe.send(None)
    store.send("leave")
    processes.join()
    return {
        "gathered_p50_ms": middle_ms(whole),
        "gathered_worst_ms": round(max(whole) * 1e3, 1),
        "first_p50_ms": middle_ms(first),
        "store_cpu_p50_ms": middle_ms(cpu),
    }


def middle_ms(taken_s: list[float]) -> float:
    return round(sorted(taken_s)[len(taken_s) // 2] * 1e3, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--late", type=float, default=0.0)
    given = parser.parse_args()
    quiet_torch()
    head = {"bench": "gathering", "cores": os.cpu_count(), **vars(given)}
    alone = measured(2, 2, given.rounds, given.late)["gathered_p50_ms"]
    found = measured(given.ranks, given.processes, given.rounds, given.late)
    ratio = round(found["gathered_p50_ms"] / alone, 1) if alone else None
    print(json.dumps(head | found | {"alone_ms": alone, "ratio_p50": ratio}))


if __name__ == "__main__":
    main()
