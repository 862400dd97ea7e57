"""Rank 0's end of the link, with a hub that reads, freezes, dies and comes back: what arrives, what is counted."""

import socket
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest

from trainctl.trainer.link import KEEP_BYTES, HubProcess, Link, keep_bytes
from trainctl.wire import codec
from trainctl.wire.messages import (
    Column,
    FromRank,
    LinkAck,
    LinkBye,
    LinkHello,
    LinkProgress,
    LinkRecord,
    LinkWelcome,
    Note,
    RankFigures,
    Ranks,
    Rows,
    RunInfo,
    RunState,
)
from trainctl.wire.paths import link_socket

RUN = "link-test"
KEEP_S = 6.0


class NoHub(HubProcess):
    """The hub of these tests is the test."""

    def __init__(self) -> None:
        self.asked = 0

    def ensure(self, now: float) -> None:
        self.asked += 1

    def settled(self) -> None:
        pass

    def reap(self) -> None:
        pass


class FakeHub:
    """Reads when it is told to; between that it is as good as frozen."""

    def __init__(self) -> None:
        self._path = link_socket(RUN)
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self._path))
        self._listener.listen(8)
        self._listener.setblocking(False)
        self._decode = codec.from_rank_decoder()
        self.connection: socket.socket | None = None
        self.heard: list[FromRank] = []
        self.have = 0

    def accept(self) -> None:
        """Take the newest connection, as a hub that lives reads no older one."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            if self.connection is not None:
                self.connection.close()
            connection.setblocking(False)
            self.connection = connection

    def read(self, limit: int = 1_000_000) -> list[FromRank]:
        assert self.connection is not None
        read: list[FromRank] = []
        while len(read) < limit:
            try:
                packet = self.connection.recv(codec.DATA_LIMIT)
            except BlockingIOError:
                break
            if not packet:
                break
            message = self._decode(packet)
            if isinstance(message, LinkRecord):
                self.have = max(self.have, message.link)
            read.append(message)  # type: ignore[arg-type]
        self.heard += read
        return read

    def say(self, message: LinkWelcome | LinkAck) -> None:
        assert self.connection is not None
        self.connection.send(codec.encode(message))

    def steps(self) -> list[int]:
        return [step for message in self.heard if isinstance(message, LinkRecord) for step in _steps(message)]

    def die(self) -> None:
        for end in (self.connection, self._listener):
            if end is not None:
                end.close()
        self._path.unlink(missing_ok=True)


def _steps(message: LinkRecord) -> list[int]:
    assert isinstance(message.body, Rows)
    return message.body.steps


def rows(step: int, columns: int = 1) -> Rows:
    data = np.full(1, step, "<f8").tobytes()
    names = [Column(name=f"metric_{number}", dtype="f8", data=data) for number in range(columns)]
    return Rows(attempt=1, incarnation=1, steps=[step], times=[float(step)], columns=names)


def hello() -> LinkHello:
    info = RunInfo(run="t", id=RUN, dir="/nowhere", host="h", created=0.0, world_size=1, started=0.0)
    return LinkHello(info=info, incarnation=1, step=0, pid=1)


def progress(step: int) -> LinkProgress:
    return LinkProgress(run=RunState(state="running", since=0.0, step=step, step_time=0.0))


class Pair:
    """A rank that logs one row a second, by a clock of its own, and the hub it talks to."""

    def __init__(self) -> None:
        self.hub = FakeHub()
        self.link = Link(run_id=RUN, hub=NoHub(), hello=hello, keep_s=KEEP_S)
        self.now = 0.0
        self.step = 0

    def meet(self) -> None:
        self.link.tick(self.now)
        self.hub.accept()
        (said,) = self.hub.read(1)
        assert isinstance(said, LinkHello)
        self.hub.say(LinkWelcome(epoch=1, have=self.hub.have))
        self.link.tick(self.now)

    def train(self, seconds: int, *, columns: int = 1) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.step += 1
            self.link.record(rows(self.step, columns), self.now)
            self.link.tick(self.now)

    def settle(self) -> None:
        """The hub reads everything there is and has it on disk."""
        for _ in range(1000):
            self.link.tick(self.now)
            if not self.hub.read():
                break
        self.hub.say(LinkAck(link=self.hub.have))
        self.link.tick(self.now)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.link.close()
    made.hub.die()


def test_everything_arrives_once_and_in_order(pair: Pair) -> None:
    pair.meet()
    pair.train(5)
    pair.settle()
    assert pair.hub.steps() == [1, 2, 3, 4, 5]
    assert (pair.link.lost, pair.link.drained()) == (0, True)


def test_a_hub_frozen_for_less_than_is_kept_gets_everything_once(pair: Pair) -> None:
    pair.meet()
    pair.train(3)
    pair.settle()
    pair.train(int(KEEP_S) - 1)  # nobody reads
    pair.settle()
    assert pair.hub.steps() == list(range(1, pair.step + 1))
    assert pair.link.lost == 0
    assert pair.link.connects == 1, "the connection held: a frozen hub is not a dead one"


def test_what_the_socket_took_from_a_frozen_hub_is_not_called_lost_when_it_arrives(pair: Pair) -> None:
    pair.meet()
    pair.train(int(KEEP_S) * 10)  # long past what is kept, but all of it fits the socket
    assert pair.link.lost == 0
    pair.settle()
    assert pair.hub.steps() == list(range(1, pair.step + 1))
    assert (pair.link.lost, pair.link.drained()) == (0, True)


def test_a_hub_frozen_for_longer_misses_exactly_what_is_counted(pair: Pair) -> None:
    pair.meet()
    pair.train(int(KEEP_S) * 100, columns=500)  # more than a socket takes
    pair.settle()
    arrived = pair.hub.steps()
    assert arrived == sorted(set(arrived)), "once, and in order"
    missing = set(range(1, pair.step + 1)) - set(arrived)
    assert missing
    assert pair.link.lost == len(missing)
    assert arrived[-int(KEEP_S) :] == list(range(pair.step - int(KEEP_S) + 1, pair.step + 1)), "the newest are kept"
    assert pair.link.drained()


def test_what_memory_did_not_hold_is_counted_apart_from_what_waited_for_too_long(pair: Pair) -> None:
    pair.link._keep_bytes = 100_000
    pair.meet()
    pair.train(int(KEEP_S), columns=500)  # three records of 30 kB fit
    pair.hub.die()
    pair.link.tick(pair.now)  # notices
    pair.hub = FakeHub()
    pair.meet()
    pair.settle()
    assert pair.link.lost == pair.step - len(pair.hub.steps()) > 0
    assert pair.link.crowded == pair.link.lost, "none of it was a minute old"
    lost, pair.link._keep_bytes = pair.link.lost, KEEP_BYTES[0]
    pair.hub.die()
    pair.train(int(KEEP_S) * 2)
    assert (pair.link.crowded, pair.link.lost > lost) == (lost, True), "and these only waited"


def test_how_much_is_kept_depends_on_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_AVPHYS_PAGES": 0, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", lambda name: pages[name])
    kept = [keep_bytes() for pages["SC_AVPHYS_PAGES"] in (0, 2 * 2**20, 2**30)]
    assert kept == [KEEP_BYTES[0], 2 * 2**20 * 4096 // 50, KEEP_BYTES[1]]


def test_what_waits_for_a_frozen_hub_does_not_grow(pair: Pair) -> None:
    pair.meet()
    pair.train(int(KEEP_S) * 100, columns=500)
    for step in range(2000):
        pair.link.tell(progress(step))
    waiting = vars(pair.link)
    sizes = {name: len(value) for name, value in waiting.items() if isinstance(value, deque | dict)}
    assert sizes["_kept"] <= KEEP_S + 1
    assert sizes["_unsent"] <= KEEP_S + 1
    assert sizes["_notes"] <= 5
    assert sizes["_doubtful"] < 600, "what the socket took, at most"


def test_a_hub_that_was_killed_while_frozen_costs_exactly_what_is_counted(pair: Pair) -> None:
    pair.meet()
    pair.train(2)
    pair.settle()
    journal = pair.hub.have
    pair.train(int(KEEP_S) * 3)
    pair.hub.die()
    pair.train(2)
    pair.hub = FakeHub()
    pair.hub.have = journal
    pair.meet()
    pair.settle()
    arrived = [1, 2, *pair.hub.steps()]
    assert arrived == sorted(set(arrived))
    assert pair.link.lost == pair.step - len(arrived)
    assert 0 < pair.link.lost <= pair.step - 2 - KEEP_S


def test_a_hub_that_was_killed_gets_the_last_minute_again(pair: Pair) -> None:
    pair.meet()
    pair.train(4)
    pair.hub.read()
    pair.hub.die()  # with nothing of it on disk
    pair.train(1)
    pair.hub = FakeHub()
    pair.meet()
    pair.settle()
    assert pair.hub.steps() == [1, 2, 3, 4, 5]
    assert pair.link.lost == 0


def test_without_any_hub_the_loss_is_counted_at_once(pair: Pair) -> None:
    pair.hub.die()
    pair.train(int(KEEP_S) * 3)
    assert pair.link.lost == pair.step - KEEP_S - 1


def test_a_message_that_replaces_itself_goes_out_newest_and_the_goodbye_goes_last(pair: Pair) -> None:
    pair.meet()
    pair.hub.read()
    pair.link.tell(progress(1))
    pair.link.tell(progress(2))
    pair.link.record(rows(1), 1.0)
    pair.link.tell(LinkBye(state="finished", step=1))
    pair.link.tick(1.0)
    said = pair.hub.read()
    assert [type(message) for message in said] == [LinkProgress, LinkRecord, LinkBye]
    assert isinstance(said[0], LinkProgress)
    assert said[0].run.step == 2


def test_what_no_packet_holds_is_counted_apart(pair: Pair) -> None:
    pair.meet()
    pair.link.record(Note(time=0.0, step=1, incarnation=1, actor="mk", text="x" * 200_000), 1.0)
    pair.train(1)
    pair.settle()
    assert pair.hub.steps() == [1]
    assert (pair.link.oversize, pair.link.lost) == (1, 0)


def test_what_is_too_large_for_one_packet_comes_in_several_and_says_the_same(pair: Pair) -> None:
    phases = {f"phase_{number}".ljust(16, "x"): 0.0123 for number in range(14)}
    node = "gpu-node-0123.cluster.example.org"
    ranks = [
        RankFigures(rank=rank, node=node, pid=rank, state="running", step=10**6, time=1.7e9, phases_s=phases)
        for rank in range(400)
    ]
    wide = rows(1, columns=10_000)
    steps = list(range(20_000))
    data = np.arange(20_000, dtype="<f4").tobytes()
    column = Column(name="loss", dtype="f4", data=data)
    long = Rows(attempt=1, incarnation=1, steps=steps, times=[1.7e9] * 20_000, columns=[column])
    pair.meet()
    for body in (Ranks(incarnation=3, ranks=ranks), wide, long):
        pair.link.record(body, 1.0)
    pair.settle()
    said = [message.body for message in pair.hub.heard if isinstance(message, LinkRecord)]
    told = [body for body in said if isinstance(body, Ranks)]
    assert [figures for body in told for figures in body.ranks] == ranks
    assert {body.incarnation for body in told} == {3}
    in_parts = [body for body in said if isinstance(body, Rows) and body.steps == wide.steps]
    assert [column for body in in_parts for column in body.columns] == wide.columns
    in_blocks = [body for body in said if isinstance(body, Rows) and len(body.steps) > 1]
    assert [step for body in in_blocks for step in body.steps] == steps
    assert b"".join(body.columns[0].data for body in in_blocks) == data
    assert (pair.link.oversize, pair.link.lost, pair.link.drained()) == (0, 0, True)
