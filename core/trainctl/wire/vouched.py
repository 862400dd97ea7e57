"""Opening files of a checkpoint that are ours: of our user, in directories that only we can change, without a link.

What a manifest vouches for by name may be replaced between one look and the next by whoever may write where it lies. So
nothing is read whose directories others may write to, and each file is looked at through the handle it is read by.
"""

import contextlib
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
    with contextlib.ExitStack() as opened:
        handle = _open(opened, None, str(directory), os.O_DIRECTORY, shown)
        within_reach = _check(handle, shown, within_reach=True)
        *between, last = PurePosixPath(name).parts
        for part in between:
            shown = f"{shown}/{part}"
            handle = _open(opened, handle, part, os.O_DIRECTORY, shown)
            within_reach = _check(handle, shown, within_reach=within_reach)
        shown = f"{shown}/{last}"
        handle = _open(opened, handle, last, os.O_NONBLOCK, shown)  # not to wait at a pipe that somebody put there
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise NotOurs(f"{shown} is not a regular file")
        _check(handle, shown, within_reach=within_reach)
        return os.fdopen(os.dup(handle), "rb")


def _open(opened: contextlib.ExitStack, inside: int | None, name: str, flags: int, shown: str) -> int:
    try:
        handle = os.open(name, _LOOK | flags, dir_fd=inside)
    except OSError as error:
        # ELOOP for a file, ENOTDIR for a directory: neither says it in an operator's words.
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            what = "directory" if flags & os.O_DIRECTORY else "regular file"
            raise NotOurs(f"{shown} is not a {what}: links are not followed") from error
        raise
    opened.callback(os.close, handle)
    return handle


def _check(handle: int, shown: str, *, within_reach: bool) -> bool:
    """Whether others reach what is in it. What lies in a directory that they may not enter, they cannot change."""
    found = os.fstat(handle)
    if found.st_uid != os.getuid():
        raise NotOurs(f"{shown} belongs to user {found.st_uid}, not to us: not loaded")
    if within_reach and found.st_mode & stat.S_IWOTH:
        raise NotOurs(f"everybody may write to {shown}, so it is not loaded: chmod o-w it if you know who did")
    return within_reach and bool(found.st_mode & stat.S_IXOTH)
