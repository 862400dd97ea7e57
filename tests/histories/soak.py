"""Many more histories than the tests have time for: simulated ones and real ones in turn, from new seeds.

usage: python tests/histories/soak.py [--minutes M]        both kinds, for so long; ends at the first that does not hold
       python tests/histories/soak.py --simulated SEED     one simulated history again, with its story
       python tests/histories/soak.py --real SEED          one real job with that seed's operators and faults
       python tests/histories/soak.py --restarted SEED     the same of one that is started again and again
"""

import argparse
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from real_history import run_job
from restarted_history import run_restarted
from simulated_history import default_directory, live

SIMULATED_S = 60.0  # between two real jobs
EPISODES = 20
ROUNDS = 3


def simulated(seed: int, directory: Path, *, story: bool) -> bool:
    lived = live(seed, directory)
    if story or lived.problems:
        print(f"simulated history, seed {seed}", *lived.story, *(lived.problems or ["it holds"]), sep="\n")
    return not lived.problems


def real(seed: int, home: Path) -> bool:
    ranks = random.Random(seed).choice((1, 2, 2, 4))
    print(f"real history, seed {seed}, {ranks} ranks", flush=True)
    found = run_job(seed, ranks, home / f"job-{seed}", EPISODES, store_line=ranks > 1 and seed % 2 == 0)
    print(*found, sep="\n", end="\n" if found else "")
    return not found


def restarted(seed: int, home: Path) -> bool:
    print(f"real history with restarts, seed {seed}, 2 ranks", flush=True)
    found = run_restarted(seed, 2, home / f"restarted-{seed}", ROUNDS)
    print(*found, sep="\n", end="\n" if found else "")
    return not found


def soak(minutes: float, home: Path, directory: Path) -> bool:
    ends, seed, lived, jobs = time.monotonic() + minutes * 60, random.SystemRandom().randrange(2**31), 0, 0
    while time.monotonic() < ends:
        turn_ends = min(ends, time.monotonic() + SIMULATED_S)
        while time.monotonic() < turn_ends:
            if not simulated(seed + lived, directory, story=False):
                return False
            lived += 1
        print(f"{lived} simulated histories hold, seeds {seed} to {seed + lived - 1}", flush=True)
        play = (real, restarted)[jobs % 2]
        if time.monotonic() < ends and not play(seed + lived, home):
            return False
        jobs += 1
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--simulated", type=int, metavar="SEED")
    parser.add_argument("--real", type=int, metavar="SEED")
    parser.add_argument("--restarted", type=int, metavar="SEED")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    home = Path(tempfile.mkdtemp(prefix="tc-", dir="/tmp"))  # short: sockets lie in it
    os.environ.update(TRAINCTL_HOME=str(home / "state"), TRAINCTL_CONFIG=str(home / "config"), TMPDIR=str(home))
    tempfile.tempdir = None
    try:
        with tempfile.TemporaryDirectory(dir=default_directory()) as directory:
            if given.simulated is not None:
                return 0 if simulated(given.simulated, Path(directory), story=True) else 1
            if given.real is not None:
                return 0 if real(given.real, home) else 1
            if given.restarted is not None:
                return 0 if restarted(given.restarted, home) else 1
            return 0 if soak(given.minutes, home, Path(directory)) else 1
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
