"""Whether a hub may still write, by what the run's directory says, and while it says nothing."""

import errno
from pathlib import Path

import pytest

from trainctl.hub.ownership import Ownership
from trainctl.wire.rundir import RunDir


def test_while_the_directory_does_not_say_who_owns_it_history_goes_on_and_nothing_is_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    run.create()
    ours = Ownership(run)

    def silent(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(RunDir, "newest", silent)
    assert not ours.held(look=True), "a newer hub may have packed what we would pack"
    assert ours.held(), "what is appended goes into a segment of our own"
    monkeypatch.undo()
    assert ours.held(look=True)
    run.allocate("epoch")
    assert not ours.held(look=True)
    assert not ours.held(), "for good"
