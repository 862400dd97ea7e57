"""Fixtures of the agent's tests."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_gpus import FakeGpus, build_library


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def gpus(tmp_path: Path, nvml_library: Path) -> Callable[[int], FakeGpus]:
    """Makes a machine with so many GPUs."""
    return lambda count: FakeGpus(tmp_path, nvml_library, count)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
