"""What a hub uses for a moment it gives back to the system, so that its memory is what it holds."""

import subprocess
import sys

PACKING = """
import sys
from pathlib import Path

from trainctl.hub.allocator import give_back_at_once


def resident_mb():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


if sys.argv[1] == "yes":
    give_back_at_once()
before, kept = resident_mb(), []
for _ in range(5):
    segment = [bytearray(b"x") * (8 << 20) for _ in range(4)]  # read, unpacked, sorted, packed
    kept.append(b"y" * 100_000)  # what is learned of it stays, and lies behind it in the heap
    del segment
print(resident_mb() - before)
"""


def left_mb(given_back: str) -> float:
    done = subprocess.run([sys.executable, "-c", PACKING, given_back], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_what_a_segment_took_while_it_was_packed_is_not_kept() -> None:
    assert left_mb("yes") < 4
    assert left_mb("no") > 8, "which is not so by itself"
