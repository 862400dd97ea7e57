"""Opening files of a checkpoint that are ours: of our user, in directories that only we can change, without a link.

What a manifest vouches for by name may be replaced between one look and the next by whoever may write where it lies. So
nothing is read whose directories others may write to, and each file is looked at through the handle it is read by.
"""

import errno
import os
import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class NotOurs(Exception):
    """A file or directory is a link, somebody else's or open to everybody; the message names it and what it is."""


def is_inside(name: str) -> bool:
    """Whether a name from a manifest is a plain path below its directory, written in the one way it can be."""
    path = PurePosixPath(name)
    plain = "\0" not in name and not path.is_absolute() and path.parts and ".." not in path.parts
    return bool(plain) and str(path) == name


def open_ours(directory: Path, name: str) -> BinaryIO:
    """Open `directory/name` for reading. Raises NotOurs; OSError where it is missing or cannot be read.

    Checked are `directory` itself and all that lies between it and the file. Where `directory` lies is for the operator
    to say: it may be below a link.
    """
    shown = directory.name
    handle = _open(None, str(directory), shown)
    try:
        *between, last = PurePosixPath(name).parts
        for part in between:
            shown = f"{shown}/{part}"
            inner = _open(handle, part, shown)
            os.close(handle)
            handle = inner
        # Not to wait at a pipe that somebody put there.
        found = _no_link(last, os.O_NONBLOCK, handle, f"{shown}/{last}")
    finally:
        os.close(handle)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise NotOurs(f"{shown}/{last} is not a regular file")
        _check(found, f"{shown}/{last}")
        return os.fdopen(found, "rb")
    except BaseException:
        os.close(found)
        raise


def _open(inside: int | None, name: str, shown: str) -> int:
    handle = _no_link(name, os.O_DIRECTORY, inside, shown)
    try:
        _check(handle, shown)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _no_link(name: str, flags: int, inside: int | None, shown: str) -> int:
    try:
        return os.open(name, _LOOK | flags, dir_fd=inside)
    except OSError as error:
        # ELOOP for a file, ENOTDIR for a directory: neither says it in an operator's words.
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            what = "directory" if flags & os.O_DIRECTORY else "regular file"
            raise NotOurs(f"{shown} is not a {what}: links are not followed") from error
        raise


def _check(handle: int, shown: str) -> None:
    found = os.fstat(handle)
    if found.st_uid != os.getuid():
        raise NotOurs(f"{shown} belongs to user {found.st_uid}, not to us: not loaded")
    if found.st_mode & stat.S_IWOTH:
        raise NotOurs(f"everybody may write to {shown}, so it is not loaded: chmod o-w it if you know who did")
