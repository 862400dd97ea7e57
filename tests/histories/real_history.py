"""Real histories: real ranks under torchrun, real hubs, the real client, signals and a cut line; judged as all are."""

import asyncio
import contextlib
import json
import os
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import psutil
from attempts import Begun, Seen, Trained, commands_in
from history import Applied, Fate, History, RankRecord, Told, problems

from jobs import Job
from trainctl.client.connection import Connection
from trainctl.client.discover import hub_cards, own_keys
from trainctl.client.errors import ClientError
from trainctl.client.live import LiveSession
from trainctl.wire.commands import (
    FINAL_COMMAND_STATES,
    Action,
    AddNote,
    Cancel,
    CheckpointSave,
    Evaluate,
    LrRelease,
    LrScale,
    LrSet,
    Pause,
    Resume,
    Rollback,
    SetTunable,
    Stop,
)
from trainctl.wire.messages import Card, Snapshot
from waiting import until

ANSWER_S = 30.0
_AT_REST_S = 10.0
T = TypeVar("T")


class Line:
    """A TCP line to the hub that can be cut: then nothing gets through, and nobody is told."""

    def __init__(self, target: Callable[[], Card | None]) -> None:
        self._target = target
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def cut(self, for_s: float) -> None:
        self._open.clear()
        await asyncio.sleep(for_s)
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        card = self._target()
        if card is None:
            writer.close()
            return
        host, port = card.addresses[0].removeprefix("tcp://").rsplit(":", 1)
        try:
            there, back = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        self._writers.append(back)
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._carry(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                await self._open.wait()
                sink.write(data)
                await sink.drain()
        sink.close()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(OSError):  # the other end was killed
                await writer.wait_closed()


class RealOperator:
    """Somebody with the client library; what was heard is written down in order."""

    def __init__(self, name: str, session: LiveSession) -> None:
        self.name = name
        self.told: list[Told] = []
        self.heard = asyncio.Event()  # set whenever there is something new
        self._session = session

    async def act(self, action: Action, command_id: str, **more: Any) -> str:
        """Send one command and return its outcome as this operator heard it; "" when it was certainly not taken."""
        state = ""
        try:
            async for update in self._session.do(action, command_id=command_id, timeout_s=ANSWER_S, **more):
                by_itself = str(update.reason).startswith(("no outcome", "command id"))
                own = by_itself and update.state in {"unknown", "conflict"}
                state = update.state
                applied = state == "applied"
                self.told.append(
                    Told(
                        operator=self.name,
                        id=update.id,
                        state=state,
                        step=update.step if applied else None,
                        after=update.after,
                        own=own,
                        incarnation=update.incarnation if applied else None,
                    )
                )
                self.heard.set()
        except ClientError:
            pass  # no hub at the moment, and nothing was sent
        return state

    async def look(self) -> Snapshot | None:
        """What the hub shows of the run, None where there is no hub at the moment."""
        try:
            return await self._session.picture()
        except ClientError:
            return None


class RealScene:
    """A job and its operators. `episode` plays one history; `judge` looks at all that happened so far."""

    def __init__(self, job: Job, seed: int) -> None:
        self.job = job
        self.dice = random.Random(seed)
        self.operators: list[RealOperator] = []
        self.story: list[str] = []
        self.sent: dict[str, tuple[Action, dict[str, Any]]] = {}
        self.seen: list[Seen] = []
        self.checkpoints: dict[str, int] = {}
        self._sessions: list[LiveSession] = []
        self._line = Line(self._card)
        self._count = 0

    async def __aenter__(self) -> Self:
        address = await self._line.start()

        def through_the_line() -> Card | None:
            card = self._card()
            return msgspec.structs.replace(card, addresses=[address]) if card is not None else None

        for name, card in (("mk", self._card), ("jo", self._card), ("far", through_the_line)):
            connection = Connection(card, own_keys(), name)
            self._sessions.append(LiveSession(connection))
            self.operators.append(RealOperator(name, self._sessions[-1]))
        return self

    async def __aexit__(self, *_: object) -> None:
        for session in self._sessions:
            await session.close()
        await self._line.close()

    def _card(self) -> Card | None:
        return next(iter(hub_cards().values()), None)

    async def episode(self) -> None:
        """A few commands and at most one fault, at random moments; then whatever is paused goes on."""
        works: list[Awaitable[None]] = [self._later(self._command()) for _ in range(self.dice.randint(2, 5))]
        if self.dice.random() < 0.7:
            works.append(self._later(self._fault()))
        await asyncio.gather(*works)
        await self.go_on()

    async def go_on(self) -> None:
        """Whatever paused the run, it goes on."""
        for _ in range(20):
            self._count += 1
            # Rejected: it is not paused (any more).
            if await self.operators[0].act(Resume(), f"go{self._count}") in {"applied", "rejected"}:
                return
            if self.job.ended():
                raise AssertionError(f"the job ended: {self.story[-5:]}\n{self.job.log()[-4000:]}")
        raise AssertionError("nobody can tell whether the run is paused")

    async def _later(self, work: Awaitable[T]) -> T:
        await asyncio.sleep(self.dice.uniform(0.0, 0.5))
        return await work

    async def _command(self) -> None:
        self._count += 1
        command_id, dice = f"c{self._count}", self.dice
        actions: list[Action] = [
            *(SetTunable(name="x", value=float(self._count)),) * 6,
            *(LrScale(factor=0.9), LrSet(value=1e-3 / self._count), LrRelease()),
            *(Pause(for_s=0.3), Pause(), Resume(), Resume()),
            *(CheckpointSave(), Rollback(target="last"), Evaluate(), AddNote(text="so it is")),
            Cancel(command=f"c{max(1, self._count - 1)}"),
        ]
        action = dice.choice(actions)
        more: dict[str, Any] = {}
        if dice.random() < 0.15:
            more["condition"] = dice.choice(("step >= 0", "step < 0"))
        if dice.random() < 0.15:
            more["expires_s"] = dice.uniform(0.05, 1.0)
        if isinstance(action, SetTunable) and dice.random() < 0.2:
            more["revert_after"] = dice.randint(1, 5)
        several = dice.sample(self.operators, 2 if dice.random() < 0.2 else 1)
        self.sent[command_id] = (action, more)
        self.story.append(f"{[operator.name for operator in several]} {command_id} {action} {more}")
        await asyncio.gather(*(operator.act(action, command_id, **more) for operator in several))

    async def _fault(self, only: Sequence[str] = ()) -> None:
        """One of those that there are, or of `only` these."""
        dice = self.dice
        for_s = dice.choice((0.05, 0.3, 1.5))
        kinds = list(only or ("kill the hub", "stop the hub", "stop a rank", "stop a rank", "cut the line"))
        store_line = self.job.output / "store-line.pid"
        kind = dice.choice([*kinds, *(["cut rank 1 from the store"] * 5 if store_line.exists() else [])])
        self.story.append(f"{kind} for {for_s} s")
        if kind == "cut the line":
            await self._line.cut(for_s)
            return
        card = self._card()
        if kind == "cut rank 1 from the store":
            victim = int(store_line.read_text())
        elif kind == "stop a rank":
            victim = dice.choice(self.rank_pids() or [0])
        else:
            victim = card.pid if card is not None else 0
        with contextlib.suppress(ProcessLookupError):
            if victim and kind == "kill the hub":
                os.kill(victim, signal.SIGKILL)
            elif victim:
                os.kill(victim, signal.SIGSTOP)
                await asyncio.sleep(for_s)
                os.kill(victim, signal.SIGCONT)

    def rank_pids(self) -> list[int]:
        """The ranks' processes: those below the launcher that run the script, and do not start it."""
        found = []
        for child in psutil.Process(self.job.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = " ".join(child.cmdline())
                if "steered.py" in words and "torch.distributed.run" not in words:
                    found.append(child.pid)
        return found

    async def kill_a_rank(self) -> None:
        """Commands under way and one rank gone, of whatever number: torchrun ends the others."""
        victim = self.dice.choice(self.rank_pids())
        self.story.append(f"kill pid {victim}")
        works = [self._later(self._command()) for _ in range(4)]

        async def kill() -> None:
            os.kill(victim, signal.SIGKILL)

        await asyncio.gather(*works, self._later(kill()))
        await asyncio.to_thread(self.job.wait, 60)

    def settled(self) -> bool:
        """Whether everything that was accepted has its outcome in the audit log."""
        lines = (self.job.directory / "audit.jsonl").read_text().splitlines()
        return all(state in FINAL_COMMAND_STATES for state in _outcomes(lines).values())

    async def stop(self) -> None:
        for number in range(20):
            if await self.operators[0].act(Stop(), f"stop{number}") == "applied":
                return
        raise AssertionError("the job does not stop")

    def judge(self, *, ended: bool, killed: bool = False) -> list[str]:
        """The verdict on everything so far. Only between episodes, when nothing is under way."""
        fate: Fate = "died" if killed else "left" if ended else "lives"
        lines = (self.job.directory / "audit.jsonl").read_text().splitlines()
        told = [told for operator in self.operators for told in operator.told]
        return problems(
            History(
                ranks=self._records(fate),
                told=told,
                audit=lines,
                outcomes=_outcomes(lines),
                reasons={entry["id"]: str(entry.get("reason")) for entry in map(json.loads, lines)},
                complete=ended,
                commands=commands_in(lines),
                initial={"x": 0.0, "lr": 1e-3},
                seen=self.seen,
                checkpoints=self.checkpoints,
            )
        )

    def _records(self, fate: Fate) -> list[RankRecord]:
        """Of all ranks at one moment: the undoing of a change may come between the reading of two."""
        ranks = range(self.job.ranks)

        def at_rest() -> list[RankRecord] | None:
            found = [self._record(rank, fate) for rank in ranks]
            now = {len(self.lines(f"applied-{rank}")) for rank in ranks}
            return found if now == {len(record.applied) for record in found} and len(now) == 1 else None

        try:
            found = until(at_rest, _AT_REST_S) if fate == "lives" else None
        except AssertionError:
            found = None  # they do not come to be alike, which the rules will say
        return found or [self._record(rank, fate) for rank in ranks]

    def _record(self, rank: int, fate: Fate) -> RankRecord:
        trained = [
            Trained(**{key: line[key] for key in ("step", "attempt", "incarnation", "time")}, values=_values(line))
            for line in self.job.lines(rank)
        ]
        applied = [Applied(**line) for line in self.lines(f"applied-{rank}")]
        return RankRecord(rank=rank, applied=applied, fate=fate, begun=self.begun(rank), trained=trained)

    def begun(self, rank: int) -> list[Begun]:
        """The attempts that a rank has begun."""
        return [Begun(**line) for line in self.lines(f"begun-{rank}")]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What the script wrote down, whole lines only."""
        path = self.job.output / f"{name}.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _values(line: dict[str, Any]) -> dict[str, float]:
    return {name: line[name] for name in ("x", "lr")}


def _outcomes(lines: list[str]) -> dict[str, str]:
    """The newest state of each command in the audit log; the first outcome that is known stands."""
    found: dict[str, str] = {}
    for line in lines:
        entry = json.loads(line)
        if entry["state"] == "gap":
            continue  # it tells of lines that come late, and is of no command
        if found.get(entry["id"]) not in FINAL_COMMAND_STATES - {"unknown"}:
            found[entry["id"]] = entry["state"]
    return found


async def play(
    job: Job, seed: int, episodes: int, *, kill: bool = False, say: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Play episodes on a running job, stop it, and return what is inconsistent, with the story behind it.

    `kill`: it is not stopped: one of its ranks is killed while commands are under way.
    """
    async with RealScene(job, seed) as scene:
        for number in range(episodes):
            began = len(scene.story)
            await scene.episode()
            if found := scene.judge(ended=False):
                return [f"seed {seed}, episode {number}", *found, *scene.story[began:]]
            say(f"seed {seed}, episode {number}: {'; '.join(scene.story[began:])}")
        if kill:
            await scene.kill_a_rank()
            await asyncio.to_thread(until, scene.settled, 60, what="outcomes of what was under way")
            found = scene.judge(ended=True, killed=True)
            return [f"seed {seed}, a rank is killed", *found, *scene.story] if found else []
        await scene.stop()
        code = await asyncio.to_thread(job.wait, 60)
        found = scene.judge(ended=True)
        if code != 0:
            found.append(f"the job ended with {code}: {job.log()[-2000:]}")
        return [f"seed {seed}", *found, *scene.story] if found else []


def run_job(
    seed: int, ranks: int, output: Path, episodes: int, *, store_line: bool = False, **options: Any
) -> list[str]:
    """Start a job, play, and clean up. `store_line`: rank 1's line to the job's store is cut now and then."""
    job = Job("steered.py", ranks, output, ["--sleep", "0.005", *(["--store-line"] if store_line else [])])
    try:
        job.until_step(3)
        return asyncio.run(play(job, seed, episodes, **options))
    finally:
        job.close()
