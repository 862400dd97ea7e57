"""The power goes at any point of a save: what was confirmed is there, and what is called good loads.

Once in a model that allows every state that POSIX does, once on a real ext4 in an image.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from effects import Effect, preloaded, read_record
from power_cut import Disk
from test_checkpoint_safety import Small
from trainctl.wire.manifest import DamagedCheckpoint, list_checkpoints, verify

WORKER = Path(__file__).with_name("faulty_saves.py")
CHECKPOINTS = "runs/one/checkpoints/"


def run_worker(scenario: str, directory: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(WORKER), scenario, str(directory)],
        env=preloaded(directory),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Effect]]:
    """A run's first three checkpoints and a retention, as effects, and the directory that came of them."""
    directory = tmp_path_factory.mktemp("recorded")
    run_worker("record", directory)
    return directory / "disk", list(read_record(directory / "record"))


Content = frozenset[tuple[str, bytes]]


@dataclass
class Judge:
    """Asks the product's own code what it makes of the files; every content once."""

    scratch: Path
    known: dict[Content, str | None] = field(default_factory=dict)

    def wrong_with(self, checkpoint: str, content: Content) -> str | None:
        """Why a directory of that name is called good and does not load; None: it loads, or is not called good."""
        if content not in self.known:
            self.known[content] = self._ask(checkpoint, content)
        return self.known[content]

    def _ask(self, checkpoint: str, content: Content) -> str | None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        for name, data in content:
            file = self.scratch / "checkpoints" / checkpoint / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        if not list_checkpoints(self.scratch / "checkpoints"):
            return "not listed"
        try:
            verify(self.scratch / "checkpoints" / checkpoint)
        except DamagedCheckpoint as error:
            return str(error)
        Small(self.scratch / "checkpoints", width=8).checkpointer.load(checkpoint)
        return None


def checkpoints_in(state: Content) -> dict[str, Content]:
    """The content of every directory that has the final name of a checkpoint."""
    found: dict[str, set[tuple[str, bytes]]] = {}
    for path, data in state:
        name, slash, file = path.removeprefix(CHECKPOINTS).partition("/")
        if path.startswith(CHECKPOINTS) and slash and not name.startswith("."):
            found.setdefault(name, set()).add((file, data))
    return {name: frozenset(files) for name, files in found.items()}


def losses(root: Path, effects: list[Effect], judge: Judge) -> Iterator[str]:
    """What is wrong after a cut between any two effects, in any state that it may leave."""
    disk, confirmed = Disk(root), set[str]()
    judged = set[tuple[Content, frozenset[str]]]()
    for number, effect in enumerate(effects):
        if effect.kind == "note":
            confirmed.add(effect.path.removeprefix("saved "))
            continue
        disk.apply(effect)
        if effect.kind == "rename" and effect.other.endswith(".gone"):
            confirmed.discard(Path(effect.path).name)
        for state in disk.after_cut():
            if (state, frozenset(confirmed)) in judged:
                continue
            judged.add((state, frozenset(confirmed)))
            there = checkpoints_in(state)
            wrong = {name: judge.wrong_with(name, content) for name, content in there.items()}
            for name, problem in wrong.items():
                if problem not in (None, "not listed"):
                    yield f"after effect {number} ({effect.kind} {effect.path}): {problem}"
            for name in confirmed:
                if wrong.get(name, "not there") is not None:
                    yield f"after effect {number} ({effect.kind} {effect.path}): {name} was confirmed and is lost"


def test_the_record_is_complete(recorded: tuple[Path, list[Effect]]) -> None:
    root, effects = recorded
    disk = Disk(root)
    for effect in effects:
        if effect.kind != "note":
            disk.apply(effect)
    real = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert disk.files() == real
    assert len(checkpoints_in(frozenset(real.items()))) == 1


def test_whenever_the_power_goes_what_was_confirmed_is_there_and_what_is_called_good_loads(
    recorded: tuple[Path, list[Effect]], tmp_path: Path
) -> None:
    assert list(losses(*recorded, Judge(tmp_path / "scratch"))) == []


@pytest.mark.parametrize("what", ["files", "directories"])
def test_a_save_without_its_syncs_is_found_out(
    recorded: tuple[Path, list[Effect]], tmp_path: Path, what: str
) -> None:
    """That the model can see a loss at all."""
    root, effects = recorded
    made = {effect.path for effect in effects if effect.kind == "mkdir"}
    synced = [e for e in effects if e.kind != "fsync" or ((e.path in made or ".stage" not in e.path) == (what == "files"))]
    assert any(losses(root, synced, Judge(tmp_path / "scratch")))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory for images of file systems, where those can be mounted."""
    image, at = tmp_path / "probe", tmp_path / "probe-mount"
    at.mkdir()
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4 on this machine")
    with image.open("wb") as file:
        file.truncate(8 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=30)
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(at)], capture_output=True, text=True, timeout=30)
    if mounted.returncode:
        pytest.skip(f"no image can be mounted here: {mounted.stderr.strip()}")
    subprocess.run(["umount", str(at)], check=True, timeout=30)
    return tmp_path


def test_on_a_real_file_system_whose_power_goes_nothing_confirmed_is_lost(images: Path) -> None:
    points = run_worker("cut", images)
    assert len(points) > 15
    for point in points:
        assert point["loads"] == point["listed"], point
        assert point["saves_again"] is None, point
        assert "c" in point["loads"] if point["confirmed"] else "b" in point["loads"], point
    assert points[0]["loads"] == ["b"]
    assert points[-1]["loads"] == ["c"]


def test_a_file_system_that_lies_about_syncs_is_found_out(images: Path) -> None:
    """That a cut loses anything at all."""
    assert any(point["confirmed"] and "c" not in point["loads"] for point in run_worker("cut after lies", images))
