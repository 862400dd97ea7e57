"""CURVE keys, who may do what, and the files they live in.

    CONFIG/keys/user.json     the user's own key pair: may do everything on that user's runs
    CONFIG/keys/source.json   the key pair of that user's hubs and agents
    CONFIG/grants.json        other people's public keys with their roles

Secrets are created with O_EXCL and 0600 and refused when anybody else could read them. pyzmq's own
`create_certificates` writes the secret 0644, so it is not used.
"""

import contextlib
import getpass
import json
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from trainctl.wire.commands import ROLES, Role
from trainctl.wire.paths import UnsafePath, config_home, private_dir


class KeyPair(msgspec.Struct, frozen=True, kw_only=True):
    """A CURVE key pair, both halves Z85 text of 40 characters."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r})"


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    key: str
    role: Role


def new_keys() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public=public.decode(), secret=secret.decode())


def _load(path: Path) -> KeyPair:
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise UnsafePath(
                f"the secret key {path} can be read by others: if nobody has, run `chmod 600 {path}`; "
                f"otherwise delete it, and a new one is made at the next start"
            )
        try:
            return msgspec.json.decode(file.read(), type=KeyPair)
        except msgspec.MsgspecError as error:
            raise UnsafePath(f"{path} is no key file ({error}): delete it, and a new one is made") from None


def _load_or_make(path: Path) -> KeyPair:
    private_dir(path.parent)
    with contextlib.suppress(FileNotFoundError):
        return _load(path)
    keys = new_keys()
    # Written beside and linked into place: of two processes that start at once one wins, and the other reads
    # a whole file.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(keys))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, path)
        except FileExistsError:
            return _load(path)
    finally:
        beside.unlink()
    return keys


def user_keys() -> KeyPair:
    """This user's own keys, made on first use. Raises `UnsafePath` when the file is not private."""
    return _load_or_make(config_home() / "keys" / "user.json")


def source_keys() -> KeyPair:
    """The keys of this user's hubs and agents, made on first use. Raises `UnsafePath`."""
    return _load_or_make(config_home() / "keys" / "source.json")


@dataclass(frozen=True, kw_only=True)
class Actor:
    """Who an authenticated key belongs to."""

    name: str
    role: Role

    def may(self, needed: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(needed)


class Authority:
    """Answers who a public key is. Grants are read again whenever their file changes."""

    def __init__(self, owner: str, grants_file: Path | None = None) -> None:
        self._owner = owner
        self._owner_name = getpass.getuser()
        self._file = grants_file or config_home() / "grants.json"
        self._seen: tuple[int, int] | None = None
        self._grants: dict[str, Grant] = {}

    def who(self, key: str) -> Actor | None:
        """The actor behind a Z85 public key, or None: deny by default."""
        if key == self._owner:
            return Actor(name=self._owner_name, role="admin")
        self._refresh()
        grant = self._grants.get(key)
        return Actor(name=grant.name, role=grant.role) if grant else None

    def _refresh(self) -> None:
        try:
            found = self._file.stat()
        except OSError:
            self._seen, self._grants = None, {}
            return
        if (mark := (found.st_mtime_ns, found.st_size)) == self._seen:
            return
        self._seen, self._grants = mark, {}
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
            return  # somebody else could have written it: nobody is granted anything
        try:
            grants = msgspec.convert(json.loads(self._file.read_bytes()), list[Grant])
        except (OSError, ValueError):
            return
        self._grants = {grant.key: grant for grant in grants}
