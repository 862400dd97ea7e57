"""What a process does to its files, seen from below: counted, recorded, stopped or failed at any point (effects.c).

A test starts a worker with the library preloaded (`preloaded`); within it `Effects` arms the library. A worker forks
for each point, because importing torch takes longer than a save.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PASS, KILL, TEAR, FAIL, STOP = range(5)
LIE = 8
_SOURCE = Path(__file__).with_name("effects.c")


def preloaded(library_directory: Path) -> dict[str, str]:
    """The environment in which a process's effects can be armed; skips the test where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler on this machine")
    library = library_directory / "effects.so"
    command = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", str(_SOURCE)]
    subprocess.run([*command, "-o", str(library)], check=True, timeout=60)
    paths = [str(_SOURCE.parent), str(_SOURCE.parents[1])]
    return os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(paths)}


@dataclass(frozen=True)
class Effect:
    kind: str  # create write truncate fsync rename mkdir unlink rmdir note
    path: str
    other: str
    offset: int
    data: bytes


class Effects:
    """The preloaded library of this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.effects_seen.restype = ctypes.c_long

    def arm(
        self,
        directory: Path | None,
        how: int = PASS,
        number: int = 0,
        *,
        kinds: tuple[str, ...] = (),
        error: int = 0,
        record: Path | None = None,
    ) -> None:
        """Count effects below `directory` from now on, and at the `number`-th of `kinds` do as `how` says."""
        which = f",{','.join(kinds)}," if kinds else ""
        arguments = [str(directory or "").encode(), str(record or "").encode(), how, which.encode()]
        self._library.effects_arm(*arguments, ctypes.c_long(number), error)

    def seen(self) -> int:
        return int(self._library.effects_seen())

    def note(self, text: str) -> None:
        self._library.effects_note(text.encode())


def read_record(path: Path) -> Iterator[Effect]:
    """The effects in the order in which they came."""
    with path.open("rb") as file:
        while line := file.readline():
            kind, one, other, offset, length = line.decode().rstrip("\n").split("\t")
            yield Effect(kind, one, other, int(offset), file.read(int(length)))
