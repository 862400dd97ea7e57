"""`trainctl log -f` prints every line once, also those that it could not hear one by one."""

import asyncio
import json

import pytest

from client.lossy_hub import LossyHub
from client.scripted_hub import make_info, rows
from trainctl.cli.log import LogPrinter, Wanted, follow_log
from trainctl.client.model import RunModel
from trainctl.client.session import open_session
from trainctl.wire.messages import Envelope, Note, StateChanged


def note(number: int) -> Note:
    return Note(time=1e9 + number, step=number, incarnation=1, actor="ann", text=str(number))


def test_lines_that_the_hub_has_packed_before_they_were_heard_are_printed_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub = LossyHub(make_info("run-1", "gpt"))
    hub.held = []
    hub.start()

    def train() -> None:
        hub.publish(rows(3, 3, loss=1.0))
        hub.publish(note(1))
        hub.publish(rows(4, 40, loss=1.0), "lost")
        hub.publish(note(2), "lost")
        hub.pack()
        hub.publish(rows(41, 42, loss=1.0))
        hub.publish(note(3))
        hub.beat()

    async def scenario() -> None:
        session = await open_session("gpt")
        try:
            printer = LogPrinter(session.model, Wanted(follow=True), as_json=True)
            following = asyncio.create_task(follow_log(session, printer))
            async with asyncio.timeout(30):
                while printer.printed < 2:  # noqa: ASYNC110 - the backlog is printed by the other task
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(train)
                while printer.printed < 45:  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.01)
                hub.publish(StateChanged(time=2e9, step=42, incarnation=1, state="finished"))
                assert await following == 0
        finally:
            await session.close()

    try:
        hub.publish(rows(1, 2, loss=1.0))
        asyncio.run(scenario())
    finally:
        hub.stop()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "metrics"]
    assert steps == list(range(1, 43))
    assert [line["text"] for line in lines if line["kind"] == "note"] == ["1", "2", "3"]


def test_a_log_of_every_twentieth_step_has_no_line_for_each_rank_that_read_late(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = Wanted(every=20)
    assert not wanted.metrics(29, {"data_first.1": 84.0}, 200)
    assert wanted.metrics(29, {"val_loss": 1.0, "data_first.1": 84.0}, 200), "what was logged between steps is shown"
    printer = LogPrinter(RunModel(), wanted, as_json=False)
    late = rows(40, 40, **{"data_first.1": 84.0})
    printer.take(Envelope(source="s", epoch=1, stream="metrics", seq=1, time=1.0, body=late))
    assert not capsys.readouterr().out
    assert not printer.printed
