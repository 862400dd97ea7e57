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

pytestmark = pytest.mark.thorough

WORKER = Path(__file__).with_name("faulty_saves.py")
CHECKPOINTS = "runs/one/checkpoints/"


def run_worker(directory: Path, *scenarios: str) -> dict[str, list[dict[str, Any]]]:
    """What was found at each point of each scenario of faulty_saves.py, all in one process."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(directory), *scenarios],
        env=preloaded(directory),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    written = {name: (directory / name.replace(" ", "-") / "points").read_text() for name in scenarios}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in written.items()}


def no_images(directory: Path) -> str | None:
    """Why this machine mounts no images of file systems, or None."""
    image, at = directory / "probe", directory / "probe-mount"
    at.mkdir()
    if shutil.which("mkfs.ext4") is None:
        return "there is no mkfs.ext4 on this machine"
    with image.open("wb") as file:
        file.truncate(8 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=30)
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(at)], capture_output=True, text=True, timeout=30)
    if mounted.returncode:
        return f"no image can be mounted here: {mounted.stderr.strip()}"
    subprocess.run(["umount", str(at)], check=True, timeout=30)
    return None


@dataclass(frozen=True)
class Made:
    """A run's first three checkpoints and a retention as effects, with the directory that came of them; and the same
    on images whose power went, or why there are none."""

    root: Path
    effects: list[Effect]
    cuts: dict[str, list[dict[str, Any]]]
    no_images: str | None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("made")
    why = no_images(directory)
    cuts = run_worker(directory, "record", *(() if why else ("cut", "cut after lies")))
    effects = list(read_record(directory / "record" / "record"))
    return Made(directory / "record" / "disk", effects, cuts, why)


@pytest.fixture
def recorded(made: Made) -> tuple[Path, list[Effect]]:
    return made.root, made.effects


@pytest.fixture
def cuts(made: Made) -> dict[str, list[dict[str, Any]]]:
    if made.no_images is not None:
        pytest.skip(made.no_images)
    return made.cuts


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
        if effect.kind != "note":
            disk.apply(effect)
        elif effect.path.startswith("saved "):
            confirmed.add(effect.path.removeprefix("saved "))
        if effect.kind == "rename" and effect.other.endswith(".gone"):
            confirmed.discard(Path(effect.path).name)
        for state in disk.after_cut():
            if (state, frozenset(confirmed)) in judged:
                continue
            judged.add((state, frozenset(confirmed)))
            there = checkpoints_in(state)
            wrong = {name: judge.wrong_with(name, content) for name, content in there.items()}
            for problem in wrong.values():
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


def test_without_any_one_of_its_syncs_a_save_could_be_lost(recorded: tuple[Path, list[Effect]], tmp_path: Path) -> None:
    """That the model sees a loss, and that no sync is there for nothing."""
    root, effects = recorded
    judge = Judge(tmp_path / "scratch")
    begins = next(number for number, effect in enumerate(effects) if effect.path.endswith(".b.stage"))
    ends = next(number for number, effect in enumerate(effects) if effect.path == "saved b")
    synced = dict.fromkeys(effect.path for effect in effects[begins:ends] if effect.kind == "fsync")
    assert len(synced) == 6  # three files, the manifest, and the two directories
    for path in synced:
        without = [e for n, e in enumerate(effects) if not (begins < n < ends and e.kind == "fsync" and e.path == path)]
        assert any(losses(root, without, judge)), f"nobody would miss the sync of {path}"


def test_on_a_real_file_system_whose_power_goes_nothing_confirmed_is_lost(
    cuts: dict[str, list[dict[str, Any]]],
) -> None:
    points = cuts["cut"]
    assert len(points) > 15
    for point in points:
        assert point["loads"] == point["listed"], point
        assert point["saves_again"] is None, point
        assert "c" in point["loads"] if point["confirmed"] else "b" in point["loads"], point
    assert points[0]["loads"] == ["b"]
    assert points[-1]["loads"] == ["c"]


def test_a_file_system_that_lies_about_syncs_is_found_out(cuts: dict[str, list[dict[str, Any]]]) -> None:
    """That a cut loses anything at all."""
    assert any(point["confirmed"] and "c" not in point["loads"] for point in cuts["cut after lies"])
