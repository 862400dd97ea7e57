"""The one error of this package, and how others are told in it."""

import errno


class CheckpointError(Exception):
    """A checkpoint cannot be saved or loaded. The message names the file or the part and says what to do.

    Nothing live was touched when it is raised by a load.
    """


def in_words(what: str, error: Exception) -> str:
    """What failed and why, as an operator reads it."""
    if not isinstance(error, OSError) or error.strerror is None:
        return f"{what}: {type(error).__name__}: {error}"
    where = f" ({error.filename})" if error.filename is not None else ""
    to_do = ": free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{what}: {error.strerror}{where}{to_do}"
