"""Checkpoints that are a manifest and no more, for what goes by what manifests say."""

from pathlib import Path

from trainctl.wire.manifest import Manifest, write_manifest


def write_empty_checkpoint(
    checkpoints: Path, step: int, incarnation: int, time: float, *, attempt: int = 1, number: int = 1
) -> Path:
    """The `number`-th save of an attempt, at a time in Unix seconds; returns its directory."""
    directory = checkpoints / f"step-{step:08d}-{attempt}.{number}"
    directory.mkdir(mode=0o700)
    manifest = Manifest(
        id=directory.name,
        run="r",
        step=step,
        incarnation=incarnation,
        attempt=attempt,
        world_size=1,
        time=time,
        files=[],
    )
    write_manifest(directory, manifest)
    return directory
