"""What `trainctl run` takes for a warning, what its processes make of it, and how the same command goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainctl.cli.launch import Launch
from trainctl.cli.preempting import Preemption, Rules, directory_to_go_on_in, rules
from trainctl.cli.run import take_apart
from trainctl.cli.torchrun import several_nodes
from trainctl.wire.preemption import beside, read_preempted, record_preempted
from trainctl.wire.rundir import RunDir


@pytest.fixture(autouse=True)
def handlers_are_as_they_were() -> Iterator[None]:
    """`trainctl run` is about to end when it stops listening, and leaves the signals ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def launch(directory: Path, *words: str) -> Launch:
    command = [sys.executable, "-c", *words]
    return Launch(name="n", run_id="n-1", directory=directory, command=command, environment=dict(os.environ))


class TestRules:
    def test_flags_beat_environment_beats_the_file_beats_the_default(
        self, own_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert rules(None, None) == Rules(number=signal.SIGUSR1, grace_s=20.0)
        (own_home / "config").mkdir(exist_ok=True)
        (own_home / "config" / "config.toml").write_text('[preemption]\nsignal = "USR2"\ngrace_s = 7\n')
        assert rules(None, None) == Rules(number=signal.SIGUSR2, grace_s=7.0)
        monkeypatch.setenv("TRAINCTL_PREEMPT_SIGNAL", "HUP")
        assert rules(None, None) == Rules(number=signal.SIGHUP, grace_s=7.0)
        assert rules("USR1", 3.0) == Rules(number=signal.SIGUSR1, grace_s=3.0)

    @pytest.mark.parametrize("name", ["none", "TERM"])
    def test_sigterm_counts_without_being_named_and_alone_where_there_is_no_warning(self, name: str) -> None:
        assert rules(name, None).number is None

    def test_a_file_that_cannot_be_read_keeps_nobody_from_training(
        self, own_home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (own_home / "config").mkdir(exist_ok=True)
        (own_home / "config" / "config.toml").write_text("[preemption]\ngrace_s = -1\n")
        assert rules(None, None) == Rules()
        assert "preemption takes its defaults" in capsys.readouterr().err

    def test_the_options_are_ours_and_not_torchruns(self) -> None:
        words = take_apart(("--preempt-signal", "USR2", "--nproc-per-node=2", "--preempt-grace=45s", "train.py", "--x"))
        assert (words.preempt_signal, words.preempt_grace) == ("USR2", "45s")
        assert words.torchrun == ("--nproc-per-node=2",)


def test_everything_below_ignores_the_warning_and_nothing_else(tmp_path: Path) -> None:
    tell = "import os, signal as s; print(s.getsignal(s.SIGUSR1), s.getsignal(s.SIGTERM), os.environ[{!r}])"
    made = Preemption(launch(tmp_path), Rules()).prepared(launch(tmp_path, tell.format("TRAINCTL_PREEMPT_FILE")))
    done = subprocess.run(made.command, env=made.environment, capture_output=True, text=True, timeout=60)
    ignored, default, file = done.stdout.split()
    assert (ignored, default) == ("1", "0"), done.stderr
    assert Path(file).name.startswith("preempt-n-1-")
    assert made.environment["TRAINCTL_PREEMPT_SIGNAL"] == "", "SIGTERM from torchrun is to end a rank"


def test_a_restart_that_the_warning_overtook_counts_as_preempted(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    run_dir.allocate("attempt")
    preemption = Preemption(launch(tmp_path), Rules())
    with preemption.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.warned
        preemption.overtook("last")
    assert preemption.verdict(1) is None, "the script never became a run: it is no run's end"
    run_dir.info_file.write_text("{}")
    verdict = preemption.verdict(1)
    assert verdict is not None
    assert "the restart from last was not begun; there is no checkpoint of this run" in verdict
    assert preemption.verdict(0) is None, "it came to its own end meanwhile"
    told = read_preempted(tmp_path)
    assert told is not None
    assert told.attempt == 1


def test_the_files_are_gone_afterwards(tmp_path: Path, own_home: Path) -> None:
    preemption = Preemption(launch(tmp_path), Rules())
    file = Path(preemption.prepared(launch(tmp_path)).environment["TRAINCTL_PREEMPT_FILE"])
    with preemption.listening():
        file.write_text("{}")
        beside(file, "heard").write_text("{}")
    assert list(file.parent.glob("preempt-*")) == []


@pytest.mark.parametrize(
    ("words", "several"),
    [([], False), (["--nnodes=1"], False), (["--nnodes", "2"], True), (["--nnodes=1:2"], True)],
)
def test_whether_other_nodes_start_ranks_of_the_job(words: list[str], several: bool) -> None:
    assert several_nodes(words) is several


def test_why_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    run_dir.allocate("attempt")
    assert directory_to_go_on_in(tmp_path) is None
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert directory_to_go_on_in(tmp_path) == "job 4711 was requeued"
    record_preempted(tmp_path, attempt=1, step=3, reason="SIGUSR1 on n")
    assert directory_to_go_on_in(tmp_path) == "attempt 1 was preempted (SIGUSR1 on n)"
