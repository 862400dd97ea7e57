"""The buffers of a save in a process that forks: loader workers, anew in each epoch, cost the next save nothing."""

import contextlib
import mmap
import os
import resource
import warnings
from collections.abc import Iterator

import pytest
import torch

from trainctl.trainer.checkpoint import stage
from trainctl.trainer.checkpoint.stage import Buffers, layout_of

STATE = {"weight": torch.arange(2_000_000.0), "bias": torch.ones(3)}
PAGES = sum(tensor.numel() * tensor.element_size() for tensor in STATE.values()) // mmap.PAGESIZE


@contextlib.contextmanager
def forked_worker() -> Iterator[None]:
    """A process forked from this one, which lives meanwhile and does nothing."""
    ended, end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytest has threads; the worker needs none of their locks
        worker = os.fork()
    if worker == 0:
        os.close(end)
        os.read(ended, 1)
        os._exit(0)
    try:
        yield
    finally:
        os.close(end)
        os.close(ended)
        os.waitpid(worker, 0)


def pages_touched_anew(buffers: Buffers) -> int:
    """What one save into `buffers` has the kernel make: page faults of this thread."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    staged = buffers.stage(STATE)
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    assert all(torch.equal(staged[name], STATE[name]) for name in STATE)
    return faults


def test_a_save_after_a_fork_copies_into_the_pages_that_are_there() -> None:
    buffers = Buffers(layout_of(STATE), pinned=False)
    pages_touched_anew(buffers)
    with forked_worker():
        assert pages_touched_anew(buffers) < PAGES / 10
    assert pages_touched_anew(buffers) < PAGES / 10


def test_a_kernel_that_cannot_keep_them_apart_costs_time_and_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, option: int, *span: int) -> None:
            if option == stage._MADV_WIPEONFORK:
                raise OSError(22, "Invalid argument")
            super().madvise(option, *span)

    monkeypatch.setattr(mmap, "mmap", Refusing)
    buffers = Buffers(layout_of(STATE), pinned=False)
    with forked_worker():
        pages_touched_anew(buffers)
