"""Where trainctl keeps state, configuration and sockets of one user."""

import os
import stat
import tempfile
from pathlib import Path


class UnsafePath(PermissionError):
    """A directory or file that must be ours alone is not."""


def state_home() -> Path:
    """`TRAINCTL_HOME`, or the XDG state directory: cards and runs. Clusters share it between nodes."""
    if given := os.environ.get("TRAINCTL_HOME"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "trainctl"


def config_home() -> Path:
    """`TRAINCTL_CONFIG`, or the XDG config directory: keys, grants, config.toml."""
    if given := os.environ.get("TRAINCTL_CONFIG"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "trainctl"


def cards_dir() -> Path:
    return state_home() / "cards"


def runs_dir() -> Path:
    return state_home() / "runs"


def private_dir(path: Path) -> Path:
    """Make `path` with mode 0700, or check that it is a directory of ours that nobody else may enter."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UnsafePath(f"{path} is not a directory of user {os.getuid()}: remove it, or set TMPDIR elsewhere")
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path


def socket_dir() -> Path:
    """The 0700 directory of AF_UNIX sockets: in the system's temporary directory, where paths stay short.

    An AF_UNIX path holds 107 bytes, so a long TMPDIR is passed over for /tmp.
    """
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) > 40:
        base = Path("/tmp")  # noqa: S108 - the directory below is made 0700 and its owner is checked
    return private_dir(base / f"trainctl-{os.getuid()}")


def link_socket(run_id: str) -> Path:
    """The socket on which the hub of a run waits for rank 0."""
    return socket_dir() / f"{run_id[:48]}.link"
