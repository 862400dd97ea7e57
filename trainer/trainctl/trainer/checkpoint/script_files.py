"""A script's own checkpointer, driven by ours: it writes and reads its files, we vouch for them.

    .ID.stage/script/   every rank's `save(directory)` writes here, at the boundary
    ID/script/          every rank's `load(directory)` reads here, once all files were verified

What `save` takes is part of the stall. What it left is synced, hashed and listed in the manifest in the background, the
ranks sharing the files among them. `load` is code of the script's, and no assignment: where it raises, the job stops.
"""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from trainctl.trainer.checkpoint.background import Pace
from trainctl.trainer.checkpoint.errors import CheckpointError
from trainctl.trainer.checkpoint.ranks import Ranks
from trainctl.wire.manifest import Manifest, ManifestFile, hash_file
from trainctl.wire.rundir import fsync_dir

FOLDER = "script"

_Files: TypeAlias = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class ScriptFiles:
    """What the script gave as `save` and `load`; each is called on every rank with one directory for all."""

    save: _Files
    load: _Files


def script_files(save: _Files | None, load: _Files | None) -> ScriptFiles | None:
    """The pair, checked. Raises TypeError for one without the other, or what cannot be called."""
    if save is None and load is None:
        return None
    for name, given in (("save", save), ("load", load)):
        if not callable(given):
            other = "load" if name == "save" else "save"
            found = f"without {name}=" if given is None else f"with {name}={given!r}"
            raise TypeError(f"Run.attach({other}=…) {found}: give two functions of a directory, save= and load=")
    assert save is not None
    assert load is not None
    return ScriptFiles(save=save, load=load)


def has_script_files(manifest: Manifest) -> bool:
    """Whether a checkpoint was written by a script's own `save`."""
    return any(file.name.startswith(f"{FOLDER}/") for file in manifest.files)


def let_save(files: ScriptFiles, stage: Path, ranks: Ranks) -> None:
    """Have every rank write its files. A collective. Raises CheckpointError, alike on all ranks."""
    directory = stage / FOLDER
    ranks.on_first("the script's files cannot be begun", lambda: directory.mkdir(mode=0o700))
    ranks.together("the script's save= failed", lambda: files.save(directory))


def vouch_for(stage: Path, ranks: Ranks, pace: Pace) -> list[ManifestFile]:
    """Sync and hash what was written, each rank its share; on every rank the list of all.

    A collective; raises CheckpointError, alike on all ranks.
    """
    names = ranks.gather(ranks.on_first("the script's files cannot be listed", lambda: _written(stage)))[0] or []
    mine = ranks.together(
        "the script's files cannot be synced",
        lambda: [_synced(stage, name, pace) for name in names[ranks.rank :: ranks.world_size]],
    )
    return [file for share in ranks.gather(mine) for file in share]


def _written(stage: Path) -> list[str]:
    """The names of all files, relative to the stage. Directories are synced, so that the names in them stay."""
    found: list[str] = []
    for folder, folders, names in os.walk(stage / FOLDER, onerror=_raise):
        for name in [*folders, *names]:
            path = Path(folder) / name
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.append(str(path.relative_to(stage)))
            elif not stat.S_ISDIR(mode):  # a link to a directory too: os.walk does not follow it
                raise CheckpointError(f"the script's save= made {path.relative_to(stage)}, which is no regular file")
        fsync_dir(Path(folder))
    if not found:
        raise CheckpointError("the script's save= wrote no file into the directory that it was given")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _synced(stage: Path, name: str, pace: Pace) -> ManifestFile:
    handle = os.open(stage / name, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    size, digest = hash_file(stage / name, lambda _bytes: pace.rest())
    return ManifestFile(name=name, bytes=size, sha256=digest)
