"""Who is dead and who is stuck, on a clock of the test's own; and a real hub that hears of it."""

import asyncio
import itertools
from pathlib import Path

import hub_double
import msgspec
import pytest
from hub_double import Rank, following, hub_running, peer_of, rank_linked, snapshot_when
from hypothesis import given
from hypothesis import strategies as st

from trainctl.hub.liveness import AT_LEAST_S, FIRST_STEP_S, Finding, Liveness
from trainctl.wire.messages import Envelope, ProcessReading, RankChanged, RankFigures, RankPlace, Ranks

PLACES = [RankPlace(rank=rank, node="n", pid=100 + rank) for rank in range(2)]


def figures(
    rank: int, at: float, step: int, phase: str | None = None, since: float | None = None, state: str = "running"
) -> RankFigures:
    return RankFigures(
        rank=rank, node="n", pid=100 + rank, state=state, step=step, time=at, phase=phase, phase_since=since
    )


class Told:
    """A job on a clock that starts at 0: every second the ranks report, rank 0 relays, the hub looks."""

    def __init__(self, total_steps: int | None = None, places: list[RankPlace] = PLACES) -> None:
        self.liveness = Liveness(places, 0.0, total_steps=total_steps)
        self.now = 0.0
        self.step = 0
        self.found: list[tuple[float, Finding]] = []

    def second(self, *reports: RankFigures, relay: bool = True, brings: bool = True) -> None:
        self.now += 1.0
        self.step += 1
        found: list[Finding] = []
        if relay:
            self.liveness.relay(self.now)
        if relay and brings:
            found += self.liveness.figures(reports, self.now)
        self.found += [(self.now, finding) for finding in [*found, *self.liveness.tick(self.now)]]

    def well(self, seconds: int = 1, **more: object) -> None:
        for _ in range(seconds):
            at = self.now + 1.0
            reports = [figures(rank, at, self.step + 1, "backward", at - 0.01) for rank in range(2)]
            self.second(*reports, **more)  # type: ignore[arg-type]

    @property
    def news(self) -> list[tuple[int, str]]:
        return [(finding.rank, finding.state) for _, finding in self.found]


def test_ranks_that_step_are_left_in_peace() -> None:
    told = Told()
    told.well(60)
    assert told.news == []


def test_a_scripts_own_evaluation_takes_as_long_as_it_takes_and_who_waits_for_it_is_left_in_peace() -> None:
    told = Told()
    told.well(20)
    began = told.now
    for _ in range(60):
        at = told.now + 1.0
        told.second(
            figures(0, at, 20, "eval", began, "evaluating"), figures(1, at, 20, "communication", began), relay=True
        )
    told.well(5)
    assert told.news == []
    stuck = told.now
    for _ in range(15):
        at = told.now + 1.0
        told.second(*(figures(rank, at, told.step, "communication", stuck) for rank in range(2)))
    assert told.news == [(0, "stuck"), (1, "stuck")], "and what hangs after it is named"


class TestBatchesOfAnEvaluation:
    def batch(self, told: Told, *done: int | None, state: str = "evaluating") -> None:
        """A second after which each rank has so many batches behind it; None where it is outside of its batches."""
        reports = (figures(rank, told.now + 1.0, 20, state=state) for rank in range(2))
        told.second(*(msgspec.structs.replace(report, eval_batch=n) for report, n in zip(reports, done, strict=True)))

    def evaluating(self, batches: int) -> Told:
        told = Told()
        told.well(20)
        for done in range(batches + 1):
            self.batch(told, done, done)
        return told

    def test_where_no_more_come_every_rank_that_waits_for_one_is_named_although_all_of_them_evaluate(self) -> None:
        told = self.evaluating(5)
        since = told.now
        while not told.news:
            self.batch(told, 5, 5)
        assert told.news == [(0, "stuck"), (1, "stuck")]
        assert AT_LEAST_S < told.now - since <= 10.0
        assert told.found[0][1].text == "no batch for 8 s after batch 5 of the evaluation at step 20, usually 1 s"
        self.batch(told, 6, 6)
        assert told.news[2:] == [(0, "evaluating"), (1, "evaluating")]

    def test_the_one_that_lags_is_named_and_the_other_at_the_end_of_its_batches_is_not(self) -> None:
        told = self.evaluating(5)
        for _ in range(30):
            self.batch(told, None, 5)
        assert told.news == [(1, "stuck")]

    def test_nobody_who_waits_for_one_that_evaluates_for_all_is_named_as_long_as_its_batches_come(self) -> None:
        told = self.evaluating(5)
        began = told.now
        for done in range(5, 60):
            at = told.now + 1.0
            rank_0 = msgspec.structs.replace(figures(0, at, 20, state="evaluating"), eval_batch=done)
            told.second(rank_0, figures(1, at, 20, "communication", began))
        assert told.news == []
        for _ in range(20):
            at = told.now + 1.0
            rank_0 = msgspec.structs.replace(figures(0, at, 20, state="evaluating"), eval_batch=59)
            told.second(rank_0, figures(1, at, 20, "communication", began))
        assert told.news == [(0, "stuck"), (1, "stuck")]

    @pytest.mark.parametrize("batches", [0, 1, 3])
    def test_what_comes_before_it_is_known_how_long_a_batch_takes_is_not_judged(self, batches: int) -> None:
        told = self.evaluating(batches)
        for _ in range(60):
            self.batch(told, batches, batches)
        assert told.news == []

    def test_the_first_batch_of_each_and_what_follows_the_last_take_as_long_as_they_take(self) -> None:
        told = self.evaluating(6)
        for done in (None, 0):
            for _ in range(60):
                self.batch(told, done, done)
        self.batch(told, 1, 1)
        assert told.news == []

    def test_long_batches_have_five_times_as_long(self) -> None:
        told = self.evaluating(1)
        for done in range(1, 6):
            for _ in range(10):
                self.batch(told, done, done)
        for _ in range(38):
            self.batch(told, 5, 5)
        assert told.news == []
        for _ in range(15):
            self.batch(told, 5, 5)
        assert told.news == [(0, "stuck"), (1, "stuck")]

    def test_a_pause_between_two_of_them_counts_for_nothing(self) -> None:
        told = self.evaluating(6)
        for _ in range(60):
            self.batch(told, 6, 6, state="paused")
        for _ in range(6):
            self.batch(told, 6, 6)
        assert told.news == []


@pytest.mark.parametrize("state", ["evaluating", "checkpointing"])
def test_a_lone_rank_that_evaluates_or_saves_in_no_phase_is_judged_once_three_of_these_are_known(state: str) -> None:
    told = Told(places=PLACES[:1])
    for _ in range(3):
        told.well(20)
        step = told.step
        for _ in range(20):
            told.second(figures(0, told.now + 1.0, step, state=state))
    assert told.news == []
    told.well(20)
    step = told.step
    for _ in range(100):
        told.second(figures(0, told.now + 1.0, step, state=state))
    assert told.news == []
    for _ in range(5):
        told.second(figures(0, told.now + 1.0, step, state=state))
    assert [finding.text for _, finding in told.found] == [f"{state} for 101 s after step {step}, usually 20 s"]


@pytest.mark.parametrize("state", ["evaluating", "checkpointing", "paused"])
def test_the_time_in_which_no_step_was_due_does_not_count_for_the_next_one(state: str) -> None:
    told = Told()
    told.well(20)
    for _ in range(30):
        told.second(*(figures(rank, told.now + 1.0, 20, state=state) for rank in range(2)))
    for _ in range(5):
        told.second(*(figures(rank, told.now + 1.0, 20) for rank in range(2)))
    assert told.news == []
    for _ in range(5):
        told.second(*(figures(rank, told.now + 1.0, 20) for rank in range(2)))
    assert told.news == [(0, "stuck"), (1, "stuck")]


def test_a_phase_that_was_never_seen_before_has_ten_seconds_and_one_that_is_known_to_be_short_is_named_within_ten() -> (
    None
):
    for shares, named_after in (({}, 11), ({"forward": 0.01}, 8)):
        told = Told()
        for _ in range(20):
            at = told.now + 1.0
            reports = [figures(rank, at, told.step + 1, "backward", at - 0.01) for rank in range(2)]
            told.second(*(msgspec.structs.replace(report, phases_s=shares) for report in reports))
        since = told.now
        while not told.news:
            at = told.now + 1.0
            told.second(figures(0, at, 20, "forward", since), figures(1, at, 20, "forward", since))
        assert told.now - since == named_after


def test_a_rank_of_which_nothing_is_heard_is_stuck_where_it_was_and_goes_on_later() -> None:
    told = Told()
    told.well(20)
    last = figures(1, told.now, 20, "backward", told.now - 0.01)
    for _ in range(12):
        told.second(figures(0, told.now + 1.0, told.step + 1), last)
    ((at, finding),) = told.found
    assert at - 20.0 <= 10.0
    assert (finding.rank, finding.state, finding.step, finding.severity) == (1, "stuck", 20, "warning")
    assert "nothing was heard of it for" in finding.text
    assert "after step 20 in backward" in finding.text
    assert told.liveness.state_of(1) == "stuck"
    told.well(2)
    assert told.news == [(1, "stuck"), (1, "running")]
    assert told.liveness.state_of(1) is None


def test_a_rank_that_stays_in_a_phase_is_stuck_in_it() -> None:
    told = Told()
    told.well(20)
    for _ in range(12):
        waiting = figures(1, told.now + 1.0, 20, "communication", 20.0)
        waiting = msgspec.structs.replace(waiting, phases_s={"communication": 0.01})
        told.second(figures(0, told.now + 1.0, told.step + 1, "data", told.now + 0.9), waiting)
    ((at, finding),) = told.found
    assert at - 20.0 <= 10.0
    assert finding.text.startswith("in communication for")
    assert finding.text.endswith("after step 20, usually 0.01 s")


def test_a_phase_that_usually_takes_long_may() -> None:
    told = Told()
    told.well(5)
    for step in range(6, 12):
        began = told.now
        for _ in range(6):
            told.second(*(figures(rank, told.now + 1.0, step, "forward", began) for rank in range(2)))
    assert told.news == []
    began = told.now
    for _ in range(24):
        told.second(*(figures(rank, told.now + 1.0, 12, "forward", began) for rank in range(2)))
    assert told.news == [], "five times six seconds are not over"
    for _ in range(10):
        told.second(*(figures(rank, told.now + 1.0, 12, "forward", began) for rank in range(2)))
    assert told.news == [(0, "stuck"), (1, "stuck")]
    assert "usually" in told.found[0][1].text


def test_without_phases_the_step_that_does_not_come_tells() -> None:
    told = Told()
    told.well(10)
    for _ in range(12):
        told.second(*(figures(rank, told.now + 1.0, 10) for rank in range(2)))
    assert told.news == [(0, "stuck"), (1, "stuck")]
    assert "no step for" in told.found[0][1].text


@pytest.mark.parametrize("phase", ["communication", None])
def test_a_hang_in_the_first_step_is_named_once_no_compilation_takes_so_long(phase: str | None) -> None:
    told = Told()
    began = told.now if phase else None
    for _ in range(int(FIRST_STEP_S)):
        told.second(*(figures(rank, told.now + 1.0, 0, phase, began, "starting") for rank in range(2)))
    assert told.news == []
    for _ in range(5):
        told.second(*(figures(rank, told.now + 1.0, 0, phase, began, "starting") for rank in range(2)))
    assert told.news == [(0, "stuck"), (1, "stuck")]
    assert told.found[0][1].text.startswith(f"in {phase or 'no phase'} for 12")
    assert "in its first step after step 0" in told.found[0][1].text
    told.well(2)
    assert told.news[2:] == [(0, "running"), (1, "running")]


def in_the_first_step(rank: int, at: float, phase: str | None = "forward") -> RankFigures:
    return figures(rank, at, 0, phase, 0.0 if phase else None, "starting")


@pytest.mark.parametrize("phase", ["forward", None])
@pytest.mark.parametrize("after_s", [3, 40])
def test_a_rank_that_hangs_in_a_first_step_which_another_has_behind_it_is_named_within_ten(
    phase: str | None, after_s: int
) -> None:
    told = Told()
    for _ in range(after_s):
        told.second(*(in_the_first_step(rank, told.now + 1.0, phase) for rank in range(2)))
    assert told.news == []
    done_at = told.now
    while not told.news:
        at = told.now + 1.0
        told.second(figures(0, at, 1, "communication", done_at), in_the_first_step(1, at, phase))
    assert told.now - done_at <= 10.0
    ((_, finding),) = told.found
    assert (finding.rank, finding.state) == (1, "stuck")
    assert finding.text.startswith(f"in {phase or 'no phase'} for ")
    assert finding.text.endswith(" s, in its first step after step 0, and rank 0 is at step 1")
    told.well(2)
    assert (1, "running") in told.news


def test_ranks_that_end_their_first_step_one_after_another_are_left_in_peace() -> None:
    told = Told()
    told.second(*(in_the_first_step(rank, told.now + 1.0) for rank in range(2)))
    for _ in range(6):
        told.second(figures(0, told.now + 1.0, 1, "optimizer", told.now), in_the_first_step(1, told.now + 1.0))
    told.step = 1
    told.well(20)
    assert told.news == []


def test_who_waits_for_a_busy_rank_in_the_first_step_is_left_in_peace() -> None:
    told = Told()
    for _ in range(60):
        at = told.now + 1.0
        told.second(figures(0, at, 1, "eval", 0.5, "evaluating"), in_the_first_step(1, at))
    assert told.news == []


def test_time_in_which_the_store_was_silent_does_not_count_for_who_is_behind() -> None:
    told = Told()
    told.second(figures(0, 1.0, 1), in_the_first_step(1, 1.0))
    for _ in range(60):
        told.second(brings=False)
    for _ in range(2):
        told.second(figures(0, told.now + 1.0, told.step), in_the_first_step(1, told.now + 1.0))
    assert told.news == []


def test_a_rank_that_falls_silent_in_its_first_step_is_named_within_ten() -> None:
    told = Told()
    told.second(*(in_the_first_step(rank, 1.0) for rank in range(2)))
    last = in_the_first_step(1, told.now)
    while not told.news:
        told.second(in_the_first_step(0, told.now + 1.0), last)
    assert told.now - 1.0 <= 10.0
    assert told.found[0][1].text.startswith("nothing was heard of it for 8 s: it was after step 0 in forward")


def test_a_rank_that_stopped_between_two_phases_is_named_so() -> None:
    told = Told()
    told.well(20)
    last = msgspec.structs.replace(figures(1, told.now + 1.0, 21), phases_s={"backward": 0.1})
    for _ in range(12):
        told.second(figures(0, told.now + 1.0, told.step + 1), last)
    assert "it was after step 21 between two phases" in told.found[0][1].text


@pytest.mark.parametrize("state", ["paused", "starting", "evaluating", "checkpointing"])
def test_who_is_held_or_busy_is_not_stuck(state: str) -> None:
    told = Told()
    told.well(10)
    for _ in range(60):
        told.second(*(figures(rank, told.now + 1.0, 10, "eval", 10.0, state) for rank in range(2)))
    assert told.news == []


def test_after_the_last_step_no_other_is_due() -> None:
    told = Told(total_steps=10)
    told.well(10)
    for _ in range(60):
        told.second(*(figures(rank, told.now + 1.0, 10) for rank in range(2)))
    assert told.news == []


def test_where_rank_0_is_not_heard_it_alone_is_named() -> None:
    told = Told()
    told.well(20)
    for _ in range(30):
        told.second(relay=False)
    assert told.news == [(0, "stuck")]


def test_where_nobodys_figures_come_the_store_is_silent_and_no_rank_is_blamed() -> None:
    told = Told()
    told.well(20)
    for _ in range(30):
        told.second(brings=False)
    assert told.news == []
    assert told.liveness.store_silent
    told.well(2)
    assert not told.liveness.store_silent


def test_time_in_which_the_hub_stood_still_counts_for_nothing() -> None:
    told = Told()
    told.well(20)
    told.now += 3600.0
    told.second(relay=False)
    told.well(3)
    assert told.news == []


def test_what_rank_0_sends_again_is_no_sign_of_life() -> None:
    told = Told()
    told.well(20)
    old = [figures(1, at, 5) for at in (3.0, 4.0, 5.0)]
    for _ in range(12):
        told.second(figures(0, told.now + 1.0, told.step + 1), *old)
    assert told.news == [(1, "stuck")]


class TestProcesses:
    def see(self, liveness: Liveness, **alive: bool) -> list[Finding]:
        readings = [
            ProcessReading(
                pid=int(pid[1:]),
                rank=int(pid[1:]) - 100,
                run_id="r",
                alive=lives,
                ended=None if lives else "killed by SIGKILL",
            )
            for pid, lives in alive.items()
        ]
        return liveness.processes("n", readings, "r")

    def test_a_dead_rank_is_told_once(self) -> None:
        liveness = Liveness(PLACES, 0.0)
        assert self.see(liveness, p100=True, p101=True) == []
        (finding,) = self.see(liveness, p100=True, p101=False)
        assert (finding.rank, finding.state, finding.severity) == (1, "dead", "error")
        assert finding.text.startswith("pid 101 killed by SIGKILL")
        assert self.see(liveness, p100=True, p101=False) == []

    def test_a_rank_that_ended_well_is_neither_dead_nor_stuck(self) -> None:
        liveness = Liveness(PLACES, 0.0)
        self.see(liveness, p100=True, p101=True)
        assert self.see(liveness, p100=True) == []
        for second in range(1, 60):
            liveness.relay(float(second))
            liveness.figures([figures(0, float(second), second)], float(second))
            assert liveness.tick(float(second)) == []
        assert (liveness.state_of(0), liveness.state_of(1)) == (None, "left")

    def test_ranks_of_other_runs_and_earlier_attempts_are_none_of_ours(self) -> None:
        liveness = Liveness(PLACES, 0.0)
        assert self.see(liveness, p77=False) == []
        other = ProcessReading(pid=101, rank=1, run_id="another", alive=False)
        assert liveness.processes("n", [other], "r") == []
        assert liveness.processes("m", [ProcessReading(pid=101, rank=1, run_id="r", alive=False)], "r") == []


@given(
    reports=st.floats(0.0, 0.99), relays=st.floats(0.0, 0.99), looks=st.floats(0.0, 0.99), stops=st.floats(20.0, 21.0)
)
def test_whatever_second_it_stops_in_a_rank_is_named_within_ten(
    reports: float, relays: float, looks: float, stops: float
) -> None:
    """Each part of the way works once a second, at a moment of its own."""
    liveness = Liveness(PLACES, 0.0)
    happenings = [
        (second + offset, what) for second in range(40) for what, offset in enumerate((reports, relays, looks))
    ]
    newest = figures(1, 0.0, 0)
    for now, what in sorted(happenings):
        if what == 0 and now < stops:
            newest = figures(1, now, int(now), "backward", now)
        elif what == 1:
            liveness.relay(now)
            liveness.figures([figures(0, now, int(now)), newest], now)
        elif what == 2 and [finding for finding in liveness.tick(now) if finding.rank == 1]:
            assert now > stops
            assert AT_LEAST_S - 1.0 < now - stops <= 10.0
            return
    raise AssertionError("never told")


def test_a_real_hub_tells_of_a_silent_rank_and_shows_it_in_everybodys_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, unplaced = tmp_path / "run", hub_double.info
    monkeypatch.setattr(
        hub_double, "info", lambda *given, **more: msgspec.structs.replace(unplaced(*given, **more), ranks=PLACES)
    )

    async def rank_0_goes_on(rank: Rank) -> None:
        for second in itertools.count(1):
            rank.step(second)
            silent = figures(1, min(second, 3.0), min(second, 3), "backward", min(second, 3) - 0.1)
            rank.record(Ranks(incarnation=1, ranks=[figures(0, float(second), second), silent]))
            await asyncio.sleep(1.0)

    async def scenario() -> None:
        with hub_running(run_dir) as hub, rank_linked(run_dir) as rank:
            async with peer_of(hub.card()) as peer, following(peer) as heard:
                going_on = asyncio.create_task(rank_0_goes_on(rank))
                try:
                    item = await heard.until(
                        lambda item: isinstance(item, Envelope) and isinstance(item.body, RankChanged), 30
                    )
                    assert isinstance(item, Envelope)
                    event = item.body
                    assert isinstance(event, RankChanged)
                    assert (event.rank, event.state, event.step) == (1, "stuck", 3)
                    found = await snapshot_when(peer, lambda snapshot: snapshot.ranks[1].state != "running")
                    assert [shown.state for shown in found.ranks] == ["running", "stuck"]
                finally:
                    going_on.cancel()
                    await asyncio.gather(going_on, return_exceptions=True)

    asyncio.run(scenario())
