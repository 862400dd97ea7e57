"""A newer setting takes the place of one that still waits where it is applied; else the older one is carried out."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_agreement_threads import Job

from trainctl.trainer.superseded import GivingWay
from trainctl.wire.commands import Command, SetTunable
from trainctl.wire.messages import LinkCancel, LinkCommand


@contextmanager
def waiting(directory: Path) -> Iterator[tuple[Job, threading.Event]]:
    """A job in which every setting waits until the event is set, as for the end of an evaluation."""
    begin = threading.Event()
    job = Job(2, directory, later=lambda command: isinstance(command.action, SetTunable) and not begin.is_set())
    try:
        yield job, begin
    finally:
        begin.set()
        job.close()


def set_x(value: float | str, name: str, condition: str | None = None, expires_s: float | None = None) -> LinkCommand:
    command = Command(id=name, action=SetTunable(name="x", value=value), condition=condition, expires_s=expires_s)
    return LinkCommand(command=command, actor="mk", accepted=time.time() - 10)


def supersede(job: Job, older: str, newer: LinkCommand) -> None:
    """What the hub sends."""
    job.leader.submit(LinkCancel(id=older, actor="mk", superseded_by=newer.command.id))
    job.leader.submit(newer)


def test_the_older_one_is_superseded_once_the_newer_one_is_applied(tmp_path: Path) -> None:
    with waiting(tmp_path) as (job, begin):
        job.leader.submit(set_x(1, "older"))
        supersede(job, "older", set_x(2, "newer", "step >= 0"))
        assert not job.updates, "nothing is told before it is true"
        begin.set()
        assert job.outcome("newer").state == "applied"
        older = job.outcome("older")
        assert (older.state, older.reason) == ("superseded", "mk sent newer in its place")
    assert [value for _, value in job.ranks[1].applied] == [2]


@pytest.mark.parametrize(
    ("newer", "spoil", "state"),
    [
        (set_x(2, "newer", "step < 0"), None, "rejected"),
        (set_x(2, "newer", expires_s=1.0), None, "expired"),
        (set_x("much", "newer"), None, "rejected"),
        (set_x(2, "newer"), LinkCancel(id="newer", actor="jo"), "rejected"),
        (set_x(2, "newer"), LinkCancel(id="newer", actor="hub"), "expired"),
    ],
    ids=["condition", "expired", "does not fit", "cancelled", "withdrawn by the hub"],
)
def test_the_older_one_is_carried_out_where_the_newer_one_comes_to_nothing(
    newer: LinkCommand, spoil: LinkCancel | None, state: str, tmp_path: Path
) -> None:
    with waiting(tmp_path) as (job, begin):
        job.leader.submit(set_x(1, "older"))
        supersede(job, "older", newer)
        if spoil is not None:
            job.leader.submit(spoil)
        begin.set()
        assert job.outcome("newer").state == state
        assert job.outcome("older").state == "applied"
    assert [value for _, value in job.ranks[1].applied] == [1]


def test_of_three_the_newest_counts_and_where_it_fails_the_others_come_in_their_order(tmp_path: Path) -> None:
    for condition, applied, states in (
        ("step >= 0", [3], ["superseded", "superseded", "applied"]),
        ("step < 0", [1, 2], ["applied", "applied", "rejected"]),
    ):
        with waiting(tmp_path) as (job, begin):
            job.leader.submit(set_x(1, "first"))
            supersede(job, "first", set_x(2, "second"))
            job.leader.submit(LinkCancel(id="first", actor="mk", superseded_by="third"))
            supersede(job, "second", set_x(3, "third", condition))
            begin.set()
            outcomes = [job.outcome(name).state for name in ("first", "second", "third")]
        assert [value for _, value in job.ranks[0].applied] == applied
        assert outcomes == states


def test_an_older_one_can_be_cancelled_while_it_gives_way(tmp_path: Path) -> None:
    with waiting(tmp_path) as (job, begin):
        job.leader.submit(set_x(1, "older"))
        supersede(job, "older", set_x(2, "newer", "step < 0"))
        job.leader.submit(LinkCancel(id="older", actor="jo"))
        assert job.outcome("older").reason == "cancelled by jo"
        begin.set()
        assert job.outcome("newer").state == "rejected"
    assert job.ranks[0].applied == []


def test_who_gives_way_to_whom() -> None:
    way = GivingWay()
    way.take(LinkCancel(id="a", actor="mk", superseded_by="b"))
    assert way.newer_than("a") == "b"
    assert way.newer_than("b") is None
    assert way.ended("b", "scheduled") == []
    assert way.ended("b", "failed") == []
    way.take(LinkCancel(id="a", actor="mk", superseded_by="b"))
    way.take(LinkCancel(id="c", actor="mk", superseded_by="b"))
    assert [cancel.id for cancel in way.ended("b", "applied")] == ["a", "c"]
    assert way.newer_than("a") is None
    # Nobody can know whether it was applied; to carry the older one out after it could undo it.
    way.take(LinkCancel(id="a", actor="mk", superseded_by="b"))
    assert [cancel.id for cancel in way.ended("b", "unknown")] == ["a"]
