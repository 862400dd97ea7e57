"""Nothing is read, and least of all unpickled, that our manifest does not vouch for and our user alone can change."""

import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_checkpoint_safety import Small

import trainctl.trainer.checkpoint.load as loading
from trainctl.trainer.checkpoint import CheckpointError
from trainctl.trainer.checkpoint.export import export
from trainctl.wire.manifest import (
    MANIFEST,
    hash_file,
    list_checkpoints,
    read_manifest,
    verify,
    write_manifest,
)

INDEX, OWN, DATA = ".metadata", "rank-00000.pt", "__0_0.distcp"


@pytest.fixture
def small(tmp_path: Path) -> Small:
    """A run with two checkpoints: a, and the newer b."""
    training = Small(tmp_path / "checkpoints", width=8)
    for name in "ab":
        training.step()
        assert training.save(name) is None
    return training


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self._trace),))


def vouch(directory: Path, names: Sequence[str] = (INDEX, OWN, DATA)) -> None:
    """Write a manifest that fits what lies there now, as whoever made the checkpoint could have."""
    manifest = read_manifest(directory)
    files = []
    for name in names:
        size, digest = hash_file(directory / name)
        files.append(msgspec.structs.replace(manifest.files[0], name=name, bytes=size, sha256=digest))
    write_manifest(directory, msgspec.structs.replace(manifest, files=files))


def assert_refused(small: Small, words: str) -> None:
    before = small.bits()
    with pytest.raises(CheckpointError, match=words):
        small.checkpointer.load("b")
    small.assert_untouched(before)
    small.checkpointer.load("a")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", [INDEX, OWN, DATA, MANIFEST])
def test_the_next_older_one_is_offered_whatever_is_damaged(
    small: Small, damage: Callable[[Path], None], name: str
) -> None:
    assert small.save("c") is None
    written = (small.directory / "b").stat()
    damage(small.directory / "b" / name)
    # Where the manifest cannot tell when it was written, its directory does, as long as that was the last change.
    os.utime(small.directory / "b", ns=(written.st_atime_ns, written.st_mtime_ns))
    assert_refused(small, r"b.*nothing was changed.*: the next older one is a \(step 1\)$")


@pytest.mark.parametrize("name", ["", INDEX, OWN, DATA, MANIFEST])
def test_no_link_is_followed(small: Small, name: str, tmp_path: Path) -> None:
    """Even to what has the right content: whoever may change where it leads decides what is read."""
    path = small.directory / "b" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert_refused(small, "links are not followed")


def test_no_link_is_followed_on_the_way_to_a_file(small: Small, tmp_path: Path) -> None:
    """A script's own files may lie in folders."""
    directory = small.directory / "b"
    (directory / "folder").mkdir()
    (directory / "folder" / "file").write_bytes(b"content")
    vouch(directory, [INDEX, OWN, DATA, "folder/file"])
    assert verify(directory).step == 2
    (directory / "folder").rename(tmp_path / "elsewhere")
    (directory / "folder").symlink_to(tmp_path / "elsewhere")
    assert_refused(small, "b/folder is not a directory: links are not followed")


@pytest.mark.parametrize("name", ["", INDEX, OWN, DATA, MANIFEST])
def test_what_everybody_may_write_to_is_not_read(small: Small, name: str) -> None:
    path = small.directory / "b" / name
    path.parent.chmod(0o755)
    path.chmod(path.stat().st_mode | 0o002)
    assert_refused(small, "everybody may write to b.*: chmod o-w")
    assert [info.id for info in list_checkpoints(small.directory)] == (["a"] if name in {"", MANIFEST} else ["a", "b"])


def test_under_a_umask_of_0_a_checkpoint_is_for_us_alone_and_loads(small: Small) -> None:
    before = os.umask(0)
    try:
        assert small.save("c") is None
    finally:
        os.umask(before)
    small.checkpointer.load("c")
    (small.directory / "c").chmod(0o755)  # and as its files come into reach, they are no longer trusted
    with pytest.raises(CheckpointError, match="everybody may write to c/"):
        small.checkpointer.load("c")


def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(small: Small) -> None:
    (small.directory / "b" / DATA).unlink()
    os.mkfifo(small.directory / "b" / DATA)
    assert_refused(small, "b/__0_0.distcp is not a regular file")


@pytest.mark.parametrize("name", ["/etc/hostname", "../a/rank-00000.pt", "./rank-00000.pt", "x/../rank-00000.pt"])
def test_a_manifest_names_plain_files_below_its_directory(small: Small, name: str) -> None:
    (small.directory / "b" / "x").mkdir()
    vouch(small.directory / "b", [INDEX, OWN, DATA, name])
    assert_refused(small, "names a file outside it")


def test_a_manifest_that_lists_a_file_twice_is_refused(small: Small) -> None:
    vouch(small.directory / "b", [INDEX, OWN, DATA, OWN])
    assert_refused(small, "lists 'rank-00000.pt' 2 times")


@pytest.mark.parametrize("name", [INDEX, OWN])
def test_a_pickle_that_a_fitting_manifest_vouches_for_runs_nothing(small: Small, name: str, tmp_path: Path) -> None:
    """A checkpoint from elsewhere: its copy is ours, and its manifest fits."""
    (small.directory / "b" / name).write_bytes(pickle.dumps(Hostile(tmp_path / "hacked")))
    vouch(small.directory / "b")
    assert verify(small.directory / "b").step == 2
    assert_refused(small, "b cannot be read|asks for posix.mkdir, which no index needs: not loaded")
    with pytest.raises(Exception, match=r"posix\.mkdir|weights_only"):
        export(small.directory / "b", tmp_path / "weights")
    assert not (tmp_path / "hacked").exists()
    assert not (tmp_path / "weights").exists()


def test_an_index_leads_to_no_file_that_the_manifest_does_not_list(small: Small) -> None:
    index = small.directory / "b" / INDEX
    metadata = pickle.loads(index.read_bytes())
    for where, stored in metadata.storage_data.items():
        metadata.storage_data[where] = type(stored)("../a/__0_0.distcp", stored.offset, stored.length)
    index.write_bytes(pickle.dumps(metadata))
    vouch(small.directory / "b")
    assert_refused(small, "names '../a/__0_0.distcp', which its manifest does not list")


@pytest.mark.parametrize("name", [INDEX, OWN])
def test_a_pickle_that_is_swapped_after_it_was_verified_is_not_opened(
    small: Small, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify_and_lose(directory: Path, **given: Any) -> Any:
        manifest = verify(directory, **given)
        if directory.name == "b":
            (directory / name).write_bytes(pickle.dumps(Hostile(tmp_path / "hacked")))
        return manifest

    monkeypatch.setattr(loading, "verify", verify_and_lose)
    assert_refused(small, f"^b/{name} has .* bytes.*nothing was changed.*the next older one is a")
    assert not (tmp_path / "hacked").exists()
