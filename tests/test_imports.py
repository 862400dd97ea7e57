"""What each part loads when it is imported: proved in a fresh interpreter, because contracts only read source."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "zmq", "textual", "numpy", "click", "pynvml")
ALLOWED = {
    "trainctl.wire.messages": set(),
    "trainctl.store.record": {"numpy"},
    "trainctl.client.session": {"zmq", "numpy"},
    "trainctl.hub.__main__": {"zmq", "numpy"},
    "trainctl.agent.main": {"zmq"},
    "trainctl.trainer": {"torch", "numpy", "pynvml"},  # torch loads pynvml by itself where it is installed
    "trainctl.cli.main": {"click"},
    "trainctl.tui.app": {"zmq", "numpy", "textual"},
}


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_a_part_loads_only_what_it_may(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(eval(done.stdout)) <= ALLOWED[module]


def test_without_torch_the_trainer_says_what_to_do_and_everything_else_works() -> None:
    hide = "import sys; sys.modules['torch'] = None\n"
    code = hide + "import trainctl.trainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "trainctl.trainer needs PyTorch 2.6 or newer" in done.stderr.splitlines()[-1]
    for module in ("trainctl.cli.main", "trainctl.tui.app", "trainctl.hub.__main__", "trainctl.agent.main"):
        done = subprocess.run(
            [sys.executable, "-c", hide + f"import {module}"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr


def test_the_namespace_is_shared_and_holds_no_init() -> None:
    code = "import trainctl; print(trainctl.__file__, len(list(trainctl.__path__)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["None", "4"]
