"""`abort --now` and `restart`: the nodes' agents end the ranks of the present attempt, at no boundary.

Nothing is guessed: a rank counts as ended when the agent of its node says so. What cannot be reached is named, and the
outcome is *failed*, or *unknown* where the agent was asked and did not answer, or `trainctl run` was told to abort.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Final, Literal

from trainctl.hub.agents import AgentRelay
from trainctl.hub.board import RunBoard
from trainctl.hub.disk import Disk, DiskHangs
from trainctl.hub.starts_again import StartsAgain
from trainctl.wire.commands import Act, Command, CommandState, EndRanks, Restart
from trainctl.wire.endings import mark_ended, unmark_ended
from trainctl.wire.launcher import EndRequest, drop_request, request_ending, wait_until_taken
from trainctl.wire.manifest import list_checkpoints, pick
from trainctl.wire.messages import CommandRequest, LinkBye, RanksEnded, RunInfo
from trainctl.wire.peer import NoAnswer, Peer, PeerError
from trainctl.wire.preemption import read_preempted
from trainctl.wire.rundir import RunDir

log = logging.getLogger(__name__)

GRACE_S: Final = 10.0
_ANSWER_S: Final = GRACE_S + 10.0
_TAKEN_S: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class Ending:
    """An attempt that an operator ends without its ranks having a say."""

    what: Literal["abort", "restart"]
    attempt: int
    actor: str
    target: str

    @property
    def reason(self) -> str:
        if self.what == "abort":
            return f"aborted by {self.actor}"
        return f"restarting from {self.target} by {self.actor}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the command."""

    state: CommandState
    ranks: int | None = None
    after: str | None = None
    reason: str | None = None


@dataclass(kw_only=True)
class _Heard:
    """What the agents said, by node; `words` are sentences on what is not as it should be."""

    ended: dict[str, list[int]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    silent: bool = False

    @property
    def ranks(self) -> int:
        return sum(map(len, self.ended.values()))

    @property
    def text(self) -> str:
        return ", ".join(f"{_ranks(len(ranks))} on {node}" for node, ranks in sorted(self.ended.items()) if ranks)


class Endings:
    """Ends attempts and says why they ended, for as long as they are the newest."""

    def __init__(
        self, *, board: RunBoard, agents: AgentRelay, run_dir: RunDir, starts_again: StartsAgain, disk: Disk
    ) -> None:
        self._board = board
        self._agents = agents
        self._run_dir = run_dir
        self._disk = disk
        self._starts_again = starts_again
        self._ending: Ending | None = None
        self._busy = asyncio.Lock()

    def refusal(self, action: Act) -> str | None:
        """Why the command makes no sense now, or None."""
        return self._starts_again.refusal(action.target) if isinstance(action, Restart) else None

    def of(self, attempt: int) -> Ending | None:
        """The ending that explains why an attempt's ranks are gone, if an operator asked for it."""
        return self._ending if self._ending is not None and self._ending.attempt == attempt else None

    async def carry_out(self, command: Command, actor: str) -> Outcome:
        """End every rank of the present attempt. Takes as long as the agents' grace and some seconds at most."""
        async with self._busy:
            info = self._board.info
            ending, problem = await self._meant(command.action, actor, info)
            if problem is not None:
                return Outcome(state="failed", reason=problem)
            nodes = _nodes(info)
            peers, unreachable = await self._connect(list(nodes))
            try:
                return await self._end(command, ending, nodes, peers, unreachable)
            finally:
                for peer in peers.values():
                    peer.close()

    async def _meant(self, action: Act, actor: str, info: RunInfo) -> tuple[Ending, str | None]:
        if not isinstance(action, Restart):
            return Ending(what="abort", attempt=info.attempt, actor=actor, target=""), None
        ending = Ending(what="restart", attempt=info.attempt, actor=actor, target=action.target)
        if action.target == "last":
            return ending, None  # also where there is none yet: then it begins anew
        known = await asyncio.to_thread(list_checkpoints, self._run_dir.checkpoints)
        found = pick(known, action.target, info.best_by)
        if found is None:
            return ending, f"checkpoint {action.target} is gone; nothing was changed"
        return Ending(what="restart", attempt=info.attempt, actor=actor, target=found.id), None

    async def _connect(self, nodes: list[str]) -> tuple[dict[str, Peer], dict[str, str]]:
        found = await asyncio.gather(*(self._agents.connect(node) for node in nodes), return_exceptions=True)
        peers: dict[str, Peer] = {}
        unreachable: dict[str, str] = {}
        for node, peer in zip(nodes, found, strict=True):
            if isinstance(peer, Peer):
                peers[node] = peer
            elif isinstance(peer, PeerError | ValueError):
                unreachable[node] = str(peer)
            else:
                raise peer
        return peers, unreachable

    async def _end(
        self,
        command: Command,
        ending: Ending,
        nodes: dict[str, dict[int, int]],
        peers: dict[str, Peer],
        unreachable: dict[str, str],
    ) -> Outcome:
        missing = [
            f"{_ranks(len(nodes[node]))} on {node} cannot be ended: its agent does not answer ({why})"
            for node, why in sorted(unreachable.items())
        ]
        launched = self._starts_again.by_launcher
        if missing and (ending.what == "restart" or not peers) and not (launched and ending.what == "abort"):
            return Outcome(state="failed", reason=f"{'; '.join(missing)}; nothing was changed")
        self._begin(ending)
        untold = await self._tell_launcher(command, ending) if launched else None
        if untold is not None and ending.what == "restart":
            self._drop(ending)
            return Outcome(state="failed", reason=f"{untold}; nothing was changed")
        if untold is not None:
            missing.append(f"{untold}: it starts the ranks again where torchrun has --max-restarts left")
        heard = await self._ask(command, ending, nodes, peers)
        if heard.ranks == sum(map(len, nodes.values())):
            self._conclude(ending)
            return Outcome(state="applied", ranks=heard.ranks, after="; ".join([heard.text, *missing]))
        words = [*missing, *heard.words, *([f"{heard.text} ended"] if heard.text else [])]
        asked = bool(unreachable) and launched and untold is None
        if asked:
            words.append("trainctl run was told, and ends what it started")
        if not heard.ranks and not heard.silent and not launched:
            self._drop(ending)
        unsure = heard.silent or asked
        return Outcome(state="unknown" if unsure else "failed", ranks=heard.ranks, reason="; ".join(words))

    def _begin(self, ending: Ending) -> None:
        """From here on ranks may go, by torchrun's hand or the agents'; they are to know that it is an operator's."""
        self._ending = ending
        # Where the disk hangs a rank may not learn of it, and save: how it ended is told right all the same.
        self._disk.post(lambda: mark_ended(self._run_dir.path, ending.attempt))

    def _drop(self, ending: Ending) -> None:
        """Nothing came of it."""
        self._ending = None
        self._disk.post(lambda: unmark_ended(self._run_dir.path, ending.attempt))

    async def _tell_launcher(self, command: Command, ending: Ending) -> str | None:
        """Before the ranks are ended: otherwise torchrun would start them again in its own way. Why that failed, or
        None."""
        wish = EndRequest(
            what=ending.what,
            command=command.id,
            actor=ending.actor,
            attempt=ending.attempt,
            target=ending.target or "last",
        )
        directory = self._run_dir.path
        try:
            hosts = {place.node for place in self._board.info.ranks}
            told = await asyncio.to_thread(request_ending, directory, wish, hosts)
        except OSError as error:
            return f"trainctl run cannot be told ({error.strerror} in {directory})"
        if await asyncio.to_thread(wait_until_taken, told, _TAKEN_S) or ending.what == "abort":
            return None
        if await asyncio.to_thread(drop_request, told):
            return (
                f"trainctl run did not take the request within {_TAKEN_S:.0f} s (is it stopped? let it go on, or use "
                "abort --now)"
            )
        return None

    async def _ask(
        self, command: Command, ending: Ending, nodes: dict[str, dict[int, int]], peers: dict[str, Peer]
    ) -> _Heard:
        action = EndRanks(run=self._board.info.id, attempt=ending.attempt, grace_s=GRACE_S)
        request = CommandRequest(req=0, command=Command(id=command.id, action=action))
        answers = await asyncio.gather(
            *(peer.ask(request, RanksEnded, timeout_s=_ANSWER_S) for peer in peers.values()), return_exceptions=True
        )
        heard = _Heard()
        for node, answer in zip(peers, answers, strict=True):
            if isinstance(answer, RanksEnded):
                _add(heard, node, nodes[node], answer)
            elif isinstance(answer, PeerError):
                heard.silent = heard.silent or isinstance(answer, NoAnswer)
                heard.words.append(f"the agent of {node} did not say what became of its ranks: {answer}")
            else:
                raise answer
        return heard

    def _conclude(self, ending: Ending) -> None:
        """Every rank is gone: nothing that rank 0 had said before is to be waited for."""
        if self._board.info.attempt == ending.attempt and not self._board.life.ended:
            self.become(ending)

    def preempted(self, attempt: int) -> str | None:
        """Why `trainctl run` ended the ranks, if the machine was taken away before they reached a boundary.

        While the disk hangs nobody knows, and None is said.
        """
        try:
            told = self._disk.do(lambda: read_preempted(self._run_dir.path, attempt))
        except DiskHangs:
            return None
        if told is None:
            return None
        self._board.become(self._board.life.ended_by("preempted", told.reason, time.time()))
        return told.reason

    def overrules(self, bye: LinkBye, attempt: int) -> Ending | None:
        """The ending that a rank 0 in its way out does not know of, or None.

        It took the SIGTERM for the machine's, for an error, or, where its script's handler exits with 0, for a good
        end. What had made its last step, or was stopped at a boundary, is that.
        """
        total = self._board.info.total_steps
        to_its_end = bye.state == "finished" and total is not None and bye.step >= total
        return None if to_its_end or bye.state == "stopped" else self.of(attempt)

    def become(self, ending: Ending) -> None:
        """Put the run into the state that an ending leads to."""
        state: Literal["stopped", "starting"] = "stopped" if ending.what == "abort" else "starting"
        self._board.become(self._board.life.ended_by(state, ending.reason, time.time()))


def _nodes(info: RunInfo) -> dict[str, dict[int, int]]:
    """The pid of every rank, by node."""
    nodes: dict[str, dict[int, int]] = {}
    for place in info.ranks:
        nodes.setdefault(place.node, {})[place.rank] = place.pid
    return nodes


def _add(heard: _Heard, node: str, expected: dict[int, int], answer: RanksEnded) -> None:
    said = {rank.rank: rank for rank in answer.ranks if expected.get(rank.rank) == rank.pid}
    heard.ended[node] = [rank for rank, ended in said.items() if ended.how != "left"]
    for rank, pid in sorted(expected.items()):
        ended = said.get(rank)
        if ended is None:
            heard.words.append(f"rank {rank} (pid {pid}) is not known to the agent of {node}: it was left alone")
        elif ended.how == "left":
            heard.words.append(f"rank {rank} (pid {pid} on {node}) is left: {ended.reason}")


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"
