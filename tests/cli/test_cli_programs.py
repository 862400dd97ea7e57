"""The command as a program of its own: what it loads, how it starts training, and how it is interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from client.scripted_hub import Script, hub
from trainctl.cli.foreign import foreign_packages
from trainctl.cli.launch import torch_found
from trainctl.cli.main import cli
from trainctl.cli.options import DURATION
from trainctl.cli.run import take_apart
from trainctl.client.discover import read_info
from waiting import until

TRAINCTL = [sys.executable, "-m", "trainctl.cli"]


def trainctl(*words: str, timeout_s: float = 60.0, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TRAINCTL, *words],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from trainctl.cli.main import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('zmq', 'numpy', 'textual', 'torch', 'asyncio', 'psutil') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "rollback" in done.stdout


@pytest.mark.parametrize("words", [("status", "--help"), ("lr", "scale", "--help"), ("pause", "--help")])
def test_no_command_that_looks_or_acts_loads_torch_or_textual(words: tuple[str, ...]) -> None:
    program = (
        "import sys; from trainctl.cli.main import cli\n"
        f"try: cli.main({list(words)!r})\n"
        "except SystemExit: pass\n"
        "print([name for name in ('textual', 'torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_every_command_has_help_and_takes_json() -> None:
    def commands(group: click.Group, words: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
        context = click.Context(group)
        found = []
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            inner = commands(command, (*words, name)) if isinstance(command, click.Group) else []
            found += inner or [((*words, name), command)]
        return found

    for words, command in commands(cli):
        assert command.help, words
        takes_json = any("--json" in param.opts for param in command.params)
        assert takes_json or words == ("run",), words  # `run` takes it apart by hand, because of torchrun's options


def test_a_script_is_started_under_torchrun_with_a_runs_identity(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import json, os, sys\n"
        "names = ('TRAINCTL_RUN_ID', 'TRAINCTL_RUN_DIR', 'TRAINCTL_RUN_SECRET', 'WORLD_SIZE')\n"
        "found = {name: os.environ[name] for name in names} | {'arguments': sys.argv[1:]}\n"
        "open(sys.argv[1], 'w').write(json.dumps(found))\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    said = tmp_path / "said.json"
    done = trainctl("run", "--name", "mine", "--json", "--nproc-per-node", "1", str(script), str(said), "0", "--lr=3")
    assert done.returncode == 0, done.stderr
    found, answer = json.loads(said.read_text()), json.loads(done.stdout)
    assert found["arguments"] == [str(said), "0", "--lr=3"]
    assert (answer["run"], answer["id"], answer["dir"]) == ("mine", found["TRAINCTL_RUN_ID"], found["TRAINCTL_RUN_DIR"])
    assert found["TRAINCTL_RUN_ID"].startswith("mine-")
    assert len(bytes.fromhex(found["TRAINCTL_RUN_SECRET"])) == 32
    assert Path(found["TRAINCTL_RUN_DIR"]).stat().st_mode & 0o077 == 0
    assert trainctl("run", "--nproc-per-node=1", str(script), str(said), "7").returncode == 1


@pytest.mark.ranks
def test_sigterm_ends_a_started_script_and_its_ranks(tmp_path: Path) -> None:
    script, said = tmp_path / "train.py", tmp_path / "pid"
    script.write_text("import os, sys, time\nopen(sys.argv[1], 'w').write(f'{os.getpid()}')\ntime.sleep(100)\n")
    words = [*TRAINCTL, "run", "--nproc-per-node=1", str(script), str(said)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as program:
        until(lambda: said.exists() and said.read_text(), 40, what="the script runs")
        program.send_signal(signal.SIGTERM)
        assert program.wait(40) == 1
    rank = int(said.read_text())
    until(lambda: not Path(f"/proc/{rank}").exists(), 10, what="the rank is gone")


def test_without_torch_starting_is_one_clear_line(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    program = (
        "import importlib.util, sys\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest)\n"
        "from trainctl.cli.main import main\n"
        f"sys.argv = ['trainctl', 'run', {str(script)!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "there is no torch in this environment" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "torchrun", "script", "arguments", "module"),
    [
        ("train.py --lr 3", "", "train.py", "--lr 3", False),
        ("--nproc-per-node 2 train.py", "--nproc-per-node 2", "train.py", "", False),
        ("--nproc-per-node=2 --standalone train.py -m x", "--nproc-per-node=2 --standalone", "train.py", "-m x", False),
        ("--nnodes 2 -m pkg.train --json", "--nnodes 2", "pkg.train", "--json", True),
        ("--name n --dir d -r 3 -- train.py", "-r 3", "train.py", "", False),
    ],
)
def test_torchruns_options_are_told_from_ours_and_the_scripts(
    words: str, torchrun: str, script: str, arguments: str, module: bool
) -> None:
    found = take_apart(tuple(words.split()))
    assert " ".join(found.torchrun) == torchrun
    assert (found.script, " ".join(found.arguments), found.module) == (script, arguments, module)


def test_run_without_a_script_or_with_one_that_is_not_there_is_wrong_usage() -> None:
    for words in ((), ("--nproc-per-node",), ("--nproc-per-node", "2"), ("nothing.py",)):
        assert CliRunner().invoke(cli, ["run", *words]).exit_code == 2, words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nproc-per-node", "x"), "Unsupported nproc_per_node value: x"),
        (("--nproc-per-node=0",), "give 1 or more"),
        (("--nonsense", "2"), "unrecognized arguments: --nonsense"),
    ],
)
def test_options_that_torchrun_does_not_take_are_one_line_and_leave_nothing(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    done = trainctl("run", *words, str(script))
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr
    assert not list(Path(os.environ["TRAINCTL_HOME"]).glob("runs/*"))


def test_a_script_that_ends_before_it_is_a_run_is_not_promised_a_log(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit(3)")
    done = trainctl("run", "--nproc-per-node=1", str(script))
    assert done.returncode == 1
    assert "it never became a run" in done.stderr
    assert "trainctl log" not in done.stderr
    assert not list(Path(os.environ["TRAINCTL_HOME"]).glob("runs/*"))


def test_a_directory_that_takes_no_files_is_one_clear_line(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("print('trained')")
    done = trainctl("run", "--dir", "/proc", "--nproc-per-node=1", str(script))  # nobody may make a file there
    assert (done.returncode, done.stdout) == (0, "trained\n")
    assert "/proc cannot be written" in done.stderr
    assert "training goes on; give another directory with --dir" in done.stderr
    demo = trainctl("demo", "--dir", "/proc")
    assert demo.returncode == 2
    assert "/proc cannot be written" in demo.stderr.splitlines()[0]
    assert "--dir" in demo.stderr
    assert "Errno" not in demo.stderr


def test_a_torch_that_is_none_is_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert not torch_found()
    (check,) = [
        check
        for check in json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)["checks"]
        if check["name"] == "torch"
    ]
    assert check["verdict"] == "warning"


def test_a_live_run_cannot_be_resumed() -> None:
    with hub() as running:
        assert read_info(Path(running.info.dir)) is not None
        result = CliRunner().invoke(cli, ["run", "--resume", "gpt", "-m", "whatever"])
        assert result.exit_code == 4
        assert "cannot be resumed while it runs" in result.stderr


def test_ctrl_c_detaches_and_prints_the_id() -> None:
    with hub(script=Script(answers=lambda _: [("accepted", {})])) as running:
        with subprocess.Popen(
            [*TRAINCTL, "pause", "--command-id", "c7"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as program:
            until(lambda: running.script.commands, 20, what="the command arrives")
            program.send_signal(signal.SIGINT)
            _, words = program.communicate(timeout=20)
        assert program.returncode == 6
        assert "detached: command c7 goes on" in words
        assert "Traceback" not in words


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with hub():
        done = subprocess.run(
            ["bash", "-c", f'set -o pipefail; "{sys.executable}" -m trainctl.cli status | true'],
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert "Traceback" not in done.stderr


def test_doctor_looks_at_everything_and_says_what_is_broken(tmp_path: Path) -> None:
    fine = trainctl("doctor", "--json", TERM="xterm-256color", LANG="C.UTF-8")
    found = json.loads(fine.stdout)
    assert {"python", "torch", "nvml", "keys", "sockets", "state", "packages", "terminal", "settings", "runs"} <= {
        check["name"] for check in found["checks"]
    }
    assert {check["verdict"] for check in found["checks"]} <= {"ok", "warning", "broken"}
    assert fine.returncode == (0 if found["ok"] else 1)
    blocked = tmp_path / "file"
    blocked.write_text("")
    broken = trainctl("doctor", TRAINCTL_HOME=str(blocked / "state"))
    assert broken.returncode == 1
    assert "TRAINCTL_HOME" in broken.stdout


def test_a_foreign_package_of_the_same_name_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    (site / "trainctl-0.3.1.dist-info").mkdir(parents=True)
    (site / "trainctl_cockpit-0.1.0.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    assert foreign_packages() == [str(site / "trainctl-0.3.1.dist-info")]
    result = CliRunner().invoke(cli, ["doctor", "--strict"])
    assert result.exit_code == 1
    assert "another project called trainctl" in result.output


def test_keys_are_made_once_and_shown() -> None:
    first = CliRunner().invoke(cli, ["keys", "init", "--json"])
    again = CliRunner().invoke(cli, ["keys", "show", "--json"])
    assert first.exit_code == again.exit_code == 0
    assert json.loads(first.stdout) == json.loads(again.stdout)
    assert len(json.loads(first.stdout)["user"]) == 40


def test_top_without_an_agent_says_how_to_start_one() -> None:
    result = CliRunner().invoke(cli, ["top", "--json"])
    assert result.exit_code == 3
    assert "trainctl agent" in json.loads(result.stdout)["error"]["hint"]


def test_top_shows_a_real_agents_node() -> None:
    with subprocess.Popen([*TRAINCTL, "agent", "--job", "j1"], stderr=subprocess.DEVNULL) as agent:
        try:
            cards = Path(os.environ["TRAINCTL_HOME"]) / "cards"
            until(lambda: list(cards.glob("agent-*.json")), 20, what="the agent's card")
            result = until(lambda: _with_a_node(CliRunner().invoke(cli, ["top", "--json"]).stdout), 20)
            (node,) = result["nodes"]
            assert {"node", "state", "age_s", "cpu", "memory", "gpus"} <= node.keys()
            assert node["state"] == "alive"
            words = CliRunner().invoke(cli, ["top", node["node"]]).stdout
            assert node["node"] in words
        finally:
            agent.terminate()
            agent.wait(20)


def _with_a_node(text: str) -> dict[str, list[dict[str, object]]] | None:
    found = json.loads(text) if text else {}
    return found if found.get("nodes") else None


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("10s", 10), ("30m", 1800), ("1h30m", 5400), ("2d", 172800), ("0.5s", 0.5)]
)
def test_durations_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert DURATION.convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-3s", "0", "3x", "s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        DURATION.convert(text, None, None)
