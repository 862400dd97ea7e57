"""The data's place of a checkpoint, taken up before anything else of a rollback is touched.

Reading may fail, and a rollback may not fail once the ranks agreed on it: so the iterator is made, and what is skipped
is read, while the ranks still prepare. Until all of them are ready, each keeps the way back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from trainctl.trainer.checkpoint import Loaded
from trainctl.trainer.checkpoint.rng import capture_rng, restore_rng
from trainctl.trainer.feed import Feed, Stand, go_on
from trainctl.trainer.on_the_way import CalledOff


class DataUnreadable(Exception):
    """The loader raised on the way to a checkpoint's place; the data stand where they stood before."""


@dataclass(frozen=True, kw_only=True)
class DataPlace:
    """Where the data stood, and where they stand now."""

    before: Stand = field(repr=False)
    after: Stand = field(repr=False)


def open_data(feed: Feed, loaded: Loaded, *, skip: int = 0, between: Callable[[], None] = go_on) -> None:
    """Open the data where `feed.load_state_dict` put them, and pass over `skip` micro-batches.

    Calls `between` before each that is read. Leaves the generators as the checkpoint's, or where they are another
    number of ranks' as they were.
    """
    own = None if loaded.same_ranks else capture_rng()
    feed.reopen(between)
    for left_out in (skip, 0):
        # The replay drew from the generators, and so does an epoch that begins among what is skipped.
        restore_rng(own) if own is not None else loaded.restore_rng()
        feed.skip(left_out, between)


def move_data(feed: Feed, loaded: Loaded, *, skip: int, between: Callable[[], None] = go_on) -> DataPlace:
    """Go to the checkpoint's place and `skip` micro-batches on. No random state is changed.

    Raises DataUnreadable, CalledOff where `between` does, which is called before each micro-batch that is read, and
    RuntimeError where the loader cannot even be put back.
    """
    with _random_state_kept():
        before: Stand | None = None
        try:
            before = feed.stand()
            state = loaded.value("loader")
            if state is not None:
                feed.load_state_dict(state)
            open_data(feed, loaded, skip=skip, between=between)
            return DataPlace(before=before, after=feed.stand())
        except CalledOff:
            if before is not None:
                _go_back(feed, before)
            raise
        # A loader of the script's may raise anything.
        except Exception as error:
            if before is not None:
                _go_back(feed, before)
            skipping = f" and {skip} micro-batches on" if skip else ""
            raise DataUnreadable(
                f"the data cannot be read at the place of {loaded.id}{skipping}: {type(error).__name__}: {error}. "
                "Nothing was changed"
            ) from error


def move_back(feed: Feed, place: DataPlace) -> None:
    """The rollback is not to be: stand as before. Raises RuntimeError where the loader cannot be put back."""
    with _random_state_kept():
        _go_back(feed, place.before)


def _go_back(feed: Feed, before: Stand) -> None:
    try:
        feed.go_back(before)
    except Exception as error:
        raise RuntimeError(
            f"a rollback was given up, and the loader did not read again what it had given: {type(error).__name__}: "
            f"{error}. Training cannot go on with the next micro-batch: resume from the last checkpoint"
        ) from error


@contextmanager
def _random_state_kept() -> Iterator[None]:
    drawn = capture_rng()
    try:
        yield
    finally:
        restore_rng(drawn)
