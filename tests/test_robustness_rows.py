"""docs/robustness.md is what operators rely on: each command in it names tests that are there."""

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(r"`(pytest [^`]+)`", (ROOT / "docs" / "robustness.md").read_text())


@functools.cache
def names(file: Path) -> set[str]:
    """Of the tests in a file, and the names by which their parameters are told apart."""
    found = {file.stem}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def files_of(place: Path) -> list[Path]:
    return sorted(place.rglob("test_*.py")) if place.is_dir() else [place]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_of_a_row_names_tests_that_are_there(command: str) -> None:
    words = shlex.split(command)[1:]
    taking = {at + 1 for at, word in enumerate(words) if word in {"-k", "-m"}}
    wanted = [word for at, word in enumerate(words) if at in taking and words[at - 1] == "-k"]
    places = [word for at, word in enumerate(words) if at not in taking and not word.startswith("-")]
    assert places
    known: set[str] = set()
    for place in places:
        path, *inner = place.split("::")
        assert (ROOT / path).exists(), path
        of_files = set().union(*(names(file) for file in files_of(ROOT / path)))
        assert {name.split("[")[0] for name in inner} <= of_files, place
        known |= of_files
    for part in re.split(r" or ", " or ".join(wanted)):
        assert any(part.strip().lower() in name.lower() for name in known), part


def test_there_are_rows() -> None:
    assert len(COMMANDS) > 100
