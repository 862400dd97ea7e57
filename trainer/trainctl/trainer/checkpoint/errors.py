"""The one error of this package."""


class CheckpointError(Exception):
    """A checkpoint cannot be saved or loaded. The message names the file or the part and says what to do.

    Nothing live was touched when it is raised by a load.
    """
