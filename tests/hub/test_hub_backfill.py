"""What a hub still has one by one, and what it has packed into its history."""

import asyncio
from pathlib import Path

import msgspec
from hub_double import RUN, following, hub_running, info, peer_of, rows

from trainctl.store.frames import recorded_segments
from trainctl.store.journal import JournalWriter
from trainctl.store.packing import pack_segment
from trainctl.wire import codec
from trainctl.wire.follower import EnvelopeReader, ask_range
from trainctl.wire.messages import Backfill, BackfillRequest, Envelope, History, HistoryRequest, Snapshot, Stream
from trainctl.wire.rundir import RunDir
from trainctl.wire.sequence import Gap


def record(run: RunDir, first: int, last: int) -> None:
    """One envelope a step, in a segment of its own."""
    writer = JournalWriter(run.journal)
    for step in range(first, last + 1):
        envelope = Envelope(source=RUN, epoch=1, stream="metrics", seq=step, time=1000.0 + step, body=rows(step))
        writer.append(codec.encode(envelope), "metrics", step)
    writer.close()


def test_what_was_packed_is_gone_one_by_one_and_is_all_in_the_history(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    run.info_file.write_bytes(msgspec.json.encode(info(run.path)))
    record(run, 1, 60)
    (segment,) = recorded_segments(run.journal)
    pack_segment(run.journal, segment)
    record(run, 61, 80)

    async def scenario() -> None:
        with hub_running(run.path) as hub:
            async with peer_of(hub.card()) as peer:
                answer = await peer.ask(ask("metrics", 1, 5), Backfill)
                assert (answer.gone, answer.envelopes) == (True, [])
                across = await peer.ask(ask("metrics", 58, 80), Backfill)
                assert across.gone, "the beginning decides"
                kept = await ask_range(peer, EnvelopeReader(), Gap(stream="metrics", first=61, last=80))
                assert [item.seq for item in kept] == list(range(61, 81))
                found = await peer.ask(HistoryRequest(req=0, metrics=["loss"]), History)
                (loss,) = found.series
                assert len(loss.columns["step"]) == 80 * 8
                async with following(peer) as heard:
                    (snapshot,) = (item for item in heard.items if isinstance(item, Snapshot))
                    assert (snapshot.heads["metrics"], snapshot.metrics["loss"].step) == (80, 80)

    asyncio.run(scenario())


def ask(stream: Stream, first: int, last: int) -> BackfillRequest:
    return BackfillRequest(req=0, stream=stream, first=first, last=last)
