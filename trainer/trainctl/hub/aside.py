"""Work on files that may never answer (a hung network file system), done beside the hub's loop."""

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class StillBusy(Exception):
    """What was asked before has not answered yet; `for_s` says for how long."""

    def __init__(self, for_s: float) -> None:
        super().__init__(f"no answer for {for_s:.0f} s")
        self.for_s = for_s


class Aside(Generic[T]):
    """One kind of work, at most one of it at a time, each in a daemon thread: one that hangs costs a thread and does
    not keep the hub from leaving, as the loop's own executor would."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._running: asyncio.Future[T] | None = None
        self._began = 0.0

    async def run(self, patience_s: float) -> T:
        """The work's result; what it raises is raised here. Raises `StillBusy` when it takes longer than that: the
        next call asks for the same result again."""
        loop = asyncio.get_running_loop()
        if self._running is None:
            self._began = loop.time()
            self._running = loop.create_future()
            threading.Thread(target=self._do, args=(loop, self._running), daemon=True, name="hub-aside").start()
        running = self._running
        done, _ = await asyncio.wait({running}, timeout=patience_s)
        if not done:
            raise StillBusy(loop.time() - self._began)
        self._running = None
        return running.result()

    def _do(self, loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[T]") -> None:
        result: T | None = None
        failure: Exception | None = None
        try:
            result = self._work()
        except Exception as error:  # noqa: BLE001 - raised again by `run`, in the loop's thread
            failure = error

        def settle() -> None:
            if answer.cancelled():
                return
            if failure is not None:
                answer.set_exception(failure)
            else:
                answer.set_result(result)  # type: ignore[arg-type]

        try:
            loop.call_soon_threadsafe(settle)
        except RuntimeError:
            return  # the loop is closed: nobody waits for the answer any more
