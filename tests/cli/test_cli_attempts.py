"""How `trainctl run` starts a run once more, and what it gives torchrun so that it can."""

from pathlib import Path

import pytest

from trainctl.cli.launch import prepare
from trainctl.cli.torchrun import restarts_wanted


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], False),
        (["--max-restarts=0"], False),
        (["--max-restarts=2"], True),
        (["--max_restarts", "2", "--nproc-per-node", "1"], True),
    ],
)
def test_whether_torchrun_is_to_start_ranks_again(words: list[str], wanted: bool) -> None:
    assert restarts_wanted(words) is wanted


def test_another_attempt_is_the_same_run_from_a_checkpoint_at_another_port(tmp_path: Path) -> None:
    first = prepare("demo", ["train.py"], directory=tmp_path / "run")
    again = first.again("step-10")
    assert (again.run_id, again.directory) == (first.run_id, first.directory)
    assert again.environment["TRAINCTL_RESUME"] == "step-10"
    assert "TRAINCTL_RESUME" not in first.environment
    assert [word for word in again.command if not word.startswith("--master-port=")] == [
        word for word in first.command if not word.startswith("--master-port=")
    ]


def test_a_rendezvous_that_the_user_chose_is_kept(tmp_path: Path) -> None:
    words = ["--master-addr=10.0.0.1", "--master-port=29501", "train.py"]
    assert prepare("demo", words, directory=tmp_path / "run").again("last").command[3:] == words


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (["train.py"], True),
        (["--nnodes=1", "train.py"], True),
        (["--nnodes", "1:1", "train.py"], True),
        (["--nnodes=2", "train.py"], False),
        (["--node-rank=1", "--nnodes", "1:4", "train.py"], False),
    ],
)
def test_launchers_of_several_nodes_make_up_no_secrets_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], own: bool
) -> None:
    monkeypatch.delenv("TRAINCTL_RUN_SECRET", raising=False)
    launch = prepare("demo", words, directory=tmp_path / "run")
    assert ("TRAINCTL_RUN_SECRET" in launch.environment) is own, "else the ranks take that of the run's directory"


def test_with_restarts_torchrun_gets_a_rendezvous_that_it_can_hold_again(tmp_path: Path) -> None:
    launch = prepare("demo", ["--max-restarts=2", "train.py"], directory=tmp_path / "run", restarts=True)
    assert "--rdzv-backend=c10d" in launch.command
    assert launch.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert launch.again("last").command == launch.command
