"""Attempts of one launch: torchrun is started again where an operator asked for a restart, not where one aborted."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from trainctl.cli.launch import Job, Launch
from trainctl.cli.preempting import Preemption
from trainctl.wire.launcher import EndRequest, announce, take_request, withdraw

_LOOK_S: Final = 0.2
# torchrun gives its ranks 30 s after SIGTERM before it kills them, and then leaves.
_TORCHRUN_LEAVES_S: Final = 45.0


class Attempts:
    """Runs a launch to its end, as often as an operator wants. `request` is the last wish that was granted."""

    def __init__(self, launch: Launch, preemption: Preemption) -> None:
        self.launch = preemption.prepared(launch)
        self._preemption = preemption
        self.request: EndRequest | None = None

    def run(self) -> int:
        """torchrun's exit code in the last attempt. Raises `BadRequest` when it could not be started."""
        with _announced(self.launch.directory), self._preemption.listening():
            while True:
                self._preemption.begins()
                job = Job(self.launch)
                with job.forwarding((signal.SIGINT,)):
                    request = self._attend(job)
                self.request = request or self.request
                if request is None or request.what == "abort" or job.interrupted:
                    return job.wait()
                if self._preemption.warned:
                    self._preemption.overtook(request.target)
                    return job.wait()
                self.launch = self.launch.again(request.target)
                click.echo(f"trainctl: restarting from {request.target}, asked for by {request.actor}", err=True)

    def _attend(self, job: Job) -> EndRequest | None:
        """Wait for the end of a job; what an operator wished meanwhile."""
        request: EndRequest | None = None
        kill_at = 0.0
        while job.wait_s(_LOOK_S) is None:
            self._preemption.attend(job)
            if request is None:
                request = take_request(self.launch.directory)
                if request is not None:
                    # First of all torchrun: it would start ranks that are ended again, as long as it may.
                    job.end(signal.SIGTERM)
                    kill_at = time.monotonic() + _TORCHRUN_LEAVES_S
            elif time.monotonic() >= kill_at:
                job.end(signal.SIGKILL)
        return request or take_request(self.launch.directory)


@contextlib.contextmanager
def _announced(directory: Path) -> Iterator[None]:
    """Be known to the hub while this lasts. In a directory that takes no files nobody can ask for a restart."""
    try:
        launcher = announce(directory)
    except OSError:
        yield  # `run` has said already that the directory cannot be written
        return
    try:
        yield
    finally:
        withdraw(directory, launcher)
