"""Tells of ranks that died, are stuck or go on, and keeps what the record shows of them true."""

import time

import msgspec

from trainctl.hub.board import RunBoard
from trainctl.hub.endings import Endings
from trainctl.hub.liveness import Finding, Liveness
from trainctl.hub.recorder import Recorder
from trainctl.wire.messages import Envelope, NodeReading, RankChanged, Ranks, RunInfo

_STORE = "store"


class RollCall:
    """Follows the recorder for what agents see; hears of rank 0 from whoever reads the link."""

    def __init__(self, *, recorder: Recorder, board: RunBoard, endings: Endings) -> None:
        self._recorder = recorder
        self._board = board
        self._endings = endings
        self._attempt = 0
        self._liveness = Liveness([], time.monotonic())
        self._store_told = False

    def begin(self, info: RunInfo) -> None:
        """Rank 0 is linked; of an attempt that is known already nothing is forgotten."""
        now = time.monotonic()
        if info.attempt != self._attempt:
            self._attempt, self._store_told = info.attempt, False
            self._liveness = Liveness(info.ranks, now, total_steps=info.total_steps)
        self._liveness.relay(now)

    def heard(self) -> None:
        """Rank 0 said something."""
        self._liveness.relay(time.monotonic())

    def judged(self, ranks: Ranks) -> Ranks:
        """Everybody's figures as rank 0 brought them, with the state of those that are known to be dead or stuck."""
        for finding in self._liveness.figures(ranks.ranks, time.monotonic()):
            self._tell(finding)
        states = {figures.rank: self._liveness.state_of(figures.rank) for figures in ranks.ranks}
        if not any(states.values()):
            return ranks
        amended = [
            msgspec.structs.replace(figures, state=states[figures.rank] or figures.state) for figures in ranks.ranks
        ]
        return msgspec.structs.replace(ranks, ranks=amended)

    def follow(self, envelope: Envelope) -> None:
        """Look at what an agent read."""
        reading = envelope.body
        if isinstance(reading, NodeReading) and reading.state == "alive":
            found = self._liveness.processes(reading.node, reading.processes, self._board.info.id)
            for finding in found:
                self._tell(finding)

    def tick(self, now: float, *, linked: bool) -> None:
        """Time went by."""
        if self._board.life.ended or not linked:
            return
        for finding in self._liveness.tick(now):
            self._tell(finding)
        if self._liveness.store_silent != self._store_told:
            self._store_told = self._liveness.store_silent
            if self._store_told:
                text = (
                    "the job's store does not answer rank 0: control is unavailable, no command can be agreed on and "
                    "the ranks' own figures are not known; training goes on for as long as it needs no store itself. "
                    "Its last good checkpoint stands; abort --now ends it"
                )
                self._board.anomaly(_STORE, text, "error")
            else:
                self._board.anomaly(_STORE, "the ranks' figures come through the job's store again", "good")

    def _tell(self, finding: Finding) -> None:
        state = self._board.state
        ending = self._endings.of(state.attempt)
        wanted = ending is not None and finding.state == "dead"
        self._recorder.take(
            RankChanged(
                time=time.time(),
                step=finding.step or state.step,
                incarnation=state.incarnation,
                rank=finding.rank,
                node=finding.node,
                state=finding.state,
                text=f"{finding.text} ({ending.reason})" if ending is not None and wanted else finding.text,
                severity="info" if wanted else finding.severity,
            )
        )
        figures = self._recorder.record.ranks.get(finding.rank)
        if figures is not None and not self._board.life.ended:
            shown = msgspec.structs.replace(figures, state=finding.state)
            self._recorder.take(Ranks(incarnation=state.incarnation, ranks=[shown]))
