"""What an agreement costs with 512 ranks on one store: the real control threads, in a few processes.

Prints one JSON line. `decided`: from a proposal until every rank has answered and the decision stands; `applied`: until
every rank has reported, without the gathering at the boundary: one thread stands for all training threads of a process,
each of which would wait for the others (`bench/commands.py` has that, on real ranks); `leader_cpu_ms`: rank 0's CPU
time for one command, its leader alone in its process. `floor`: one round trip on the same store while nothing else
happens; `ratio_p50` is *decided* over that. Then what the control check costs at a boundary where nothing is proposed,
beside an empty loop: promised is at most 1 µs.

usage: python bench/control_clients.py [--clients N] [--commands N] [--processes P]
"""

import argparse
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection as Pipe
from typing import Any

from store_processes import Processes, quiet_torch, serve, shares

from trainctl.trainer.agreement import GO, Outcome, Position
from trainctl.trainer.boundary import Boundary
from trainctl.trainer.control import Control
from trainctl.trainer.leader import Leader, Prepared
from trainctl.trainer.meeting import Meeting
from trainctl.trainer.protocol import RankEvent
from trainctl.wire.commands import Command, Resume
from trainctl.wire.messages import CommandUpdate, LinkCommand

_IDLE_ROUNDS = 1_000_000


def meeting() -> Meeting:
    return Meeting(world_size=2, run_id="bench", attempt=1, secret=b"secret")


def held() -> Boundary:
    boundary = Boundary()
    boundary.held_at = Position(0)  # as in a pause: every proposal is for the boundary at which everybody is
    return boundary


def control_clients(ranks: range, port: int, pipe: Pipe) -> None:
    """The control threads of some ranks, and one thread that applies for all of them, as training threads would."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    meet = meeting()
    boundaries = [held() for _ in ranks]
    with ThreadPoolExecutor(32) as pool:
        lines = list(pool.map(lambda _: meet.connect(), range(2 * len(ranks))))
    controls = [
        Control(
            rank=rank,
            ranks=len(ranks),
            boundary=boundary,
            waiting=lines.pop(),
            talking=lines.pop(),
            refusal=lambda _: None,
        )
        for rank, boundary in zip(ranks, boundaries, strict=True)
    ]
    over = threading.Event()

    def train() -> None:
        while not over.wait(0.002):
            for boundary in boundaries:
                armed = boundary.armed
                if armed is not None and armed.decision == GO and armed.going():
                    boundary.disarm(armed)
                    armed.on(RankEvent.ALL)
                    armed.finish(Outcome(ok=True, step=0))

    threading.Thread(target=train, daemon=True).start()
    for control in controls:
        control.start()
    pipe.send("ready")
    pipe.recv()
    over.set()
    controls[0].leave(10)
    for control in controls:
        control.join(10)
    pipe.send("gone")


def lead(clients: int, commands: int, port: int) -> dict[str, Any]:
    """Rank 0: propose one command after another, and take the times."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    told: dict[tuple[str, str], float] = {}
    news = threading.Condition()

    def tell(update: CommandUpdate) -> None:
        with news:
            told[update.id, update.state] = time.perf_counter()
            news.notify_all()

    connection = meeting().connect()
    floor_s = []
    for number in range(1000):
        began = time.perf_counter()
        connection.decide(f"floor/{number}", b"x")
        floor_s.append(time.perf_counter() - began)
    leader = Leader(
        world_size=clients,
        boundary=held(),
        connection=connection,
        prepare=lambda _: Prepared(),
        tell=tell,
        incarnation=lambda: 1,
    )
    leader.start()
    decided_s, applied_s, cpu_s = [], [], []
    for number in range(commands):
        name = f"c{number}"
        began, cpu = time.perf_counter(), time.process_time()
        leader.submit(LinkCommand(command=Command(id=name, action=Resume()), actor="bench", accepted=0.0))
        with news:
            news.wait_for(lambda name=name: (name, "applied") in told, timeout=60)  # type: ignore[misc]
        cpu_s.append(time.process_time() - cpu)
        decided_s.append(told[name, "scheduled"] - began)
        applied_s.append(told[name, "applied"] - began)
    leader.close()
    leader.join(10)
    decided, floor = quantiles_ms(decided_s), quantiles_ms(floor_s)
    return {
        "decided": decided,
        "applied": quantiles_ms(applied_s),
        "leader_cpu_ms": quantiles_ms(cpu_s)["p50_ms"],
        "floor": floor,
        "ratio_p50": round(decided["p50_ms"] / floor["p50_ms"], 1),
    }


def idle_check() -> dict[str, float]:
    """Nanoseconds of what `step_done` does for the control at a boundary where nothing is proposed."""
    boundary, actions, clock = Boundary(), None, time.perf_counter
    rounds = range(_IDLE_ROUNDS)
    began = clock()
    for _ in rounds:
        if boundary.armed is not None and actions is not None:
            raise AssertionError
    checked = clock() - began
    began = clock()
    for _ in rounds:
        pass
    empty = clock() - began
    return {"check_ns": round(checked / _IDLE_ROUNDS * 1e9, 1), "empty_loop_ns": round(empty / _IDLE_ROUNDS * 1e9, 1)}


def quantiles_ms(taken_s: list[float]) -> dict[str, float]:
    ordered = sorted(taken_s)
    return {
        "p50_ms": round(ordered[len(ordered) // 2] * 1e3, 3),
        "p99_ms": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1e3, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=512)
    parser.add_argument("--commands", type=int, default=100)
    parser.add_argument("--processes", type=int, default=4)
    given = parser.parse_args()
    quiet_torch()
    processes = Processes()
    store = processes.start(serve)
    port = store.recv()
    clients = []
    for share in shares(given.clients, given.processes):
        clients.append(processes.start(control_clients, share, port))
        clients[-1].recv()
    figures = lead(given.clients, given.commands, port)
    for client in clients:
        client.send("leave")
    for client in clients:
        client.recv()
    store.send("leave")
    processes.join()
    idle = idle_check()
    head = {"bench": "control_clients", "clients": given.clients, "processes": given.processes}
    print(json.dumps(head | figures | {"idle": idle}))


if __name__ == "__main__":
    main()
