"""The one error of this package, and how others are told in it."""

import errno


class CheckpointError(Exception):
    """A checkpoint cannot be saved or loaded. The message names the file or the part and says what to do.

    Nothing live was touched when it is raised by a load.
    """


class RanksLost(CheckpointError):
    """The ranks could not hear one another; it says nothing about the checkpoint."""


class UnreadFile(CheckpointError):
    """The disk did not give a file of a checkpoint; it says nothing about what is in it."""


def in_words(what: str, error: BaseException) -> str:
    """What failed and why, as an operator reads it."""
    if not isinstance(error, OSError) or error.strerror is None:
        # torch.save hides the error of a file behind one of its container's ("unexpected pos 64 vs 0").
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            return in_words(what, error.__context__)
        return f"{what}: {type(error).__name__}: {error}"
    where = f" ({error.filename})" if error.filename is not None else ""
    to_do = ": free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{what}: {error.strerror}{where}{to_do}"
