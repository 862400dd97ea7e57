"""GPUs for tests: fake_nvml/nvml.c built once, loaded by the real binding, driven by a text file."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parent / "fake_nvml" / "nvml.c"
GIB = 2**30


def build_library(directory: Path, *flags: str) -> Path:
    """Compile the library into `directory`; skip the test where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the fake NVML with")
    library = directory / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", *flags, "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True, timeout=60)
    return library


class FakeGpus:
    """What the fake driver says; a change is seen by its next call."""

    def __init__(self, directory: Path, library: Path, count: int) -> None:
        self._file = directory / "gpus.txt"
        self._library = library
        self._state: dict[str, Any] = {"count": count}
        for index in range(count):
            self.gpu(
                index,
                utilization=90 + index % 10,
                memory_used=(70 + index % 10) * GIB,
                memory_total=80 * GIB,
                power_mw=650_000,
                power_limit_mw=700_000,
                temperature=60 + index,
                sm_clock=1980,
                throttle=0,
            )

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_LIBRARY_PATH": str(self._library.parent), "TRAINCTL_FAKE_NVML": str(self._file)}

    def gpu(self, index: int, **values: int) -> None:
        """Set keys of one GPU; `error_CALL=code` makes one call fail."""
        self.driver(**{f"{index}.{name.replace('error_', 'error.')}": value for name, value in values.items()})

    def driver(self, **values: int) -> None:
        """Set keys of the driver as a whole: `count`, `init`, `down`, `hang`, `crash`."""
        self._state |= values
        beside = self._file.with_suffix(".new")
        beside.write_text("".join(f"{name} {value}\n" for name, value in self._state.items()))
        beside.replace(self._file)
