"""The directory that an export goes to: it appears as a whole, or not at all."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from trainctl.client.errors import BadRequest, ClientError
from trainctl.client.jsonable import dumps

SUMMARY = "export.json"


def check_target(target: Path, *, force: bool) -> None:
    """Raises `BadRequest` where something is in the way. An earlier export gives way to `force`, nothing else does."""
    if not target.exists():
        return
    if not target.is_dir():
        raise BadRequest(f"{target} is a file; nothing was written", "name a directory that does not exist yet")
    if not any(target.iterdir()):
        return
    if not force:
        raise BadRequest(f"{target} is not empty; nothing was written", "name another directory, or add --force")
    if not (target / SUMMARY).is_file():
        raise BadRequest(
            f"{target} holds something that is no export of trainctl, and --force does not delete that",
            "name another directory",
        )


@contextlib.contextmanager
def appearing(target: Path, *, force: bool) -> Iterator[Path]:
    """A new directory beside `target` that takes its place in the end; after an error it is gone.

    Raises `ClientError`, for OSError from the body too.
    """
    check_target(target, force=force)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(6)}.new")
    try:
        beside.mkdir(parents=True)
        try:
            yield beside
            check_target(target, force=force)  # that was a while ago
            _take_place(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise ClientError(
            f"the export stopped: {error}; nothing was left at {target}, and the run is not touched",
            "make room, or name another directory",
        ) from None


def write_summary(directory: Path, summary: Mapping[str, object]) -> None:
    """Say in the directory itself what it holds; marks it as an export of ours."""
    (directory / SUMMARY).write_text(dumps(summary) + "\n", encoding="utf-8")


def _take_place(beside: Path, target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        old = target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")
        target.rename(old)
        beside.rename(target)
        shutil.rmtree(old)
    else:
        beside.rename(target)
