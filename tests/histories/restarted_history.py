"""Real histories of a run that is started again: a rank is killed, an operator asks for a restart, one aborts it."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from attempts import Begun, Seen
from real_history import RealScene

from jobs import Job
from trainctl.wire.commands import Abort, Restart
from trainctl.wire.manifest import list_checkpoints
from trainctl.wire.messages import Snapshot
from waiting import until

T = TypeVar("T")

PATIENCE_S = 90.0  # torchrun gives the ranks that are left 30 s before it kills them


class RestartedScene(RealScene):
    """A job under `trainctl run`, with commands under way whenever an attempt ends."""

    async def killed(self) -> None:
        """A rank is killed, and torchrun starts the next attempt."""
        before = self.newest()

        async def kill() -> None:
            await self._in_the_middle()
            victim = self.dice.choice(self.rank_pids())
            self.story.append(f"kill pid {victim}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)

        await self._amid_commands(kill())
        await self._goes_on(lambda: self._everybody(lambda one: one.attempt > before))

    async def restarted(self) -> None:
        """An operator has the run started again, from the last checkpoint or from any other."""
        known = list_checkpoints(self.job.directory / "checkpoints")
        self.checkpoints |= {info.id: info.step for info in known}
        target = self.dice.choice(["last", *(info.id for info in known if info.verified is not False)])
        name = await self._amid_commands(self._insist(lambda: Restart(target=target)))
        told = await asyncio.to_thread(
            until, lambda: self._applied_at(name), 30, what=f"the audit log's line of {name}"
        )
        await self._goes_on(lambda: self._everybody(lambda one: one.time > told))

    async def aborted(self) -> None:
        """An operator ends it at once."""
        await self._amid_commands(self._insist(lambda: Abort(now=True)), kinds=("stop a rank", "cut the line"))
        await asyncio.to_thread(self.job.wait, 60)
        await asyncio.to_thread(until, self.settled, 60, what="outcomes of what was under way")

    async def say_again(self) -> None:
        """Ids of before are sent once more, as a client does that never heard what became of them."""
        ids = self.dice.sample(sorted(self.sent), min(4, len(self.sent)))
        self.story.append(f"once more {ids}")
        for name in ids:
            action, more = self.sent[name]
            await self.dice.choice(self.operators).act(action, name, **more)
        await self.go_on()

    async def _amid_commands(self, end: Awaitable[T], kinds: tuple[str, ...] = ()) -> T:
        works: list[Awaitable[None]] = [self._later(self._command()) for _ in range(self.dice.randint(2, 5))]
        if self.dice.random() < 0.5:
            works.append(self._later(self._fault(kinds)))
        ended, *_ = await asyncio.gather(self._later(end), *works)
        return ended

    async def _in_the_middle(self) -> None:
        """Often wait for the moment at which a command is under way: it takes milliseconds."""
        operator, for_s = self.dice.choice(self.operators), self.dice.uniform(0.0, 0.02)
        if self.dice.random() < 0.7:
            operator.heard.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(operator.heard.wait(), 1.0)
            await asyncio.sleep(for_s)

    async def _insist(self, wish: Callable[[], Restart | Abort]) -> str:
        """Until it is done: nobody can rely on one that is unknown, or that clashed with another. Its id."""
        for _ in range(60):
            self._count += 1
            operator = self.dice.choice(self.operators)
            name = f"e{self._count}"
            state = await operator.act(wish(), name)
            self.story.append(f"{operator.name} {name} {wish()}: {state}")
            if state == "applied" or self.job.ended():
                return name
            await asyncio.sleep(0.5)  # between two tries of somebody who does not give up
        raise AssertionError(f"it is not done: {self.story[-5:]}")

    async def _goes_on(self, begun: Callable[[], bool]) -> None:
        """The next attempt is there, everybody sees it, it trains, and all of before has its outcome."""
        await asyncio.to_thread(until, begun, PATIENCE_S, what=f"the next attempt\n{self.job.log()[-3000:]}")
        await self._everybody_sees(lambda picture: picture.state.attempt >= self.newest())
        await self.go_on()
        await asyncio.to_thread(until, self._trains, PATIENCE_S, what="steps of the next attempt")
        await asyncio.to_thread(until, self.settled, 60, what="outcomes of what was under way")

    async def _everybody_sees(self, enough: Callable[[Snapshot], bool]) -> None:
        for operator in self.operators:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    picture = await operator.look()
                    if picture is not None:
                        self.seen.append(
                            Seen(operator=operator.name, run=picture.info.id, attempt=picture.state.attempt)
                        )
                        if enough(picture):
                            break
                    await asyncio.sleep(0.1)

    def _applied_at(self, name: str) -> float | None:
        """When the hub said so, on the clock that the ranks write down, too."""
        audit = [json.loads(line) for line in (self.job.directory / "audit.jsonl").read_text().splitlines()]
        return next((line["time"] for line in audit if (line["id"], line["state"]) == (name, "applied")), None)

    def newest(self) -> int:
        """The newest attempt that a rank began."""
        return max(one.attempt for rank in range(self.job.ranks) for one in self.begun(rank))

    def _everybody(self, holds: Callable[[Begun], bool]) -> bool:
        return all((begun := self.begun(rank)) and holds(begun[-1]) for rank in range(self.job.ranks))

    def _trains(self) -> bool:
        newest = self.newest()
        return all(
            sum(line["attempt"] == newest for line in self.job.lines(rank)[-3:]) == 3 for rank in range(self.job.ranks)
        )

    async def ended(self) -> list[str]:
        """What is not as it should be of a run that was aborted."""
        found = self.judge(ended=True, killed=True)
        await self._everybody_sees(lambda picture: picture.state.state == "stopped")
        if (code := self.job.wait(0)) != 1:
            found.append(f"trainctl run ended with {code}")
        return found


async def play(job: Job, seed: int, rounds: int, say: Callable[[str], None] = lambda _: None) -> list[str]:
    """In each round a rank is killed and an operator restarts, in any order; the last word is an abort."""
    async with RestartedScene(job, seed) as scene:
        for number in range(rounds):
            endings = scene.dice.sample([scene.killed, scene.restarted], 2)
            for part in (scene.episode, endings[0], scene.say_again, endings[1], scene.say_again):
                began = len(scene.story)
                await part()
                say(f"seed {seed}, round {number}, {part.__name__}: {'; '.join(scene.story[began:])}")
                if found := scene.judge(ended=False):
                    return [f"seed {seed}, round {number}, {part.__name__}", *found, *scene.story]
        await scene.aborted()
        found = await scene.ended()
        return [f"seed {seed}, aborted", *found, *scene.story] if found else []


def run_restarted(seed: int, ranks: int, output: Path, rounds: int = 1, **options: Any) -> list[str]:
    """Start a job under `trainctl run`, play, and clean up."""
    job = Job("steered.py", ranks, output, ["--sleep", "0.005", "--checkpoint-every", "100"], restarts=rounds)
    try:
        job.until_step(3)
        return asyncio.run(play(job, seed, rounds, **options))
    finally:
        job.close()
