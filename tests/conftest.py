"""Shared by all tests: a home of their own, so that no test sees the user's runs or keys."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, so that a change is judged by what it changed; others: HYPOTHESIS_PROFILE=others.
settings.register_profile("same", derandomize=True)
settings.register_profile("others", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_configure(config: pytest.Config) -> None:
    """Where no file was named, leave out what takes minutes; whoever names one wants all that is in it."""
    if not config.option.markexpr and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.option.markexpr = "not thorough and not exhaustive"


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give every test its own state, configuration and socket directories."""
    tmp_path_factory.getbasetemp()  # made under the real TMPDIR, before the first test changes it
    # Short, for a socket's path has room for 107 bytes: pytest's own directories are too deep with several workers.
    home = Path(tempfile.mkdtemp(prefix="tc-", dir="/tmp"))
    monkeypatch.setenv("TRAINCTL_HOME", str(home / "state"))
    monkeypatch.setenv("TRAINCTL_CONFIG", str(home / "config"))
    monkeypatch.setenv("TMPDIR", str(home))
    monkeypatch.setattr(tempfile, "tempdir", None)  # what the test process itself remembered of TMPDIR
    for name in ("TRAINCTL", "TRAINCTL_RUN", "TRAINCTL_RUN_ID", "TRAINCTL_RUN_DIR", "TRAINCTL_PREEMPT_SIGNAL"):
        monkeypatch.delenv(name, raising=False)
    yield home
    shutil.rmtree(home, ignore_errors=True)
