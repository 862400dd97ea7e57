"""`trainctl checkpoint export`: a checkpoint's weights as plain safetensors, written by a process that has torch."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from trainctl.client.errors import BadRequest, ClientError, NotReachable, Rejected

_HERE = "run it on a machine where training runs, with the run's directory: trainctl checkpoint export -r RUN_DIR …"


def need_torch() -> None:
    """Raises `ClientError` where this environment cannot read tensors."""
    for name, what in (("torch", "PyTorch"), ("safetensors", "safetensors")):
        if find_spec(name) is None:
            hint = "pip install 'trainctl-cockpit[export]'" if name == "safetensors" else _HERE
            raise ClientError(f"export needs {what}, and this environment has none; nothing was written", hint)


def seen_from_here(directory: Path | None, checkpoint: str, run: str) -> Path:
    """Where the checkpoint's files are. Raises `NotReachable` where this machine does not see them."""
    if directory is None or not (directory / "checkpoints" / checkpoint).is_dir():
        raise NotReachable(f"the files of {run} are not to be seen from this machine; nothing was written", _HERE)
    return directory / "checkpoints" / checkpoint


def check_target(file: Path, *, force: bool) -> None:
    """Raises `BadRequest` for a file that is not to be written, before anything is read."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        what = "is a directory" if file.is_dir() else f"is in {file.absolute().parent}, which is no directory"
        raise BadRequest(f"{file} {what}; nothing was written")
    if file.exists() and not force:
        raise BadRequest(f"{file} exists already; nothing was written", "--force replaces it")


def export(directory: Path, file: Path, *, model: int | None, force: bool) -> dict[str, object]:
    """Verify the checkpoint in `directory` and write its weights; what was written. Raises `ClientError`."""
    command = [sys.executable, "-P", "-m", "trainctl.trainer.checkpoint.export", str(directory), str(file.absolute())]
    command += ["--force"] if force else []
    command += ["--model", str(model)] if model is not None else []
    # Warnings of a library are not what went wrong, and the last line is.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONWARNINGS": "ignore"}
    )
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        raise Rejected(words[-1] if words else f"the export ended with {done.returncode}; nothing was written")
    written = json.loads(done.stdout.strip().splitlines()[-1])
    assert isinstance(written, dict)
    return written
