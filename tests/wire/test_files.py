"""Keys, cards, numbers and manifests on disk: private, whole, and never trusted blindly."""

import os
import threading
from pathlib import Path

import pytest

from trainctl.wire.cards import read_cards, remove_card, write_card
from trainctl.wire.keys import Authority, new_keys, source_keys, user_keys
from trainctl.wire.manifest import (
    DamagedCheckpoint,
    Manifest,
    ManifestFile,
    hash_file,
    list_checkpoints,
    pick,
    pin,
    remember_check,
    verify,
    write_manifest,
)
from trainctl.wire.messages import Card
from trainctl.wire.paths import UnsafePath, config_home, private_dir, socket_dir
from trainctl.wire.rundir import RunDir


def test_keys_are_made_once_and_private() -> None:
    first = user_keys()
    assert user_keys() == first
    assert source_keys() != first
    path = config_home() / "keys" / "user.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert first.secret not in repr(first)
    path.chmod(0o644)
    with pytest.raises(UnsafePath, match="chmod 600"):
        user_keys()


def test_processes_that_start_at_once_make_one_key() -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(user_keys().public)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1


def test_grants_that_somebody_else_could_write_count_for_nothing(tmp_path: Path) -> None:
    key, file = new_keys().public, tmp_path / "grants.json"
    file.write_text(f'[{{"name": "ann", "key": "{key}", "role": "operator"}}]')
    authority = Authority(new_keys().public, file)
    found = authority.who(key)
    assert found is not None
    assert (found.name, found.may("operator"), found.may("admin")) == ("ann", True, False)
    file.chmod(0o666)
    file.write_text(file.read_text() + " ")
    assert authority.who(key) is None
    file.unlink()
    assert authority.who(key) is None


def test_a_directory_that_is_not_ours_alone_is_tightened_or_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    assert private_dir(tmp_path / "open").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(UnsafePath, match="not a directory of user"):
        private_dir(tmp_path / "link")
    assert len(os.fsencode(socket_dir())) < 60


def test_numbers_are_given_out_once_however_many_ask(tmp_path: Path) -> None:
    run_dir, given = RunDir(tmp_path / "run"), []
    run_dir.create()
    threads = [threading.Thread(target=lambda: given.append(run_dir.allocate("epoch"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == list(range(1, 9))
    assert (run_dir.newest("epoch"), run_dir.newest("attempt")) == (8, 0)


def test_a_newer_card_is_not_taken_away_by_the_older_source() -> None:
    def card(epoch: int) -> Card:
        return Card(
            kind="hub", source="r", name="r", epoch=epoch, addresses=[], server_key="k", host="h", pid=1, started=epoch
        )

    write_card(card(1))
    write_card(card(2))
    remove_card(card(1))
    assert [found.epoch for found in read_cards()] == [2]
    remove_card(card(2))
    assert read_cards() == []


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "step-1"
    directory.mkdir()
    (directory / "data").write_bytes(b"0123456789")
    size, digest = hash_file(directory / "data")
    manifest = Manifest(
        id="step-1", run="r", step=1, incarnation=1, attempt=1, world_size=1, time=5.0, metrics={"loss": 2.0},
        files=[ManifestFile(name="data", bytes=size, sha256=digest)],
    )  # fmt: skip
    write_manifest(directory, manifest)
    return directory


def test_a_whole_checkpoint_verifies_and_every_damage_is_named(checkpoint: Path) -> None:
    assert verify(checkpoint).step == 1
    data = checkpoint / "data"
    for damage, said in ((b"012345678X", "is damaged"), (b"01234", "has 5 bytes, 10 were written")):
        data.write_bytes(damage)
        with pytest.raises(DamagedCheckpoint, match=f"step-1/data {said}"):
            verify(checkpoint)
    data.unlink()
    with pytest.raises(DamagedCheckpoint, match="data is missing"):
        verify(checkpoint)
    (checkpoint / "MANIFEST.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="never completed"):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["../data", "/etc/passwd", "a/../../data"])
def test_a_manifest_that_points_outside_is_refused(checkpoint: Path, name: str) -> None:
    outside = ManifestFile(name=name, bytes=10, sha256="0" * 64)
    manifest = Manifest(
        id="step-1", run="r", step=1, incarnation=1, attempt=1, world_size=1, time=5.0, files=[outside]
    )  # fmt: skip
    write_manifest(checkpoint, manifest)
    with pytest.raises(DamagedCheckpoint, match="names a file outside it"):
        verify(checkpoint)


def test_a_manifest_that_was_edited_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "MANIFEST.json"
    path.write_text(path.read_text().replace('"step": 1', '"step": 2'))
    with pytest.raises(DamagedCheckpoint, match="not what was written"):
        verify(checkpoint)


def test_listing_knows_pins_and_checks_and_what_last_and_best_mean(checkpoint: Path) -> None:
    pin(checkpoint, pinned=True)
    (found,) = list_checkpoints(checkpoint.parent)
    assert (found.id, found.pinned, found.verified, found.bytes) == ("step-1", True, None, 10)
    assert pick([found], "last") == pick([found], "best") == pick([found], "1") == pick([found], "step-1") == found
    assert pick([found], "2") is None
    remember_check(checkpoint, ok=False, text="damaged")
    (damaged,) = list_checkpoints(checkpoint.parent)
    assert (damaged.verified, pick([damaged], "last"), pick([damaged], "1")) == (False, None, damaged)
