"""The tables of the agreement in every order that hypothesis finds: ranks of any number, in one phase or two, early
leavers, lost patience, a rank 0 that is cut off, falls silent or dies anywhere, between *ready* and the decision too.

Whatever happens: nothing is applied that was not decided, whoever is told that nothing happened is told the truth, in
two phases all apply or none does, and nobody waits for ever.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from trainctl.trainer.agreement import Answer, Position, answer, judge
from trainctl.trainer.protocol import (
    LEAD_ONE_PHASE,
    LEAD_TWO_PHASES,
    ONE_PHASE,
    TWO_PHASES,
    Do,
    Lead,
    LeadEvent,
    ProtocolError,
    Rank,
    RankEvent,
    lead_step,
    leaves_open,
    may_have_applied,
    rank_step,
)

Move: TypeAlias = Callable[[], None]

BOUNDARY = Position(2)
LAST = 4
HELD = {Rank.WAITING, Rank.GATHERING, Rank.STAGING, Rank.STAGED, Rank.APPLYING}
IN_DOUBT = {Rank.WAITING, Rank.GATHERING, Rank.STAGED}
OVER = {Rank.APPLIED, Rank.DROPPED, Rank.FELL, Rank.DOUBT}


@dataclass
class OneRank:
    """`state` is None until it is armed."""

    at: int = 0
    state: Rank | None = None
    given: Answer | None = None
    looking: bool = False
    left: bool = False
    dead: bool = False
    staged: bool | None = None
    here: bool = False
    reported: bool = False
    applied: bool = False


class Agreement(RuleBasedStateMachine):
    @initialize(count=st.integers(1, 4), two_phase=st.booleans())
    def begin(self, count: int, two_phase: bool) -> None:
        self.ranks = [OneRank() for _ in range(count)]
        self.two_phase = two_phase
        self.store: dict[str, str] = {}
        self.lead = Lead.IDLE
        self.proposed = self.cut = self.silent = False
        self.told: str | None = None

    # What both sides do with the store and the tables

    def decide(self, key: str, wanted: str) -> str:
        return self.store.setdefault(key, wanted)

    def on(self, rank: OneRank, event: RankEvent) -> None:
        assert rank.state is not None
        rank.state, do = rank_step(rank.state, event, two_phase=self.two_phase)
        match do:
            case Do.FORCE_ABORT if not self.silent:
                self.on(rank, RankEvent.GO if self.decide("d", "abort") == "go" else RankEvent.ABORT)
            case Do.FORCE_CANCEL if not self.silent:
                self.on(rank, RankEvent.COMMIT if self.decide("c", "cancel") == "commit" else RankEvent.CANCEL)
            case Do.GATHER:
                rank.here = True
            case Do.CALL_OFF:
                self.call_off(rank)
            case Do.APPLY:
                rank.applied = True
            case Do.TELL:
                self.tell(rank)

    def tell(self, rank: OneRank) -> None:
        rank.reported = True
        rank.staged = rank.staged if rank.staged is not None else False

    def call_off(self, rank: OneRank) -> None:
        if not self.silent:
            held = self.decide("m", "abort")
            if rank.state is Rank.GATHERING:
                self.on(rank, RankEvent.ALL if held == "go" else RankEvent.ALONE)
        if rank.state is Rank.FELL:
            self.tell(rank)

    def leads(self, event: LeadEvent) -> None:
        self.lead = lead_step(self.lead, event, two_phase=self.two_phase)

    def can_lead(self, *states: Lead) -> bool:
        return self.lead in states and not self.cut and not self.silent and not self.ranks[0].dead

    def living(self, number: int) -> OneRank | None:
        rank = self.ranks[number % len(self.ranks)]
        return None if rank.dead or rank.state is Rank.DOUBT else rank

    # What can happen next

    @rule(which=st.lists(st.integers(0, 999), min_size=4, max_size=16))
    def goes_on(self, which: list[int]) -> None:
        for number in which:
            moves = [*self.leader_moves(), *self.rank_moves()]
            if moves:
                moves[number % len(moves)]()

    @rule(which=st.integers(0, 999))
    def has_trouble(self, which: int) -> None:
        moves = list(self.troubles())
        if moves:
            moves[which % len(moves)]()

    def leader_moves(self) -> Iterator[Move]:
        if self.cut and not self.silent and not self.ranks[0].dead:
            yield self.reaches_the_store_again
        if not self.proposed and self.can_lead(Lead.IDLE):
            yield self.proposes
        answered = all(rank.given is not None for rank in self.ranks)
        if self.can_lead(Lead.ASKING) and answered:
            yield self.judges_the_answers
        if self.can_lead(Lead.DECIDING):
            yield self.writes_go
        if self.can_lead(Lead.COLLECTING) and all(rank.staged is not None for rank in self.ranks):
            yield self.looks_at_what_is_staged
        if self.can_lead(Lead.JUDGING):
            yield self.writes_commit
        if self.can_lead(Lead.SCHEDULED, Lead.REPORTING):
            yield self.hears_all_reports

    def rank_moves(self) -> Iterator[Move]:
        for number, rank in enumerate(self.ranks):
            if self.living(number) is None:
                continue
            if self.proposed and rank.state is None and not rank.left:
                yield partial(self.arms, number)
            if rank.state is not None and rank.given is None:
                yield partial(self.answers, number)
            if rank.looking:
                yield partial(self.looks, number)
            elif not rank.left and rank.state not in HELD and rank.at < LAST:
                yield partial(self.steps, number)
            if rank.state in {Rank.ARMED, Rank.WAITING, Rank.LEAVING} and "d" in self.store and not self.silent:
                yield partial(self.hears_the_decision, number)
            if rank.state is Rank.STAGED and "c" in self.store and not self.silent:
                yield partial(self.hears_the_verdict, number)
            if rank.state is Rank.GATHERING and not self.silent:
                yield partial(self.gathers, number)
            if rank.state is Rank.STAGING:
                yield partial(self.stages, number, well=True)
            if rank.state is Rank.APPLYING:
                yield partial(self.is_done, number)

    def troubles(self) -> Iterator[Move]:
        if self.lead is not Lead.IDLE and not self.cut and self.told is None:
            yield self.is_cut_off
            if self.can_lead(Lead.DECIDING, Lead.JUDGING):
                yield self.loses_the_reply
        if self.can_lead(Lead.ASKING):
            yield partial(self.judges_the_answers, waits=False)
        if self.can_lead(Lead.COLLECTING):
            yield partial(self.looks_at_what_is_staged, withdrawn=True)
        for number, rank in enumerate(self.ranks):
            if self.living(number) is not None:
                yield from self.troubles_of(number, rank)
        if self.proposed and not self.ranks[0].dead:
            yield self.rank_0_dies
        if self.proposed:
            yield self.the_store_answers_again if self.silent else self.the_store_falls_silent

    def troubles_of(self, number: int, rank: OneRank) -> Iterator[Move]:
        if "d" in self.store:  # heard once more, by the other thread
            yield partial(self.hears_the_decision, number)
            yield partial(self.hears_the_verdict, number)
        match rank.state:
            case Rank.WAITING:
                yield partial(self.loses_patience, number)
            case Rank.GATHERING:
                yield partial(self.waits_too_long_for_the_others, number)
            case Rank.STAGING:
                yield partial(self.stages, number, well=False)
            case Rank.STAGED:
                yield partial(self.has_not_heard_of_rank_0, number)
        if self.silent and rank.state in IN_DOUBT:
            yield partial(self.doubts_for_too_long, number)
        if not rank.left and not rank.looking and rank.state not in HELD:
            yield partial(self.leaves_its_loop, number)

    # Rank 0's leader

    def proposes(self) -> None:
        self.proposed = True
        self.leads(LeadEvent.PROPOSE)

    def judges_the_answers(self, waits: bool = True) -> None:
        answers = [rank.given for rank in self.ranks]
        complete = [given for given in answers if given is not None]
        if len(complete) == len(answers) and judge(complete)[0] == "go":
            self.leads(LeadEvent.READY)
        elif len(complete) == len(answers) or not waits:
            self.decide("d", "abort")
            self.leads(LeadEvent.NOT_READY)
            self.told = "nothing"

    def writes_go(self) -> None:
        went = self.decide("d", "go") == "go"
        self.leads(LeadEvent.WENT if went else LeadEvent.LOST)
        self.told = None if went else "nothing"

    def looks_at_what_is_staged(self, withdrawn: bool = False) -> None:
        staged = [rank.staged for rank in self.ranks]
        if withdrawn or False in staged:
            self.decide("c", "cancel")
            self.leads(LeadEvent.NOT_STAGED)
            self.told = "nothing"
        elif all(staged):
            self.leads(LeadEvent.STAGED)

    def writes_commit(self) -> None:
        self.told = None if self.decide("c", "commit") == "commit" else "nothing"
        self.leads(LeadEvent.JUDGED)

    def hears_all_reports(self) -> None:
        if all(rank.reported or rank.state is Rank.DROPPED for rank in self.ranks):
            if self.told is None:
                self.told = "applied" if all(rank.applied for rank in self.ranks) else "failed"
            self.leads(LeadEvent.REPORTED)

    def is_cut_off(self) -> None:
        self.cut = True
        self.told = "unknown" if may_have_applied(self.lead, two_phase=self.two_phase) else "nothing"

    def loses_the_reply(self) -> None:
        """What it wrote came through, and it does not know."""
        self.decide(*(("d", "go") if self.lead is Lead.DECIDING else ("c", "commit")))
        self.is_cut_off()

    def reaches_the_store_again(self) -> None:
        if leaves_open(self.lead):
            self.decide("d", "abort")
            self.decide("c", "cancel")
        self.leads(LeadEvent.SETTLED)
        self.cut = False

    def rank_0_dies(self) -> None:
        self.ranks[0].dead = True

    # Every rank's two threads

    def arms(self, number: int) -> None:
        rank = self.living(number)
        if rank is not None and rank.state is None and not rank.left:
            rank.state = Rank.ARMED

    def answers(self, number: int) -> None:
        rank = self.living(number)
        if rank is not None and rank.state is not None and rank.given is None:
            refusal = "the run has ended" if rank.left else None
            rank.given = answer(BOUNDARY, at=Position(rank.at), held_at=None, refusal=refusal)

    def steps(self, number: int) -> None:
        rank = self.living(number)
        tied = [other.at for other in self.ranks if not other.left]
        if rank is None or rank.left or rank.looking or rank.state in HELD or rank.at == LAST:
            return
        if rank.at <= min(tied):
            rank.at += 1
            rank.looking = True

    def looks(self, number: int) -> None:
        rank = self.living(number)
        if rank is not None and rank.looking:
            rank.looking = False
            if rank.at == BOUNDARY.step and rank.state is not None and not rank.left:
                self.on(rank, RankEvent.REACH)

    def hears_the_decision(self, number: int) -> None:
        rank = self.living(number)
        if rank is not None and rank.state is not None and "d" in self.store and not self.silent:
            self.on(rank, RankEvent.GO if self.store["d"] == "go" else RankEvent.ABORT)

    def hears_the_verdict(self, number: int) -> None:
        rank = self.living(number)
        decided = rank is not None and rank.state not in {None, Rank.ARMED, Rank.WAITING, Rank.LEAVING}
        if rank is not None and decided and self.two_phase and "c" in self.store and not self.silent:
            self.on(rank, RankEvent.COMMIT if self.store["c"] == "commit" else RankEvent.CANCEL)

    def loses_patience(self, number: int) -> None:
        rank = self.living(number)
        if rank is not None and rank.state is Rank.WAITING:
            self.on(rank, RankEvent.IMPATIENT)

    def gathers(self, number: int) -> None:
        rank = self.living(number)
        if rank is None or rank.state is not Rank.GATHERING or self.silent:
            return
        if number == 0 and all(other.here for other in self.ranks):
            self.decide("m", "go")
        if "m" in self.store:
            self.on(rank, RankEvent.ALL if self.store["m"] == "go" else RankEvent.ALONE)

    def waits_too_long_for_the_others(self, number: int) -> None:
        rank = self.living(number)
        if rank is not None and rank.state is Rank.GATHERING:
            self.on(rank, RankEvent.UNMET)

    def stages(self, number: int, well: bool) -> None:
        rank = self.living(number)
        if rank is not None and rank.state is Rank.STAGING:
            rank.staged = well
            self.on(rank, RankEvent.STAGE)

    def has_not_heard_of_rank_0(self, number: int) -> None:
        rank = self.living(number)
        if rank is not None and rank.state is Rank.STAGED:
            self.on(rank, RankEvent.UNHEARD)

    def is_done(self, number: int) -> None:
        rank = self.living(number)
        if rank is not None and rank.state is Rank.APPLYING:
            self.on(rank, RankEvent.DONE)

    def leaves_its_loop(self, number: int) -> None:
        rank = self.living(number)
        if rank is None or rank.left or rank.looking or rank.state in HELD:
            return
        rank.left = True
        if rank.state is not None:
            self.on(rank, RankEvent.FALL)

    def the_store_falls_silent(self) -> None:
        self.silent = True

    def the_store_answers_again(self) -> None:
        self.silent = False

    def doubts_for_too_long(self, number: int) -> None:
        rank = self.living(number)
        if rank is not None and rank.state in IN_DOUBT:
            self.on(rank, RankEvent.SILENT)

    # What always holds

    @invariant()
    def nothing_is_applied_that_was_not_decided(self) -> None:
        decided = self.store.get("d") == "go" and (not self.two_phase or self.store.get("c") == "commit")
        assert decided or not any(rank.applied for rank in self.ranks)

    @invariant()
    def what_was_told_is_true(self) -> None:
        if self.told == "nothing":
            assert not any(rank.applied for rank in self.ranks)
        if self.told == "applied":
            assert all(rank.applied for rank in self.ranks)

    def teardown(self) -> None:
        """Whatever is under way comes to its end by what each side does when left alone."""
        self.silent = False
        for _ in range(12):
            self.go_on()
        # Who is in doubt ends its process, and the launcher ends the others, which may wait for what it had to stage.
        if not any(rank.state is Rank.DOUBT for rank in self.ranks):
            hang = [rank for rank in self.ranks if not rank.dead and rank.state in HELD]
            assert not hang, "a training thread hangs"
        self.nothing_is_applied_that_was_not_decided()
        self.what_was_told_is_true()
        if any(rank.applied for rank in self.ranks):
            whole = [rank for rank in self.ranks if not rank.dead and rank.state is not Rank.DOUBT]
            assert all(rank.applied for rank in whole), "half a command, and nobody died of it"

    def go_on(self) -> None:
        if not self.ranks[0].dead:
            if self.cut:
                self.reaches_the_store_again()
            for state, move in (
                (Lead.ASKING, lambda: self.judges_the_answers(waits=False)),
                (Lead.DECIDING, self.writes_go),
                (Lead.COLLECTING, lambda: self.looks_at_what_is_staged(withdrawn=False)),
                (Lead.JUDGING, self.writes_commit),
            ):
                if self.lead is state:
                    move()
        for number, rank in enumerate(self.ranks):
            if rank.state is not None:
                self.hears_the_decision(number)
                self.gathers(number)
                self.stages(number, well=True)
                self.hears_the_verdict(number)
                self.loses_patience(number)
                if any(other.dead or other.left or other.state is Rank.DOUBT for other in self.ranks):
                    self.waits_too_long_for_the_others(number)
                if self.ranks[0].dead or self.lead is Lead.IDLE:
                    self.has_not_heard_of_rank_0(number)
                self.is_done(number)
            self.looks(number)
            self.steps(number)


TestAgreement = Agreement.TestCase
TestAgreement.settings = settings(max_examples=400, stateful_step_count=12, deadline=None)


def test_a_pair_that_is_not_in_the_table_is_an_error_and_no_guess() -> None:
    with pytest.raises(ProtocolError, match="a rank that is armed cannot meet"):
        rank_step(Rank.ARMED, RankEvent.COMMIT, two_phase=True)
    with pytest.raises(ProtocolError, match="rank 0, which is idle, cannot meet"):
        lead_step(Lead.IDLE, LeadEvent.WENT, two_phase=False)


@pytest.mark.parametrize("table", [ONE_PHASE, TWO_PHASES])
def test_no_end_leads_anywhere_else(table: dict[tuple[Rank, RankEvent], tuple[Rank, Do]]) -> None:
    assert all(after is state for (state, _), (after, _) in table.items() if state in OVER)
    assert not [state for (state, event) in table if event is RankEvent.SILENT and state not in IN_DOUBT]


@pytest.mark.parametrize("table", [LEAD_ONE_PHASE, LEAD_TWO_PHASES])
def test_from_wherever_rank_0_is_cut_off_it_comes_back_to_the_next_command(
    table: dict[tuple[Lead, LeadEvent], Lead],
) -> None:
    assert all(table[state, LeadEvent.SETTLED] is Lead.IDLE for state in Lead)
