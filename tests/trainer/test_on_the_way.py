"""What a rollback is to skip is read while every rank waits: a slip is refused, and the reading can be given up."""

from pathlib import Path
from typing import Any, cast

import pytest
from one_rank import OneRank
from test_agreement_threads import Job

from trainctl.trainer import on_the_way
from trainctl.trainer.attach import Script, capabilities, prepare
from trainctl.trainer.checkpoint import Checkpointer, Loaded
from trainctl.trainer.checkpoint.rng import capture_rng
from trainctl.trainer.checkpoint.tree import encode, keep_inline
from trainctl.trainer.feed import Feed
from trainctl.trainer.leader import Prepared
from trainctl.trainer.on_the_way import CalledOff, Reading, cannot_be_meant
from trainctl.wire.commands import Abort, Act, Command, Rollback, Stop
from trainctl.wire.messages import LinkCancel
from waiting import until

WITHOUT_END = 10**9


def a_feed() -> Feed:
    return Feed(list(range(10)), capture_rng=capture_rng, restore_rng=lambda _rng: None)


class SavedAtTheStart:
    """Stands for a checkpointer whose one checkpoint was made when the feed stood where it stands now."""

    def __init__(self, feed: Feed) -> None:
        self._own = {"loader": encode(feed.state_dict(), "loader", keep_inline)}

    def load(self, checkpoint: str) -> Loaded:
        return Loaded(
            id=checkpoint, step=1, incarnation=1, attempt=1, world_size=2, metrics={}, note=None, own=self._own
        )


def reading_without_end(directory: Path) -> Job:
    """A job of two ranks that prepare such a rollback, `c1`."""
    job = Job(2, directory)
    feeds = []
    for rank in job.ranks:
        feed = rank.core.feed = a_feed()
        feed.next()
        rank.core.checkpointer = cast(Checkpointer, SavedAtTheStart(feed))
        feed.skip(4)
        feeds.append(feed)
    job.leader._prepare = lambda command: Prepared(
        two_phase=isinstance(command.action, Rollback), checkpoint="step-1", incarnation=2
    )
    job.send(Rollback(target="1", skip_batches=WITHOUT_END))
    until(lambda: min(feed.index for feed in feeds) > 1000, 20, what="every rank to read")
    return job


def test_a_script_with_data_of_its_own_is_asked_to_skip_nothing(tmp_path: Path) -> None:
    """It was told as done before, and was not: `on_rollback` gets no count."""
    rank = OneRank(tmp_path)
    rank.core.capabilities = capabilities(Script(name="one"), rank.core, None)
    rank.train(2)
    checkpoint = rank.save()
    why = prepare(rank.core, Command(id="c", action=Rollback(target=checkpoint, skip_batches=1)))
    assert "the script owns its data iterator, so it is for the script to leave out batches" in str(why)
    assert isinstance(prepare(rank.core, Command(id="c", action=Rollback(target=checkpoint))), Prepared)
    rank.core.feed = a_feed()
    rank.core.capabilities = capabilities(Script(name="one"), rank.core, None)
    again = prepare(rank.core, Command(id="c", action=Rollback(target=checkpoint, skip_batches=1)))
    assert isinstance(again, Prepared)


def has_its_data_back(job: Job) -> bool:
    feeds = [rank.core.feed for rank in job.ranks]
    return [(feed.index, feed.next()) for feed in feeds if feed is not None] == [(5, 5), (5, 5)]


@pytest.mark.parametrize("end", [Stop(), Abort()], ids=["stop", "abort"])
def test_a_stop_gives_up_a_rollback_that_is_still_reading_on_every_rank(
    end: Act, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_the_way, "LOOK_S", 0.01)
    job = reading_without_end(tmp_path)
    for rank in job.ranks:
        rank.core.checkpointer = None  # nothing is to be saved at the end
    ended = job.outcome(job.send(end))
    given_up = job.outcome("c1")
    assert (ended.state, given_up.state) == ("applied", "rejected")
    name = type(end).__name__.lower()
    assert given_up.reason == f"cancelled by mk, who sent {name} before it was prepared"
    assert has_its_data_back(job)
    job.close()


@pytest.mark.parametrize(("actor", "state"), [("hub", "expired"), ("dana", "rejected")])
def test_so_does_its_expiry_and_a_cancel_and_training_goes_on_with_the_data_it_would_have_had(
    actor: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_the_way, "LOOK_S", 0.01)
    job = reading_without_end(tmp_path)
    step = job.ranks[0].core.boundary.completed
    job.leader.submit(LinkCancel(id="c1", actor=actor))
    assert job.outcome("c1").state == state
    until(lambda: min(rank.core.boundary.completed for rank in job.ranks) > step, 20, what="training to go on")
    assert has_its_data_back(job)
    for rank in job.ranks:
        rank.core.checkpointer = None
    job.close()


def test_it_looks_every_second_and_says_every_ten_how_far_it_is() -> None:
    now, looks, told = 0.0, [], list[str]()

    def called_off() -> bool:
        looks.append(now)
        return now > 21.0

    reading = Reading(5000, called_off=called_off, tell=told.append, clock=lambda: now)
    for _ in range(4 * 22):
        reading()
        now += 0.25
    with pytest.raises(CalledOff, match="after 88 micro-batches"):
        reading()
    assert looks == [float(second) for second in range(1, 23)]
    words = "the data of a rollback, with 5000 to skip, are read up to its place:"
    assert [text.partition(" so far")[0] for text in told] == [
        f"{words} {read} micro-batches in {second} s" for read, second in ((40, 10), (80, 20))
    ]


@pytest.mark.parametrize(("count", "refused"), [(600, False), (601, True), (WITHOUT_END, True)])
def test_more_than_the_whole_run_reads_is_a_slip(count: int, refused: bool, tmp_path: Path) -> None:
    rank = OneRank(tmp_path)
    core = rank.core
    core.feed, core.total_steps = a_feed(), 200
    for index in range(6):  # two steps of three micro-batches
        core.ranges.took(index)
        if index % 3 == 2:
            core.ranges.close(index // 3 + 1)
    command: Any = Command(id="c", action=Rollback(target="1", skip_batches=count))
    found = prepare(core, command)
    assert isinstance(found, str)
    assert found.startswith(f"to skip {count} micro-batches is more than") == refused
    assert refused or "no checkpoint '1'" in found
    core.total_steps = None
    assert cannot_be_meant(core, command.action) is None, "a run without an end has no such limit"
