"""The ranks on this machine: a pidfd for each, so that a death is known at once and a recycled pid deceives nobody.

A rank that ends well takes its place file away; a process that is gone while its file stands has died. The file of a
dead rank stays for a minute, in which the death is in every reading, and is then removed. Both are remembered for a hub
that ends their attempt.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trainctl.agent.departed import Departed
from trainctl.agent.options import JOB_VARIABLES
from trainctl.wire.messages import ProcessReading
from trainctl.wire.places import Place, place_file, process_started, read_places, stat_fields

REPORTED_FOR_S: Final = 60.0
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass
class _Watched:
    place: Place
    reading: ProcessReading
    pidfd: int | None = None
    died_at: float | None = None
    cpu_s: float | None = None
    sampled_at: float = 0.0


class RankWatch:
    """Watches the places that `belongs` accepts; calls `on_death` from the loop when a rank has died."""

    def __init__(self, belongs: Callable[[Place], bool], on_death: Callable[[], None]) -> None:
        self._belongs = belongs
        self._on_death = on_death
        # By place and not by process: a script may close one run and attach the next.
        self._watched: dict[Place, _Watched] = {}
        self._foreign: set[Place] = set()
        self._departed = Departed()

    @property
    def alive(self) -> int:
        """How many ranks live."""
        return sum(watched.died_at is None for watched in self._watched.values())

    @property
    def readings(self) -> list[ProcessReading]:
        return [watched.reading for watched in self._watched.values()]

    def places(self, run_id: str, attempt: int) -> list[Place]:
        """The ranks of one attempt on this machine, those that died or left among them."""
        here = [place for place in self._watched if (place.run_id, place.attempt) == (run_id, attempt)]
        return here + self._departed.of(run_id, attempt)

    def scan(self) -> None:
        """Look for places that came or went and measure the living. Raises OSError (`UnsafePath`)."""
        now = time.monotonic()
        places = set(read_places())
        self._foreign &= places
        for place in self._watched.keys() - places:
            self._forget(place)
        self._departed.see(places)
        for place in places - self._watched.keys() - self._foreign:
            if self._belongs(place):
                self._begin(place)
            else:
                self._foreign.add(place)
        for place, watched in list(self._watched.items()):
            if watched.died_at is None:
                self._measure(watched, now)
            elif now - watched.died_at >= REPORTED_FOR_S:
                self._bury(place)

    def close(self, *, bury: bool) -> None:
        """Stop watching; with `bury`, remove the files of the dead, which have been reported."""
        for place, watched in list(self._watched.items()):
            if bury and watched.died_at is not None:
                self._bury(place)
            else:
                self._forget(place)

    def _begin(self, place: Place) -> None:
        alive = ProcessReading(pid=place.pid, rank=place.rank, run_id=place.run_id, alive=True)
        watched = self._watched[place] = _Watched(place=place, reading=alive)
        try:
            watched.pidfd = os.pidfd_open(place.pid)
        except ProcessLookupError:
            self._died(place)
            return
        except OSError:
            pass  # a kernel or sandbox without pidfds: `_measure` looks at each tick instead
        if not _is_the_same_process(place):  # asked after the pidfd was opened: from now on the pid cannot change hands
            self._died(place)
        elif watched.pidfd is not None:
            asyncio.get_running_loop().add_reader(watched.pidfd, self._died, place)

    def _died(self, place: Place) -> None:
        watched = self._watched[place]
        if not place_file(place).exists():
            self._forget(place)  # it said goodbye
            return
        self._release(watched)
        watched.died_at = time.monotonic()
        watched.reading = ProcessReading(
            pid=place.pid, rank=place.rank, run_id=place.run_id, alive=False, ended=how_it_ended(place)
        )
        self._on_death()

    def _measure(self, watched: _Watched, now: float) -> None:
        place = watched.place
        if watched.pidfd is None and not _is_the_same_process(place):
            self._died(place)
            return
        try:
            cpu_s, memory_bytes = process_usage(place.pid)
        except OSError:
            return  # it is just ending: its pidfd says so in a moment
        cpu = None
        if watched.cpu_s is not None and now > watched.sampled_at:
            cpu = 100.0 * (cpu_s - watched.cpu_s) / (now - watched.sampled_at)
        watched.cpu_s, watched.sampled_at = cpu_s, now
        watched.reading = ProcessReading(
            pid=place.pid, rank=place.rank, run_id=place.run_id, alive=True, cpu=cpu, memory_bytes=memory_bytes
        )

    def _bury(self, place: Place) -> None:
        place_file(place).unlink(missing_ok=True)
        self._forget(place)

    def _forget(self, place: Place) -> None:
        self._release(self._watched.pop(place))
        self._departed.add(place)

    def _release(self, watched: _Watched) -> None:
        if watched.pidfd is not None:
            asyncio.get_running_loop().remove_reader(watched.pidfd)
            os.close(watched.pidfd)
            watched.pidfd = None


def of_job(job: str | None) -> Callable[[Place], bool]:
    """Which places an agent of `job` watches: None is every rank of this user on this machine.

    A job is a run's id, or the cluster's job number, which the ranks have in their environment.
    """

    def belongs(place: Place) -> bool:
        return job is None or place.run_id == job or job in _jobs_of(place.pid)

    return belongs


def process_usage(pid: int) -> tuple[float, int]:
    """CPU seconds used so far and resident bytes. Raises OSError when there is no such process."""
    fields = stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S, int(fields[21]) * _PAGE_BYTES


def how_it_ended(place: Place) -> str | None:
    """ "killed by SIGKILL" or "exited with 1": the kernel says so until the parent has taken note; None afterwards."""
    try:
        fields = stat_fields(place.pid)
    except OSError:
        return None
    # Field 52 is the status as waitpid gives it; it is 0 for those who may not know, and while the process lives.
    if float(fields[19]) != place.started or fields[0] not in b"ZX" or (status := int(fields[49])) == 0:
        return None
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"killed by {signal.Signals(number).name if number in set(signal.Signals) else f'signal {number}'}"
    return f"exited with {os.WEXITSTATUS(status)}"


def _is_the_same_process(place: Place) -> bool:
    try:
        return process_started(place.pid) == place.started
    except OSError:
        return False


def _jobs_of(pid: int) -> set[str]:
    with contextlib.suppress(OSError):  # it is gone
        variables = (item.partition(b"=") for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        names = {name.encode() for name in JOB_VARIABLES}
        return {value.decode(errors="replace") for name, _, value in variables if name in names}
    return set()
