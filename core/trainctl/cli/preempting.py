"""What `trainctl run` makes of a warning signal and of SIGTERM: one checkpoint and a stop on all ranks, exit code 75.

    warning signal   the ranks are told; nothing is ended, for the scheduler sends SIGTERM when the time is over
    SIGTERM          the ranks are told, if they were not, and have `grace_s`; then torchrun is ended, 5 s later killed

torchrun runs in a session of its own with the warning signal ignored, and so do its ranks: a scheduler signals every
process of a job, and that signal would end torchrun and orphan its ranks.
"""

import contextlib
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Final

import click
import msgspec

from trainctl.cli.launch import Job, Launch
from trainctl.wire.manifest import list_checkpoints, pick
from trainctl.wire.paths import socket_dir
from trainctl.wire.preemption import (
    FILE_VARIABLE,
    SIGNAL_VARIABLE,
    Left,
    Warned,
    forget,
    read_heard,
    read_left,
    read_preempted,
    record_preempted,
    signal_number,
    write_note,
)
from trainctl.wire.rundir import RunDir
from trainctl.wire.settings import PreemptionSettings, SettingsError, load_settings

_KILLED_AFTER_S: Final = 5.0
_FIRST_HEARING_S: Final = 2.0
# Sets the signal to be ignored and becomes the command: what is ignored stays so over exec, in all children too.
_IGNORING: Final = "import os, signal, sys; signal.signal(int(sys.argv[1]), 1); os.execv(sys.argv[2], sys.argv[2:])"


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Which signal warns (None: only SIGTERM counts) and how long the ranks have after SIGTERM."""

    number: int | None = int(signal.SIGUSR1)
    grace_s: float = 20.0


def rules(given_signal: str | None, given_grace_s: float | None) -> Rules:
    """Flags beat environment beat config.toml beat defaults. Raises ValueError on a signal that cannot be meant."""
    try:
        settings = load_settings().preemption
    except SettingsError as error:
        settings = PreemptionSettings()
        click.echo(f"trainctl: {error}; preemption takes its defaults", err=True)
    name = given_signal if given_signal is not None else os.environ.get(SIGNAL_VARIABLE)
    number = signal_number(settings.signal if name is None else name)
    grace_s = settings.grace_s if given_grace_s is None else given_grace_s
    # SIGTERM is acted on anyway, and torchrun must be able to end by it.
    return Rules(number=None if number == signal.SIGTERM else number, grace_s=grace_s)


class Preemption:
    """Hears the signals while a launch runs, tells the ranks once, and ends what does not end by itself."""

    def __init__(self, launch: Launch, rules: Rules) -> None:
        self._rules = rules
        self._directory = launch.directory
        self._file = socket_dir() / f"preempt-{launch.run_id[:40]}-{os.getpid()}"
        self._received: list[int] = []
        self._told = False
        self._terminated_at: float | None = None
        self._gave_up_at: float | None = None
        self._said_problem = False
        self._left: Left | None = None
        self.why: str | None = None

    def prepared(self, launch: Launch) -> Launch:
        """The launch with the warning ignored in all its processes, and told where a warning would lie."""
        command = launch.command
        if self._rules.number is not None:
            command = [sys.executable, "-S", "-c", _IGNORING, str(self._rules.number), *command]
        # Empty: a rank under us hears by the file, and SIGTERM is to end it.
        environment = launch.environment | {FILE_VARIABLE: str(self._file), SIGNAL_VARIABLE: ""}
        return msgspec.structs.replace(launch, command=command, environment=environment)

    @property
    def _hearing_s(self) -> float:
        """How long a rank may take to say that it heard. Where nothing is a run yet, there is nothing to be saved."""
        return min(self._rules.grace_s / 2, math.inf if self._is_a_run else _FIRST_HEARING_S)

    @property
    def _is_a_run(self) -> bool:
        return RunDir(self._directory).info_file.is_file()

    @property
    def warned(self) -> bool:
        return bool(self._received)

    def verdict(self, code: int) -> str | None:
        """Why the run counts as preempted, in words, once `listening` is over; None when it does not.

        `code`: torchrun's.
        """
        if (left := self._left) is not None:
            return f"preempted at step {left.step}: {left.reason}"
        # Whatever torchrun says: nobody but the preemption ended it.
        ended = self._gave_up_at is not None and code != 0 and self._is_a_run
        return f"preempted: {self.why}" if ended else None

    @contextlib.contextmanager
    def listening(self) -> Generator[None, None, None]:
        """Take the signals while this lasts; they are only noted, and acted on by `attend`."""

        def note(number: int, _frame: FrameType | None) -> None:
            self._received.append(number)

        numbers = [signal.SIGTERM, *([self._rules.number] if self._rules.number is not None else [])]
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                # A second warning may come in the last moment, and is to change nothing about the exit code.
                signal.signal(number, signal.SIG_IGN if handler is signal.SIG_DFL else handler)
            self._left = read_left(self._file)
            forget(self._file)

    def begins(self) -> None:
        """A job is about to start: what an earlier one answered is not its answer."""
        forget(self._file, answers_only=True)

    def attend(self, job: Job) -> None:
        """Act on what was received; called several times a second while the job runs."""
        if not self._received:
            return
        now = time.monotonic()
        if not self._told:
            self._tell(signal.Signals(self._received[0]).name)
        if self._terminated_at is None and signal.SIGTERM in self._received:
            self._terminated_at = now
            self._say(f"SIGTERM: the ranks have {self._rules.grace_s:g} s for it")
        heard = read_heard(self._file)
        problem = heard.problem if heard is not None else None
        if problem is not None and not self._said_problem:
            self._said_problem = True
            self._say(f"the ranks cannot be stopped at a boundary: {problem}")
        if self._gave_up_at is not None:
            if now >= self._gave_up_at + _KILLED_AFTER_S:
                job.kill()
        elif self._terminated_at is not None:
            waited_s = now - self._terminated_at
            if problem is not None:
                self._give_up(job, problem)
            elif heard is None and waited_s >= self._hearing_s:
                self._give_up(job, "no rank heard of it: the script has not called Run.attach, or is past its end")
            elif waited_s >= self._rules.grace_s:
                self._give_up(job, f"the ranks reached no boundary within {self._rules.grace_s:g} s of SIGTERM")

    def overtook(self, target: str) -> None:
        """The ranks were ended for a restart from `target`, and there is no time for it any more."""
        self._told_at_last(f"the restart from {target} was not begun")
        self._gave_up_at = time.monotonic()

    def _tell(self, name: str) -> None:
        self._told = True
        try:
            write_note(self._file, Warned(reason=f"{name} on {socket.gethostname()}", time=time.time()))
        except OSError as error:
            self._say(f"{name}, and the ranks cannot be told: {self._file}: {error.strerror or error}")
        else:
            self._say(f"{name}: the ranks save one checkpoint and stop")

    def _give_up(self, job: Job, why: str) -> None:
        self._told_at_last(why)
        self._gave_up_at = time.monotonic()
        job.end(signal.SIGTERM)

    def _told_at_last(self, why: str) -> None:
        """No rank says how it ended, so this does: to the user, the hub and the next `trainctl run`."""
        last = pick(list_checkpoints(RunDir(self._directory).checkpoints), "last")
        stands = f"{last.id} (step {last.step}) stands" if last is not None else "there is no checkpoint of this run"
        self.why = f"{signal.Signals(self._received[0]).name} on {socket.gethostname()}: {why}; {stands}"
        self._say(f"{why}; {stands}")
        attempt = RunDir(self._directory).newest("attempt")
        if attempt:
            with contextlib.suppress(OSError):  # then the run is told as lost
                record_preempted(self._directory, attempt=attempt, step=None, reason=self.why)

    def _say(self, text: str) -> None:
        click.echo(f"trainctl: {text}", err=True)


def directory_to_go_on_in(directory: Path) -> str | None:
    """Why the same command again goes on with the run in a directory: it was preempted, or its job was requeued."""
    if (told := read_preempted(directory)) is not None:
        return f"attempt {told.attempt} was preempted ({told.reason})"
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    if restarts.isdigit() and int(restarts) > 0:
        return f"job {os.environ.get('SLURM_JOB_ID', '?')} was requeued"
    return None
