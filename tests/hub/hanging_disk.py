"""A hub whose disk hangs on demand: `python hanging_disk.py FLAG OPTIONS…`.

While the file FLAG is there, every call that goes to the run's directory does not return, as with a network file system
whose server is gone: by path or by descriptor, to read, to write or to look. Its own log is outside of it.
"""

import builtins
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainctl.hub import __main__, detect_disk, detect_lookout

_CALLS = (
    *("open", "write", "fsync", "fstat", "ftruncate", "lseek", "listdir", "scandir", "stat", "lstat", "statvfs"),
    *("mkdir", "rename", "replace", "unlink", "rmdir", "dup"),
)
_real_readlink, _real_exists = os.readlink, os.path.exists
_real_stat = os.stat


def _hangs(flag: str) -> bool:
    try:
        _real_stat(flag)
    except FileNotFoundError:
        return False
    return True


def _is_there(target: object, run_dir: str) -> bool:
    if isinstance(target, bool) or not isinstance(target, int | str | bytes | os.PathLike):
        return False
    if isinstance(target, int):
        try:
            path = _real_readlink(f"/proc/self/fd/{target}")
        except OSError:
            return False
    else:
        path = os.fsdecode(target)
    return path.startswith(run_dir)


def _hanging(real: Callable[..., Any], flag: str, run_dir: str) -> Callable[..., Any]:
    def call(target: Any = ".", *more: Any, **named: Any) -> Any:
        if _hangs(flag) and _is_there(target, run_dir):
            while _hangs(flag):
                time.sleep(0.01)
        return real(target, *more, **named)

    return call


def main() -> int:
    flag, arguments = sys.argv[1], sys.argv[2:]
    run_dir = str(Path(arguments[arguments.index("--run-dir") + 1]).absolute())
    for name in _CALLS:
        setattr(os, name, _hanging(getattr(os, name), flag, run_dir))
    io.open = builtins.open = _hanging(io.open, flag, run_dir)  # type: ignore[assignment]
    detect_disk.HANGS_S = 1.0  # type: ignore[misc]
    detect_lookout.LOOK_EVERY_S = 0.5  # type: ignore[misc]
    return __main__.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
