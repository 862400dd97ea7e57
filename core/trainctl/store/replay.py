"""From a run's directory to its `RunRecord`: the saved index as far as it goes, then the frames of the journal."""

import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from trainctl.store.blocks import Block
from trainctl.store.frames import Damage, Frame, missing_segment, read_frames
from trainctl.store.journal import JournalIndex
from trainctl.store.left_behind import take_left
from trainctl.store.packed import UNUSABLE, PackedDamage, PackedRows, decode_packed, envelopes_of, sealed_of
from trainctl.store.record import RunRecord
from trainctl.store.saved import read_index
from trainctl.wire import codec
from trainctl.wire.messages import FINAL_STATES, Anomaly, Envelope, RunInfo
from trainctl.wire.rundir import RunDir

log = logging.getLogger(__name__)


class NoRecord(Exception):
    """A directory holds no recorded run; the message says what is missing."""


def read_info(directory: Path) -> RunInfo:
    """Who the run in a directory is. Raises `NoRecord`."""
    path = RunDir(directory).info_file
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunInfo)
    except FileNotFoundError:
        raise NoRecord(f"{directory} holds no run: there is no run.json in it") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise NoRecord(f"{path} cannot be read: {error}") from None


def replay(record: RunRecord, index: JournalIndex, frames: Iterable[Frame]) -> int:
    """Apply recorded frames and note in the index where envelopes stand; return how many were not readable."""
    decode = codec.envelope_decoder()
    told = {damage.segment for damage in record.damage}
    for found in frames:
        try:
            if found.packed:
                _replay_packed(record, index, found, decode)
                continue
            envelope = decode(found.payload)
        except codec.DecodeError:
            if found.segment not in told:  # whole by its checksum: another version wrote it
                told.add(found.segment)
                why = "holds records that this version of trainctl cannot read"
                record.damage.append(Damage(segment=found.segment, offset=found.offset, bytes=0, torn=False, why=why))
            continue
        assert isinstance(envelope, Envelope)
        record.apply(envelope)
        index.note(envelope.stream, envelope.seq, found.segment, found.offset, envelope.epoch)
    return decode.refused


def _replay_packed(record: RunRecord, index: JournalIndex, found: Frame, decode: codec.Decoder) -> None:
    try:
        packed = decode_packed(found.payload)
        if isinstance(packed, PackedRows):
            place = sealed_of(packed, found.segment, found.offset)
            record.apply_block(Block(packed), place)
            index.skip("metrics", place.last)
        elif isinstance(packed, PackedDamage):
            record.damage.extend(packed.damage)
        else:
            unreadable: codec.DecodeError | None = None
            for payload in envelopes_of(packed):
                try:
                    _replay_one(record, index, payload, decode)
                except codec.DecodeError as error:
                    unreadable = error  # the others beside it are read, and then it is told
            if unreadable is not None:
                raise unreadable
    except codec.DecodeError:
        raise
    except UNUSABLE as error:
        decode.refused += 1
        raise codec.DecodeError(f"not a packed frame: {error}") from None


def _replay_one(record: RunRecord, index: JournalIndex, payload: bytes, decode: codec.Decoder) -> None:
    envelope = decode(payload)
    assert isinstance(envelope, Envelope)
    record.apply(envelope)
    index.skip(envelope.stream, envelope.seq)


def replay_journal(record: RunRecord, index: JournalIndex, journal: Path) -> None:
    """Bring an empty record up to the end of a journal, from its saved index as far as that goes. Raises OSError."""
    saved = read_index(journal)
    after = 0
    if saved is not None:
        try:
            record.restore(saved)
        except UNUSABLE as error:  # whole by its checksum and no index of ours: it is only a view
            log.warning("the saved index in %s is nonsense, the journal is replayed: %r", journal, error)
            saved = None
    if saved is not None:
        after = max((number for number, _ in saved.segments), default=0)
        covered = {number for number, _ in saved.segments}
        record.damage += [missing_segment(number) for number in range(1, after) if number not in covered]
        for stream, gone in saved.gone.items():
            index.skip(stream, gone)
    replay(record, index, read_frames(journal, record.damage, after=after))


def load_record(run_dir: Path) -> RunRecord:
    """The run that a directory holds, replayed from its journal and from what rank 0 left beside it. Raises `NoRecord`.

    A recording that ends without a final state is of a run that was lost. The directory may have been moved.
    """
    directory = Path(run_dir).absolute()
    record = RunRecord(msgspec.structs.replace(read_info(directory), dir=str(directory)))
    journal = RunDir(directory).journal
    try:
        replay_journal(record, JournalIndex(journal), journal)
        take_left(record, directory)
    except OSError as error:
        raise NoRecord(f"the journal in {journal} cannot be read: {error}") from None
    for damage in record.damage:
        if not damage.torn:
            record.found(
                Anomaly(
                    time=record.last_time,
                    step=record.state.step,
                    incarnation=record.state.incarnation,
                    what="journal",
                    text=f"{damage}; the rest of the history is whole",
                    subject="damaged",
                )
            )
    if record.state.state not in FINAL_STATES:
        reason = "the recording ends without saying how the run ended"
        record.progress(msgspec.structs.replace(record.state, state="lost", since=record.last_time, reason=reason))
    return record
