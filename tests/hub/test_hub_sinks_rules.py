"""The rules of sinks without sockets or libraries: branches, back-off, the bounded queue, and a sink that hangs."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hub_double import info, rows
from hypothesis import given
from hypothesis import strategies as st

from trainctl.hub.keeper import JournalKeeper
from trainctl.hub.sinks.access import Access
from trainctl.hub.sinks.branching import chain_of, parting_step, spans_between
from trainctl.hub.sinks.feed import Feed
from trainctl.hub.sinks.known import wanted
from trainctl.hub.sinks.memory import read_progress
from trainctl.hub.sinks.sink import Branching, Start
from trainctl.hub.sinks.trouble import LONGEST_DELAY_S, Trouble
from trainctl.hub.sinks.worker import Job, Worker
from trainctl.store.journal import JournalIndex
from trainctl.store.metrics import Branch
from trainctl.store.record import RunRecord
from trainctl.wire import codec
from trainctl.wire.messages import Body, Envelope, Rows, RunState, Stream
from waiting import until

# --- branches


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=2, max_size=7))
def test_after_a_branching_a_copy_holds_the_live_branch_and_nothing_else(made: list[tuple[int, int]]) -> None:
    """Every incarnation grows out of any one before it: a copy that drops and restores what it is told to is the
    history that the newest incarnation stands on."""
    branches: dict[int, Branch] = {}
    lived: dict[int, dict[int, int]] = {0: {}}  # of each incarnation: which incarnation each step is of
    copy: dict[int, int] = {}
    for number, (after_step, back) in enumerate(made, 1):
        parent = max(0, number - back)
        branches[number] = Branch(incarnation=number, after_step=after_step, parent=parent or None)
        inherited = {step: of for step, of in lived[parent].items() if step <= after_step}
        if number > 1:
            chain = chain_of(branches, number)
            parting = parting_step(chain_of(branches, number - 1), chain)
            copy = {step: of for step, of in copy.items() if step < parting}
            for incarnation, first, last in spans_between(chain, parting):
                own = [step for step, of in lived[incarnation].items() if of == incarnation]
                copy |= {step: incarnation for step in own if first <= step <= last}
        own_steps = range(after_step + 1, after_step + 1 + 3 * number)
        lived[number] = inherited | dict.fromkeys(own_steps, number)
        copy |= dict.fromkeys(own_steps, number)
        assert copy == lived[number]


# --- back-off


@given(st.lists(st.booleans(), max_size=40), st.floats(0.1, 100))
def test_a_failure_is_told_once_an_episode_and_waits_longer_each_time(failures: list[bool], pace_s: float) -> None:
    trouble, now, delays, open_episode = Trouble(), 0.0, [], False
    for failed in failures:
        now += pace_s
        if failed:
            delay_s, begins = trouble.failed()
            assert begins is not open_episode
            assert 1.0 <= delay_s <= LONGEST_DELAY_S
            assert begins or delay_s == min(2 * delays[-1], LONGEST_DELAY_S)
            delays.append(delay_s)
            open_episode = True
        elif trouble.worked(now):
            assert open_episode, "only what failed can work again"
            open_episode = False


# --- the queue


def envelope(seq: int, *steps: int) -> Envelope:
    return Envelope(source="demo-1", epoch=1, stream="metrics", seq=seq, time=1.0, body=rows(*(steps or (seq,))))


def test_the_queue_keeps_to_its_limits_counts_what_it_left_out_and_never_waits() -> None:
    few = Feed(limit_messages=2)
    assert [few.offer(envelope(seq)) for seq in (1, 2, 3)] == [True, True, False]
    assert few.overflowed == 1
    assert few.take(0) == envelope(1)
    assert few.offer(envelope(4))
    small = Feed(limit_bytes=5000)
    taken = sum(small.offer(envelope(seq)) for seq in range(1, 1000))
    assert 0 < taken < 100
    assert small.overflowed == 999 - taken
    small.end()
    assert not small.offer(envelope(1000)), "nothing comes after the end"
    assert small.take(10.0) is not None, "what came before the end can still be taken"


# --- the worker


class Gated:
    """A sink that hangs in `write` while its gate is shut."""

    streams: ClassVar[frozenset[Stream]] = frozenset({"metrics"})
    history: ClassVar[bool] = True

    def __init__(self, gate: threading.Event, steps: list[int]) -> None:
        self.gate, self.steps = gate, steps

    def open(self, start: Start) -> dict[str, str]:
        return {"notes": "kept"}

    def branch(self, branching: Branching) -> None: ...

    def write(self, body: Body) -> None:
        assert self.gate.wait(30)
        if isinstance(body, Rows):
            self.steps.extend(body.steps)

    def flush(self) -> None: ...
    def close(self, state: RunState) -> None: ...


class Bench:
    """A record and a journal without a hub around them."""

    def __init__(self, directory: Path, told: list[str]) -> None:
        self.record = RunRecord(info(directory))
        self.keeper = JournalKeeper(directory / "journal", JournalIndex(directory / "journal"))
        self.directory, self.told, self.seq = directory, told, 0

    def access(self) -> Access:
        recorder: Any = type("Recorder", (), {"record": self.record})()
        return Access(recorder=recorder, keeper=self.keeper)

    def take(self, *steps: int) -> Envelope:
        self.seq += 1
        made = envelope(self.seq, *steps)
        self.keeper.append(codec.encode(made), "metrics", made.seq, 0)
        self.record.apply(made)
        return made

    def worker(self, make: Callable[[], Any]) -> Worker:
        job = Job(
            name="gated",
            history=True,
            make=make,
            access=self.access(),
            directory=self.directory,
            tell=lambda _subject, text, _severity: self.told.append(text),
            state=lambda: self.record.state,
        )
        return Worker(job, head=self.record.heads["metrics"])


@pytest.mark.parametrize("packed", [False, True])
def test_a_sink_that_hangs_holds_up_nobody_and_gets_everything_in_order(tmp_path: Path, packed: bool) -> None:
    async def scenario() -> None:
        bench, gate, steps = Bench(tmp_path, told := []), threading.Event(), list[int]()
        for step in range(1, 101):
            bench.take(step)
        worker = bench.worker(lambda: Gated(gate, steps))
        worker.start()
        for step in range(101, 3001):
            worker.offer(bench.take(step))
        assert steps == []
        assert worker.overflowed > 0, "the queue is bounded"
        if packed:
            # Single envelopes are no longer to be had from the journal: the history in memory has to do.
            bench.keeper.index.forget(10**9)
        gate.set()
        await asyncio.to_thread(until, lambda: worker.behind == 0, 30)
        worker.end(drain=True)
        assert await asyncio.to_thread(worker.join, 10)
        assert sorted(set(steps)) == list(range(1, 3001))
        assert packed or steps == list(range(1, 3001)), "from the journal, each once"
        assert read_progress(tmp_path / "sinks" / "gated.json").seq == 3000
        assert told == []
        bench.keeper.close()

    asyncio.run(scenario())


def test_a_sink_that_hangs_for_good_is_left_behind_when_the_hub_goes(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench, gate = Bench(tmp_path, []), threading.Event()
        bench.take(1)
        worker = bench.worker(lambda: Gated(gate, []))
        worker.start()
        await asyncio.to_thread(until, lambda: worker.busy_since is not None)
        worker.end(drain=True)
        assert not await asyncio.to_thread(worker.join, 0.2)
        assert worker.behind == 1
        gate.set()
        assert await asyncio.to_thread(worker.join, 10)
        bench.keeper.close()

    asyncio.run(scenario())


# --- what is wanted


def test_settings_and_script_switch_sinks_on_and_every_mistake_has_its_sentence() -> None:
    found, problems = wanted(
        {"tensorboard": {}, "wandb": {"enabled": False}, "prometheus": {"port": "x"}}, ["wandb", "no"]
    )
    assert [one.name for one in found] == ["tensorboard"]
    assert problems[0].startswith("sink prometheus is off: [sinks.prometheus] in config.toml: Expected `int | null`")
    assert problems[1] == "there is no sink 'no'; there are: tensorboard, wandb, mlflow, prometheus"


def test_a_missing_library_is_named_with_what_to_install() -> None:
    known = {"tensorboard": ("tensorboard", "TensorBoardSink", "TensorBoardSettings", "no_such_library")}
    found, problems = wanted({}, ["tensorboard"], known)
    assert found == []
    assert 'pip install "trainctl-cockpit[tensorboard]"' in problems[0]
