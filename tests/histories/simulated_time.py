"""Runs the real code of ranks and hub, thread for thread, in a time of its own, where every order is drawn from a seed.

One task runs at a time, each in a thread of its own that is woken when it is its turn. What would block (an event, a
lock, a queue, the store, a sleep) hands the turn on instead; when nobody can run, the clock moves to what comes next.
So a run of seconds takes milliseconds, and the same seed gives the same history.
"""

import contextlib
import heapq
import queue
import random
import threading
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any
from unittest import mock

WALL = 1_000_000.0  # what time.time() says at the beginning

_worlds: list["World"] = []


class Over(BaseException):
    """The history is over: unwinds whatever was still running."""


class Process:
    """What can be killed or stopped as a whole."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.stopped_until = 0.0


class Task:
    """One thread of a process."""

    def __init__(self, process: Process, name: str, body: Callable[[], None]) -> None:
        self.process = process
        self.name = name
        self.done = False
        self.starved_until = 0.0
        self.wake_at = 0.0
        self.condition: Callable[[], bool] | None = None
        self.turn = threading.Lock()
        self.turn.acquire()
        self.body = body


class World:
    """Clock, dice and tasks of one history."""

    def __init__(self, seed: int, horizon_s: float) -> None:
        self.dice = random.Random(seed)
        self.now = 0.0
        self.over = False
        self.errors: list[str] = []
        self._horizon_s = horizon_s
        self._tasks: list[Task] = []
        self._threads: list[threading.Thread] = []
        self._happenings: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._finished = threading.Lock()
        self._finished.acquire()
        self._current: Task | None = None

    def spawn(self, process: Process, name: str, body: Callable[[], None]) -> Task:
        task = Task(process, name, body)
        self._tasks.append(task)
        thread = threading.Thread(target=self._live, args=(task,), daemon=True)
        self._threads.append(thread)
        thread.start()
        return task

    def at(self, when: float, happening: Callable[[], None]) -> None:
        """Let something happen that needs no thread."""
        self._count += 1
        heapq.heappush(self._happenings, (max(when, self.now), self._count, happening))

    def run(self) -> None:
        """Live until the horizon, or until nothing can happen any more."""
        self._hand_on(None)
        self._finished.acquire()
        self.over = True
        for task in self._tasks:
            if not task.done:
                task.turn.release()
        for thread in self._threads:
            thread.join(20)

    def finish(self) -> None:
        """There is nothing more to see."""
        self._horizon_s = self.now

    # --- called by tasks

    def sleep(self, seconds: float) -> None:
        self.wait(None, seconds)

    def wait(self, condition: Callable[[], bool] | None, timeout_s: float | None) -> bool:
        """Hand the turn on until the condition holds or the time is over; return whether it holds."""
        if self.over:
            raise Over
        task = self._current
        assert task is not None, "only tasks wait"
        task.condition = condition
        task.wake_at = float("inf") if timeout_s is None else self.now + timeout_s
        self._hand_on(task)
        return condition is None or condition()

    def hiccup(self) -> None:
        """A place where a thread may lose the processor: mostly for a moment, sometimes for long."""
        self.sleep(self.dice.choice((0.0, 0.0, 0.0, 0.00005, 0.0005)) if self.dice.random() < 0.97 else self._long())

    def _long(self) -> float:
        return self.dice.choice((0.005, 0.05, 0.15, 0.6))

    # --- whose turn it is

    def _live(self, task: Task) -> None:
        task.turn.acquire()
        try:
            if not self.over:
                task.body()
        except Over:
            pass
        except BaseException:  # noqa: BLE001 - whatever it is, it belongs to the history
            self.errors.append(f"{task.process.name}/{task.name}: {traceback.format_exc()}")
        task.done = True
        if not self.over:
            self._tasks.remove(task)
            self._hand_on(task)

    def _hand_on(self, task: Task | None) -> None:
        chosen = self._next()
        self._current = chosen
        if chosen is task and task is not None:
            return
        (chosen.turn if chosen is not None else self._finished).release()
        if task is not None and not task.done:
            task.turn.acquire()
            if self.over:
                raise Over

    def _next(self) -> Task | None:
        while True:
            while self._happenings and self._happenings[0][0] <= self.now:
                heapq.heappop(self._happenings)[2]()
            able = [task for task in self._tasks if self._can_run(task)]
            if able:
                return able[0] if len(able) == 1 else self.dice.choice(able)
            following = min((self._wakes(task) for task in self._tasks), default=float("inf"))
            if self._happenings:
                following = min(following, self._happenings[0][0])
            if following > self._horizon_s:
                return None
            self.now = following

    def _can_run(self, task: Task) -> bool:
        process = task.process
        if not process.alive or max(process.stopped_until, task.starved_until) > self.now:
            return False
        return task.wake_at <= self.now or (task.condition is not None and task.condition())

    def _wakes(self, task: Task) -> float:
        if not task.process.alive:
            return float("inf")
        held = max(task.process.stopped_until, task.starved_until)
        if held > self.now and task.condition is not None and task.condition():
            return held
        return max(task.wake_at, held)


def world() -> World:
    return _worlds[-1]


class Event:
    """`threading.Event`, as far as it is used."""

    def __init__(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        world().hiccup()

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        return self._set or world().wait(self.is_set, timeout)


class Lock:
    """`threading.Lock`."""

    def __init__(self) -> None:
        self._held = False

    def acquire(self, timeout: float = -1.0) -> bool:
        if self._held and not world().wait(lambda: not self._held, None if timeout < 0 else timeout):
            return False
        self._held = True
        return True

    def release(self) -> None:
        self._held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    async def __aenter__(self) -> None:
        self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.release()


class Queue:
    """`queue.SimpleQueue`."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)

    def get(self, timeout: float | None = None) -> Any:
        if not self._items:
            world().wait(lambda: bool(self._items), timeout)
        if not self._items:
            raise queue.Empty
        return self._items.popleft()


class Thread:
    """`threading.Thread`, for what is started in the background."""

    def __init__(self, *, target: Callable[[], None], name: str = "thread", daemon: bool = True) -> None:
        self._target = target
        self._name = name
        self._task: Task | None = None

    def start(self) -> None:
        current = world()._current
        assert current is not None
        self._task = world().spawn(current.process, self._name, self._target)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done

    def join(self, timeout: float | None = None) -> None:
        world().wait(lambda: not self.is_alive(), timeout)


class Threading:
    Event, Lock, Thread = Event, Lock, Thread

    @staticmethod
    def get_ident() -> int:
        return 0  # of no thread: there is no `Join` in here


class Queues:
    SimpleQueue, Empty = Queue, queue.Empty


class Time:
    """The module `time`."""

    @staticmethod
    def monotonic() -> float:
        return world().now

    perf_counter = monotonic

    @staticmethod
    def time() -> float:
        return WALL + world().now

    @staticmethod
    def sleep(seconds: float) -> None:
        world().sleep(seconds)


class Asyncio:
    """The part of `asyncio` that the hub's desk uses; a coroutine here runs as a task and waits as tasks do."""

    Lock, Task = Lock, Any

    @staticmethod
    async def to_thread(function: Callable[..., Any], *given: Any) -> Any:
        world().hiccup()
        result = function(*given)
        world().hiccup()
        return result

    @staticmethod
    def create_task(coroutine: Coroutine[Any, Any, None]) -> "Asyncio.Running":
        current = world()._current
        assert current is not None
        world().spawn(current.process, "writing", lambda: drive(coroutine))
        return Asyncio.Running()

    class Running:
        def add_done_callback(self, _: object) -> None:
            """Nobody waits for it here."""


def drive(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine whose awaits all wait as tasks do."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("it awaited what this simulation does not know")


@contextlib.contextmanager
def simulated(world_: World, *modules: Any) -> Iterator[World]:
    """Give modules the simulated time, threads, queues and asyncio in place of their own."""
    ours = {"threading": Threading, "time": Time, "queue": Queues, "asyncio": Asyncio}
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, stand_in in ours.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, stand_in))
        _worlds.append(world_)
        try:
            yield world_
        finally:
            _worlds.pop()
