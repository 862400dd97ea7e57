"""Hashing a checkpoint for an operator who asked for it, and what is remembered of that."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainctl.wire.manifest import DamagedCheckpoint, UnreadCheckpoint, remember_check, verify


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a verification found. Not `readable`: the disk gave an error, so it is neither good nor damaged."""

    ok: bool
    text: str
    readable: bool = True


def check(directory: Path, progress: Callable[[int], None] | None = None) -> Verdict:
    """Hash a checkpoint's files and remember the outcome beside it; `progress` hears of every chunk's bytes."""
    try:
        manifest = verify(directory, progress)
    except UnreadCheckpoint as error:
        return Verdict(ok=False, text=f"{error}. It may be whole: try again", readable=False)
    except DamagedCheckpoint as damage:
        verdict = Verdict(ok=False, text=str(damage))
    else:
        verdict = Verdict(ok=True, text=f"{len(manifest.files)} files have the sizes and hashes that the manifest says")
    remember_check(directory, ok=verdict.ok, text=verdict.text)
    return verdict
