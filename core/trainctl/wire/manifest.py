"""The manifest that makes a checkpoint good, and what can be told from it without torch.

    checkpoints/ID/MANIFEST.json   this file: written last, before the directory gets its name
    checkpoints/ID/…               the files it lists
    checkpoints/ID.pinned          an empty mark beside it: kept whatever the retention says
    checkpoints/ID.checked.json    the last verification: {"ok", "time", "text"}

A checkpoint is good when its directory has its final name and every file it lists has the size and hash it says.
"""

import contextlib
import hashlib
import io
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from trainctl.wire.lineage import live_steps, read_branches
from trainctl.wire.messages import BestBy, CheckpointInfo
from trainctl.wire.rundir import RunDir, fsync_dir, write_atomic
from trainctl.wire.save_order import order_of
from trainctl.wire.vouched import NotOurs, is_inside, open_ours

MANIFEST = "MANIFEST.json"
FORMAT = 1
_CHUNK = 4 * 1024 * 1024


class DamagedCheckpoint(Exception):
    """A checkpoint is not what its manifest says; the message names the file."""


class UnreadCheckpoint(DamagedCheckpoint):
    """The disk did not give a file: no good now, and perhaps the next time. Never remembered as damaged."""


class ManifestFile(msgspec.Struct, frozen=True, kw_only=True):
    name: str  # relative, no "..", no absolute path
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    run: str
    step: int
    incarnation: int
    attempt: int
    world_size: int
    time: float
    files: list[ManifestFile]
    metrics: dict[str, float] = {}
    note: str | None = None
    audit_head: str | None = None  # the newest hash of the audit log then: what stood before cannot be cut off unseen
    format: int = FORMAT
    digest: str = ""  # SHA-256 of the manifest itself without this field; `write_manifest` fills it in


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Size and SHA-256 of a file. `progress` hears of every chunk's bytes. Raises OSError."""
    with path.open("rb") as file:
        return _hash(file, progress)


def _hash(file: BinaryIO, progress: Callable[[int], None] | None = None) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if progress:
            progress(len(chunk))
    return size, digest.hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write and sync the manifest of a directory whose files are already synced. Raises OSError."""
    signed = msgspec.structs.replace(manifest, digest=_digest(manifest))
    write_atomic(directory / MANIFEST, msgspec.json.format(msgspec.json.encode(signed), indent=1))


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(manifest, digest=""))).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest; check that it is ours and names only files inside the directory.

    Raises `DamagedCheckpoint` with a sentence for the operator.
    """
    try:
        with open_ours(directory, MANIFEST) as file:
            manifest = msgspec.json.decode(file.read(), type=Manifest)
    except NotOurs as error:
        raise DamagedCheckpoint(str(error)) from None
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{directory.name} has no manifest: it was never completed") from None
    except OSError as error:
        words = f"the manifest of {directory.name} could not be read: {error.strerror or error}"
        raise UnreadCheckpoint(words) from None
    except msgspec.MsgspecError as error:
        raise DamagedCheckpoint(f"the manifest of {directory.name} cannot be read: {error}") from None
    if manifest.format != FORMAT:
        raise DamagedCheckpoint(f"{directory.name} has format {manifest.format}, this version reads {FORMAT}")
    for name, times in Counter(file.name for file in manifest.files).items():
        if not is_inside(name):
            raise DamagedCheckpoint(f"the manifest of {directory.name} names a file outside it: {name!r}")
        if times > 1:
            raise DamagedCheckpoint(f"the manifest of {directory.name} lists {name!r} {times} times")
    if manifest.digest != _digest(manifest):
        raise DamagedCheckpoint(f"the manifest of {directory.name} is damaged: it is not what was written")
    return manifest


def verify(
    directory: Path, progress: Callable[[int], None] | None = None, *, only: Collection[str] | None = None
) -> Manifest:
    """Hash every file of a checkpoint against its manifest. Raises `DamagedCheckpoint`, naming the first bad file, or
    `UnreadCheckpoint` where the disk did not give one.

    `only` leaves out the files that are not in it, for ranks that share the work.
    """
    manifest = read_manifest(directory)
    for file in manifest.files:
        if only is not None and file.name not in only:
            continue
        try:
            with open_ours(directory, file.name) as opened:
                size, digest = _hash(opened, progress)
        except NotOurs as error:
            raise DamagedCheckpoint(str(error)) from None
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{directory.name}/{file.name} is missing") from None
        except OSError as error:
            words = f"{directory.name}/{file.name} could not be read: {error.strerror or error}"
            raise UnreadCheckpoint(words) from None
        _compare(directory, file, size, digest)
    return manifest


def read_vouched(directory: Path, manifest: Manifest, name: str) -> bytes:
    """The content of a small listed file: the very bytes that were hashed. Raises `DamagedCheckpoint`, OSError."""
    file = next((file for file in manifest.files if file.name == name), None)
    if file is None:
        raise DamagedCheckpoint(f"the manifest of {directory.name} does not list {name}")
    try:
        with open_ours(directory, name) as opened:
            content = opened.read()
    except NotOurs as error:
        raise DamagedCheckpoint(str(error)) from None
    _compare(directory, file, *_hash(io.BytesIO(content)))
    return content


def _compare(directory: Path, file: ManifestFile, size: int, digest: str) -> None:
    if size != file.bytes:
        raise DamagedCheckpoint(f"{directory.name}/{file.name} has {size} bytes, {file.bytes} were written")
    if digest != file.sha256:
        raise DamagedCheckpoint(f"{directory.name}/{file.name} is damaged: its hash differs from the manifest's")


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    ok: bool
    time: float
    text: str


def remember_check(directory: Path, *, ok: bool, text: str) -> None:
    """Keep the outcome of a verification beside the checkpoint; that it cannot be kept is no reason to fail."""
    with contextlib.suppress(OSError):
        write_atomic(_checked_file(directory), msgspec.json.encode(Checked(ok=ok, time=time.time(), text=text)))


def pin(directory: Path, *, pinned: bool) -> None:
    """Mark a checkpoint as pinned, or take the mark away. Raises OSError."""
    mark = directory.with_name(f"{directory.name}.pinned")
    if pinned:
        mark.touch(mode=0o600)
    else:
        mark.unlink(missing_ok=True)
    fsync_dir(directory.parent)


def list_checkpoints(checkpoints: Path) -> list[CheckpointInfo]:
    """All checkpoints that have a readable manifest, oldest first (`save_order`); stage directories are left out."""
    found = []
    try:
        entries = sorted(checkpoints.iterdir())
    except OSError:
        return []
    live = live_steps(read_branches(RunDir(checkpoints.parent)))
    for directory in entries:
        if directory.name.startswith(".") or not directory.is_dir():
            continue
        with contextlib.suppress(DamagedCheckpoint):
            manifest = read_manifest(directory)
            abandoned = bool(live) and manifest.step > live.get(manifest.incarnation, -1)
            found.append(_info(directory, manifest, abandoned=abandoned))
    return sorted(found, key=order_of)


def unreadable(checkpoints: Path) -> list[tuple[str, float, str]]:
    """Checkpoints whose manifest is no good or gone: name, when the directory was last changed, why."""
    found = []
    with contextlib.suppress(OSError):
        for directory in sorted(checkpoints.iterdir()):
            if directory.name.startswith(".") or not directory.is_dir():
                continue
            if not os.path.lexists(directory / MANIFEST) and not list(directory.glob("rank-*.pt")):
                continue  # somebody else's
            try:
                read_manifest(directory)
            except DamagedCheckpoint as error:
                found.append((directory.name, directory.stat().st_mtime, str(error)))
    return found


def kept_audit_heads(checkpoints: Path) -> dict[str, str]:
    """Hashes of the audit log that checkpoints keep, each with the id of the first that does."""
    found: dict[str, str] = {}
    for info in list_checkpoints(checkpoints):
        with contextlib.suppress(DamagedCheckpoint):
            head = read_manifest(checkpoints / info.id).audit_head
            if head is not None:
                found.setdefault(head, info.id)
    return found


def _info(directory: Path, manifest: Manifest, *, abandoned: bool) -> CheckpointInfo:
    checked: bool | None = None
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        checked = msgspec.json.decode(_checked_file(directory).read_bytes(), type=Checked).ok
    return CheckpointInfo(
        id=directory.name,
        step=manifest.step,
        time=manifest.time,
        bytes=sum(file.bytes for file in manifest.files),
        incarnation=manifest.incarnation,
        metrics=manifest.metrics,
        pinned=directory.with_name(f"{directory.name}.pinned").exists(),
        verified=checked,
        note=manifest.note,
        abandoned=abandoned,
        world_size=manifest.world_size,
    )


def resized_words(written_by: int, world_size: int) -> str:
    """What is not exact when `world_size` ranks read what `written_by` wrote; empty where they are as many, or 0."""
    if not written_by or not world_size or written_by == world_size:
        return ""
    return (
        f"written by {written_by} rank{'s' * (written_by != 1)} and read by {world_size}: random numbers are not "
        "restored, and each rank's place in the data is computed anew"
    )


def _checked_file(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.checked.json")


def ranked(checkpoints: Sequence[CheckpointInfo], best_by: BestBy | None = None) -> list[CheckpointInfo]:
    """Whole checkpoints of the live branch that have the metric, the best first, of equals the older."""
    by = best_by or BestBy()
    good = [info for info in checkpoints if info.verified is not False and not info.abandoned]
    names = ("val_loss", "loss") if by.metric is None else (by.metric,)
    name = next((name for name in names if any(name in info.metrics for info in good)), None)
    if name is None:
        return []
    sign = -1 if by.mode == "max" else 1
    return sorted((info for info in good if name in info.metrics), key=lambda info: sign * info.metrics[name])


def pick(checkpoints: Sequence[CheckpointInfo], target: str, best_by: BestBy | None = None) -> CheckpointInfo | None:
    """The checkpoint that an operator means by `last`, `best` (as the run says it is found), a step or an id.

    Damaged ones and those of an abandoned branch are never `last` or `best`. Of several at one step the newest is
    meant, of the live branch if there is one.
    """
    good = [info for info in checkpoints if info.verified is not False and not info.abandoned]
    if target == "last":
        return good[-1] if good else None
    if target == "best":
        return next(iter(ranked(checkpoints, best_by)), None)
    abandoned, live = ([info for info in checkpoints if info.abandoned is left] for left in (True, False))
    for info in reversed([*abandoned, *live]):
        if info.id == target or (target.isdigit() and info.step == int(target)):
            return info
    return None
