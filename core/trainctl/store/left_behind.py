"""What a rank 0 left in the run's directory and no hub has taken yet, into the record of who opens that directory."""

import logging
from pathlib import Path

import msgspec

from trainctl.store.record import RunRecord
from trainctl.wire import codec
from trainctl.wire.left_behind import Head, Left, left_in
from trainctl.wire.messages import Body, Envelope, StateChanged, stream_of

log = logging.getLogger(__name__)


def take_left(record: RunRecord, directory: Path) -> None:
    """Bring a record that is up to the end of its journal to the end of its run. The files stay for the hub.

    Raises OSError.
    """
    for path in left_in(directory):
        try:
            left = Left(path)
        except (codec.DecodeError, OSError) as error:
            log.warning("%s cannot be read, and is passed over: %s", path, error)
            continue
        if left.head.hello.info.id == record.info.id:
            _take(record, left)


def _take(record: RunRecord, left: Left) -> None:
    head, have = left.head, record.link_have(left.head.attempt)
    if head.attempt > record.state.attempt or (head.attempt == record.state.attempt and not record.knows(head.attempt)):
        _apply(record, head, _begins(head))
    for message in left.records():
        if message.link > have:
            _apply(record, head, message.body, message.link)
    if not head.tells_the_end(record.state):
        return
    run, _ = head.ended(have)
    before, bye = record.state.state, head.bye
    ended = StateChanged(
        time=head.time,
        step=bye.step,
        incarnation=run.incarnation,
        state=bye.state,
        before=before,
        reason=bye.reason,
        attempt=head.attempt,
    )
    _apply(record, head, ended)
    record.progress(msgspec.structs.replace(record.state, dropped=run.dropped, nans=run.nans, infs=run.infs))


def _begins(head: Head) -> StateChanged:
    hello = head.hello
    return StateChanged(
        time=hello.info.started,
        step=hello.step,
        incarnation=hello.incarnation,
        state="starting",
        attempt=head.attempt,
        parent=hello.parent,
    )


def _apply(record: RunRecord, head: Head, body: Body, link: int = 0) -> None:
    stream = stream_of(body)
    record.apply(
        Envelope(
            source=head.hello.info.id,
            epoch=record.epochs.get(stream, 0),
            stream=stream,
            seq=record.heads[stream] + 1,
            time=head.time,
            body=body,
            attempt=head.attempt,
            link=link,
        )
    )
