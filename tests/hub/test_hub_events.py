"""A hub keeps the newest events in memory and answers with the others from the journal."""

import asyncio
import time
from pathlib import Path

import pytest
from hub_double import hub_running

from store.recorded_events import EventRun
from trainctl.cli.log import Wanted, print_log
from trainctl.client.session import open_session
from trainctl.store.frames import segment_file, segments
from trainctl.store.record import EVENTS_KEPT
from trainctl.wire.messages import Anomaly, Event, Note, Snapshot

MORE = 300


def test_events_that_the_hub_keeps_no_more_come_from_its_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = EventRun(tmp_path / "run")
    run.tell(EVENTS_KEPT + MORE, rows=False)
    run.close()

    async def scenario() -> list[Event]:
        session = await open_session(str(run.path))
        try:
            assert session.live
            assert isinstance(await session.picture(), Snapshot)
            assert len(await session.events(limit=2000)) == 2000
            parts = [page.events async for page in session.all_events()]
            assert len(parts) > EVENTS_KEPT // 2000
            (notes,) = [page.events async for page in session.all_events(kinds=["note"], since=time.time())]
            assert notes == []
            return [event for part in reversed(parts) for event in part]
        finally:
            await session.close()

    with hub_running(run.path):
        events = asyncio.run(scenario())
        (recorded, _) = segments(run.journal)
        segment_file(run.journal, recorded).unlink()
        assert print_log(str(run.path), None, Wanted(from_step=EVENTS_KEPT + MORE), as_json=True) == 0
        missing = f"{MORE + len(events) - len(run.texts)} older events are missing: the journal does not have them\n"
        assert capsys.readouterr().err == missing
    assert [event.text for event in events if isinstance(event, Note | Anomaly)][: len(run.texts)] == run.texts
