"""Rank 0 comes, speaks, goes in order, dies, or comes back."""

import asyncio
import contextlib
import logging
import time
from pathlib import Path

from trainctl.hub.agents import AgentRelay
from trainctl.hub.board import RunBoard
from trainctl.hub.desk import CommandDesk
from trainctl.hub.endings import Endings
from trainctl.hub.health import Health
from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.left_behind import LeftBehind
from trainctl.hub.link import LinkListener, RankLine, RankLink
from trainctl.hub.names import NameLimit
from trainctl.hub.ownership import Ownership
from trainctl.hub.recorder import Recorder
from trainctl.hub.roll_call import RollCall
from trainctl.hub.starts_again import StartsAgain
from trainctl.wire.messages import (
    CommandUpdate,
    FromRank,
    LinkAck,
    LinkAgents,
    LinkBye,
    LinkHello,
    LinkInfo,
    LinkProgress,
    LinkRecord,
    LinkWelcome,
    Ranks,
    Rows,
    RunState,
)

log = logging.getLogger(__name__)

_HELLO_S = 5.0
_RELINK_S = 2.0
_DRAIN_S = 0.3
_LAST_WORDS_S = 3.0
_TURN_S = 0.02
_COMES_BACK_S = 10.0
_RESTARTS_S = 300.0  # a big job takes its time to be scheduled, to meet and to import


class Attendance:
    """Accepts rank 0's connections, one at a time, and acts on what it says."""

    def __init__(
        self,
        *,
        run_id: str,
        directory: Path,
        line: RankLine,
        recorder: Recorder,
        keeper: JournalKeeper,
        ownership: Ownership,
        board: RunBoard,
        desk: CommandDesk,
        agents: AgentRelay,
        endings: Endings,
        starts_again: StartsAgain,
        roll_call: RollCall,
        health: Health,
    ) -> None:
        self._run_id = run_id
        self._line = line
        self._recorder = recorder
        self._record = recorder.record
        self._keeper = keeper
        self._ownership = ownership
        self._board = board
        self._desk = desk
        self._agents = agents
        self._endings = endings
        self._starts_again = starts_again
        self._roll_call = roll_call
        self._names = NameLimit(self._record.metrics.names)
        self._names_told = False
        self._health = health
        self.left = LeftBehind(
            directory=directory, record=self._record, board=board, take=self._take_record, end=self._take_bye
        )
        self._session_now: asyncio.Task[None] | None = None  # the one that was welcomed last
        self._giving_up: asyncio.Task[None] | None = None
        self.idle_since = time.monotonic()

    async def serve(self, listener: LinkListener) -> None:
        """Take connections until cancelled."""
        await self.left.bring()
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(self._session(await listener.accept()))

    @property
    def patience_s(self) -> float:
        """How long after rank 0 went it, or the next one, may come without being given up."""
        return _RESTARTS_S if self.awaits_attempt else _COMES_BACK_S

    @property
    def awaits_attempt(self) -> bool:
        """Whether an operator ended the last attempt so that another one begins."""
        return self._endings.of(self._board.state.attempt) is not None and not self._board.life.ended

    def acknowledge(self, link: int, attempt: int) -> None:
        """Everything up to `link` is on disk."""
        if link and attempt == self._line.attempt:
            self._line.send(LinkAck(link=link))

    def tick(self, wall: float, now: float) -> None:
        """Time went by, with or without rank 0."""
        life = self._board.life
        self._roll_call.tick(now, linked=self._line.linked)
        if self._line.linked:
            self._board.become(life.tick(wall, now))
            return
        gone = not life.ended and now - self.idle_since > self.patience_s
        if gone and (self._giving_up is None or self._giving_up.done()):
            self._giving_up = asyncio.create_task(self._give_up())

    async def _give_up(self) -> None:
        """Nobody came back: say how the run ended, as far as anybody wrote that down."""
        await self.left.bring()
        if self._line.linked or self._board.life.ended or self._board.state.attempt == 0:
            return
        ending = self._endings.of(self._board.state.attempt)
        # Without an ending this hub was started again, and rank 0 went meanwhile.
        if ending is None and (told := self._endings.preempted(self._board.state.attempt)) is not None:
            self._desk.rank_gone(told, ended=False)
            return
        reason = "rank 0 did not come back to the hub"
        if ending is not None:
            reason = f"{ending.reason}: no new attempt came within {self.patience_s:.0f} s"
        self._board.become(self._board.life.lost(reason, time.time()))
        self._desk.rank_gone(reason, ended=False)

    # --- one connection

    async def _session(self, link: RankLink) -> None:
        try:
            hello = await self._hello(link)
            if hello is None:
                return
            ended = link.watch(hello.pid)
            await self._listen(link, ended)
            if self._line.link is link:
                await self._left(link, hello, ended)
        finally:
            link.stop_watching()
            link.close()

    async def _hello(self, link: RankLink) -> LinkHello | None:
        try:
            async with asyncio.timeout(_HELLO_S):
                message = await link.receive()
        except TimeoutError:
            return None
        if not isinstance(message, LinkHello) or message.info.id != self._run_id:
            return None  # another hub that looks whether one is here, or a stranger to this run
        if message.info.attempt > self._line.attempt:
            await self._end_the_one_before(message.info.attempt)
        if message.info.attempt < self._line.attempt:
            log.warning("rank 0 of attempt %d came after that of %d", message.info.attempt, self._line.attempt)
            return None
        if not self._ownership.held():
            return None
        self._welcome(link, message)
        return message

    async def _end_the_one_before(self, attempt: int) -> None:
        """A new attempt waits until all is read that the one before sent, and left, while this hub did not run."""
        before, link = self._session_now, self._line.link
        deadline, read = time.monotonic() + _LAST_WORDS_S, -1
        # One that says nothing more has said its last, although its process may live: stopped, or hung.
        while before and link and not before.done() and read != link.received and time.monotonic() < deadline:
            read = link.received
            await asyncio.wait({before}, timeout=_DRAIN_S)
        await self.left.bring(attempt - 1)

    def _welcome(self, link: RankLink, hello: LinkHello) -> None:
        if self._line.link is not None:
            self._line.link.close()
        attempt = hello.info.attempt
        known = self._board.knows(attempt)
        self._keeper.begin_attempt(attempt)
        self._line.link, self._line.attempt = link, attempt
        self._session_now = asyncio.current_task()
        self._starts_again.learn(hello.pid)
        self._board.take_info(self._starts_again.told_of(hello.info))
        self._roll_call.begin(hello.info)
        have, unwritten = self._record.link_have(attempt), self._keeper.unwritten_link()
        # What only our memory holds would go with us: rank 0 keeps it, and what it sends twice is taken once.
        have = have if unwritten is None else min(have, unwritten - 1)
        link.send(LinkWelcome(epoch=self._ownership.epoch, have=have))
        self._health.tell()
        self._desk.rank_came(new_attempt=not known)
        if not known:
            self._board.begin(hello)
        log.info("rank 0 (pid %d) of attempt %d is linked at step %d", hello.pid, attempt, hello.step)

    async def _listen(self, link: RankLink, ended: asyncio.Event | None) -> None:
        """Act on what rank 0 says until the link closes or the process ends."""
        reading = asyncio.create_task(self._read(link))
        tasks: list[asyncio.Task[object]] = [reading]
        if ended is not None:
            tasks.append(asyncio.create_task(ended.wait()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            # Dead, but what it sent last may be unread, megabytes where this hub stood still; and a forked worker may
            # keep the socket open for long.
            read = -1
            while not reading.done() and read != link.received:
                read = link.received
                await asyncio.wait({reading}, timeout=_DRAIN_S)
            if reading.done():
                reading.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _left(self, link: RankLink, hello: LinkHello, ended: asyncio.Event | None) -> None:
        """The link is over. A rank 0 that still lives has a moment to come back."""
        link.close()
        if ended is not None and not self._board.life.ended:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RELINK_S):
                    await ended.wait()
            if self._line.link is not link:
                return
        self._line.link = None
        self.idle_since = time.monotonic()
        log.info("rank 0 (pid %d) is not linked any more", hello.pid)
        await self.left.bring(hello.info.attempt)
        if self._line.linked or self._board.life.ended:
            return
        if (ending := self._endings.of(hello.info.attempt)) is not None:
            self._endings.become(ending)
            self._desk.rank_gone(f"{ending.reason}: whether this was applied is not known", ended=False)
            return
        if (reason := self._endings.preempted(hello.info.attempt)) is not None:
            self._desk.rank_gone(f"{reason}: whether this was applied is not known", ended=False)
            return
        died = ended is None or ended.is_set()
        why = "died without a word" if died else "closed its link and did not come back"
        reason = f"rank 0 (pid {hello.pid} on {hello.info.host}) {why}"
        self._board.become(self._board.life.lost(reason, time.time()))
        self._desk.rank_gone(f"{reason}: whether this was applied is not known", ended=False)

    async def _read(self, link: RankLink) -> None:
        turn_ends = time.monotonic() + _TURN_S
        while (message := await link.receive()) is not None and self._line.link is link:
            try:
                self._take(message)
            except Exception:  # one message that cannot be acted on must not end the hub, nor the run's history
                log.exception("a %s of rank 0 could not be acted on", type(message).__name__)
            if time.monotonic() > turn_ends:
                # A link that always has something to read never waits, and would keep everybody else from working.
                await asyncio.sleep(0)
                turn_ends = time.monotonic() + _TURN_S

    def _take(self, message: FromRank) -> None:
        self._roll_call.heard()
        match message:
            case LinkRecord():
                self._take_record(message, self._line.attempt, live=True)
            case LinkProgress(run=run):
                self._board.become(self._board.life.progress(run, time.time(), time.monotonic()))
            case LinkInfo(info=info):
                self._board.take_info(self._starts_again.told_of(info))
            case LinkAgents(agents=agents):
                self._agents.follow(agents)
            case LinkBye():
                self._take_bye(message, self._line.attempt, time.time())
            case LinkHello():
                log.warning("rank 0 said hello twice")

    def _take_bye(self, bye: LinkBye, attempt: int, at: float, run: RunState | None = None) -> None:
        """Rank 0 ended in order, `at` Unix time; `run` is its last word on itself, where that did not come yet."""
        if (ending := self._endings.overrules(bye, attempt)) is not None:
            self._endings.become(ending)
            self._desk.rank_gone(ending.reason, ended=True)
            return
        self._board.become(self._board.life.bye(bye, at, run))
        self._desk.rank_gone(f"the run is {self._board.state.state}", ended=True)

    def _take_record(self, message: LinkRecord, attempt: int, *, live: bool = False) -> None:
        """Record what is new. Not `live` is what a rank 0 left that is gone: nobody is judged by it any more."""
        if message.link <= self._record.link_have(attempt):
            return  # sent again, to be sure
        body = message.body
        if isinstance(body, Ranks) and live:
            body = self._roll_call.judged(body)
        elif isinstance(body, Rows):
            body = self._admitted(body)
        elif isinstance(body, CommandUpdate):
            self._desk.hear(body, attempt=attempt, link=message.link)
            return
        if self._recorder.take(body, attempt=attempt, link=message.link) is None:
            return
        if isinstance(message.body, Rows) and message.body.steps:
            self._board.life.advanced(message.body.steps[-1], message.body.times[-1], message.body.incarnation)

    def _admitted(self, rows: Rows) -> Rows:
        """What is recorded of rows whose names may be too many."""
        admitted = self._names.admitted(rows)
        if not self._names_told and (complaint := self._names.complaint()) is not None:
            self._names_told = True
            self._board.anomaly("metrics", complaint, "warning")
        return admitted
