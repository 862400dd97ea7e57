"""The store that ranks meet in: the job's own TCPStore, reached by connections of our own.

An object that waits blocks every other call on it, so whoever waits has a connection for that alone. With a single
rank the same protocol runs through an in-process store.
"""

import datetime as dt
import os
from collections.abc import Sequence

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore  # torch.distributed's own, typed

from trainctl.trainer.agreement import Seal

_FOREVER = dt.timedelta(days=3650)
_CONNECT = dt.timedelta(seconds=30)


class StoreSilent(Exception):
    """The job's store does not answer."""


class Connection:
    """One connection to the meeting: sealed values under this attempt's prefix. For one thread at a time."""

    def __init__(self, store: Store, prefix: str, seal: Seal) -> None:
        self._store = PrefixStore(prefix, store)
        self._seal = seal

    def put(self, key: str, content: bytes) -> None:
        """Raises `StoreSilent`, as all methods here."""
        try:
            self._store.set(key, self._seal.sign(key, content))  # type: ignore[arg-type]
        except RuntimeError as error:
            raise StoreSilent(str(error)) from None

    def get(self, key: str) -> bytes | None:
        """The content of a key that exists; None when it was not sealed by a rank of this run."""
        try:
            return self._seal.open(key, self._store.get(key))
        except RuntimeError as error:
            raise StoreSilent(str(error)) from None

    def get_all(self, keys: Sequence[str]) -> list[bytes | None]:
        try:
            values = self._store.multi_get(list(keys))
        except RuntimeError as error:
            raise StoreSilent(str(error)) from None
        return [self._seal.open(key, value) for key, value in zip(keys, values, strict=True)]

    def decide(self, key: str, content: bytes) -> bytes | None:
        """Write a key once, whoever comes first; return what it holds, None if a stranger wrote it."""
        try:
            held = self._store.compare_set(key, "", self._seal.sign(key, content))  # type: ignore[arg-type]
        except RuntimeError as error:
            raise StoreSilent(str(error)) from None
        return self._seal.open(key, held)

    def has(self, keys: Sequence[str]) -> bool:
        try:
            return bool(self._store.check(list(keys)))
        except RuntimeError as error:
            raise StoreSilent(str(error)) from None

    def wait(self, keys: Sequence[str], timeout_s: float | None = None) -> None:
        """Block until all keys exist; the GIL is free meanwhile. Raises `StoreSilent` on time-out too."""
        timeout = _FOREVER if timeout_s is None else dt.timedelta(seconds=timeout_s)
        try:
            self._store.wait(list(keys), timeout)
        except RuntimeError as error:
            raise StoreSilent(str(error)) from None


class Meeting:
    """Makes connections. Raises `StoreSilent` where the job's store cannot be reached."""

    def __init__(self, *, world_size: int, run_id: str, attempt: int, secret: bytes) -> None:
        self._prefix = f"trainctl/{run_id}/{attempt}"
        self._seal = Seal(secret, attempt)
        self._local = HashStore() if world_size == 1 else None

    def connect(self) -> Connection:
        store: Store
        if self._local is not None:
            return Connection(self._local, self._prefix, self._seal)
        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=_CONNECT,
            )
        except (KeyError, ValueError, RuntimeError) as error:
            raise StoreSilent(f"MASTER_ADDR and MASTER_PORT lead to no store: {error}") from None
        return Connection(store, self._prefix, self._seal)
