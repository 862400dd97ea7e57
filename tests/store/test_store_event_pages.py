"""All events of a run can be had, page by page: the newest from memory, the others from the journal's files."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from store.recorded_events import BEGAN, EventRun
from trainctl.store.frames import packed_file, segments
from trainctl.store.journal import JournalIndex
from trainctl.store.older_events import OlderEvents
from trainctl.store.record import RunRecord
from trainctl.store.replay import load_record, replay_journal
from trainctl.store.saved import index_file, packed_sizes, write_index
from trainctl.wire.codec import REPLY_LIMIT
from trainctl.wire.messages import Anomaly, Event, Events, EventsRequest, Note

KEPT = 60


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EventRun:
    """400 events in many segments, by two hubs; the second counts from an older number and gets some of them again."""
    monkeypatch.setattr("trainctl.store.record.EVENTS_KEPT", KEPT)
    made = EventRun(tmp_path, segment_bytes=8000)
    made.tell(150)
    made.close()
    made.hub(back=20)
    made.repeat(149, made.link - 3)
    made.repeat(150, made.link - 1)
    made.tell(250)
    made.pack(but=3)
    assert len(segments(made.journal)) > 8
    return made


def opened(run: EventRun) -> RunRecord:
    record = RunRecord(run.info)
    replay_journal(record, JournalIndex(run.journal), run.journal)
    return record


def pages(record: RunRecord, older: OlderEvents, *, within_s: float | None = 0.0, **asked: object) -> list[Events]:
    """What a client gets that asks until there is no more."""
    found: list[Events] = []
    request = msgspec.convert({"req": 1, "limit": 7} | asked, EventsRequest)
    while len(found) < 1000:
        if record.wants_older(request):
            page = older.page(request, record.oldest_event, record.events_forgotten, within_s=within_s)
        else:
            page = record.events_page(request)
        found.append(page)
        if page.before is None:
            return found
        request = msgspec.structs.replace(request, before=page.before)
    raise AssertionError("it goes round in circles")


def texts(found: list[Events]) -> list[str]:
    events: list[Event] = [event for page in reversed(found) for event in page.events]
    return [event.text for event in events if isinstance(event, Note | Anomaly)]


@pytest.mark.parametrize("within_s", [0.0, 10.0, None])
def test_all_events_come_once_and_in_order(run: EventRun, within_s: float | None) -> None:
    record = opened(run)
    assert (len(record.events), record.events_forgotten) == (KEPT, 400 - KEPT)
    found = pages(record, OlderEvents(run.journal), within_s=within_s)
    assert texts(found) == run.texts
    assert {page.missing for page in found} == {0}
    if within_s is not None:
        assert max(len(page.events) for page in found) == 7


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"kinds": ["note"]}, lambda number: number % 10 == 0),
        ({"from_step": 33}, lambda number: number >= 33),
        ({"since": BEGAN + 120}, lambda number: number >= 120),
    ],
)
def test_a_page_has_what_was_asked_for_wherever_it_is(
    run: EventRun, asked: dict[str, object], match: Callable[[int], bool]
) -> None:
    expected = [text for number, text in enumerate(run.texts, 1) if match(number)]
    for within_s in (0.0, None):
        assert texts(pages(opened(run), OlderEvents(run.journal), within_s=within_s, **asked)) == expected


def test_a_run_that_was_opened_by_its_index_has_the_same_pages(run: EventRun) -> None:
    record, covered = opened(run), segments(run.journal)[:-3]
    write_index(run.journal, record.save(packed_sizes(run.journal, covered), {"metrics": 397, "events": 377}))
    again = opened(run)
    assert (again.oldest_event, again.events_forgotten) == (record.oldest_event, 400 - KEPT)
    assert texts(pages(again, OlderEvents(run.journal))) == run.texts


def test_an_index_that_knows_no_places_is_used_while_nothing_is_forgotten(
    run: EventRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such an index was saved before events had pages; of a long run it is passed over and the journal is read."""
    for kept in (1000, KEPT):
        monkeypatch.setattr("trainctl.store.record.EVENTS_KEPT", kept)
        record, covered = opened(run), segments(run.journal)[:-3]
        saved = record.save(packed_sizes(run.journal, covered), {"metrics": 397, "events": 377})
        write_index(run.journal, msgspec.structs.replace(saved, event_places=(), events_forgotten=0))
        assert texts(pages(opened(run), OlderEvents(run.journal))) == run.texts
    index_file(run.journal).unlink()


def test_pages_go_on_where_they_were_while_the_run_goes_on(run: EventRun) -> None:
    """What was in memory when the first page was read is in the journal only when the second is."""
    record, older = opened(run), OlderEvents(run.journal)
    first = record.events_page(EventsRequest(req=1, limit=30))
    run.hub()
    run.tell(200)
    run.close()
    later = pages(opened(run), older, before=first.before)
    assert texts([first, *later]) == run.texts[:400]


def test_what_was_deleted_from_the_journal_is_said_to_be_missing(run: EventRun) -> None:
    record, older = opened(run), OlderEvents(run.journal)
    assert pages(record, older)[-1].missing == 0
    packed_file(run.journal, segments(run.journal)[0]).unlink()
    found = pages(record, older)
    got = texts(found)
    assert got == run.texts[len(run.texts) - len(got) :]
    assert found[-1].missing == 400 - len(got) > 0


def test_a_page_fits_into_an_answer(tmp_path: Path) -> None:
    record = load_record(EventRun(tmp_path).path)
    for number in range(10):
        record.found(Note(time=BEGAN, step=number, incarnation=1, actor="ann", text="x" * (REPLY_LIMIT // 4)))
    found = pages(record, OlderEvents(tmp_path), limit=2000)
    assert [event.step for page in reversed(found) for event in page.events] == list(range(10))
    assert all(len(msgspec.msgpack.encode(page)) < REPLY_LIMIT for page in found)
