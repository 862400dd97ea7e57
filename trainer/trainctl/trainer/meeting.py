"""The store that ranks meet in: the job's own TCPStore, reached by connections of our own.

An object that waits blocks every other call on it, so whoever waits has a connection for that alone. With a single
rank the same protocol runs through an in-process store.
"""

import datetime as dt
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore  # torch.distributed's own, typed
from torch.distributed import DistNetworkError

from trainctl.trainer.agreement import Seal
from trainctl.trainer.descriptors import OwnSockets

_FOREVER = dt.timedelta(days=3650)
_CONNECT = dt.timedelta(seconds=30)
_PROBE_S = 2.0
_AGAIN_S = 0.25

T = TypeVar("T")


class StoreSilent(Exception):
    """The job's store does not answer."""


class StoreCut(StoreSilent):
    """The connection to the store is cut and could not be made anew just now; later it may."""


class Connection:
    """One connection to the meeting: sealed values under this attempt's prefix. For one thread at a time.

    A connection that is cut is made anew by `reopen`, for `patience_s` again and again, and the call is made once more:
    each of them may be made twice, the deciding one too, for what counts is what it reads back.
    """

    problem: str | None = None  # why it is cut, while it is
    _reopen: Callable[[], Store] | None = None
    patience_s = 0.0

    def __init__(
        self,
        store: Store,
        prefix: str,
        seal: Seal,
        *,
        reopen: Callable[[], Store] | None = None,
    ) -> None:
        self._prefix = prefix
        self._store = PrefixStore(prefix, store)
        self._seal = seal
        self._reopen = reopen

    def mend(self, why: str | None = None) -> None:
        """Make a connection that is cut anew. Raises `StoreCut`."""
        why = why or self.problem
        if why is None:
            return
        assert self._reopen is not None
        deadline = time.monotonic() + (self.patience_s if self.problem is None else 0.0)
        while True:
            try:
                self._store = PrefixStore(self._prefix, self._reopen())
            except (OSError, RuntimeError) as error:
                if time.monotonic() >= deadline:
                    self.problem = f"{why.splitlines()[0]}; {str(error).splitlines()[0]}"
                    raise StoreCut(self.problem) from None
                time.sleep(_AGAIN_S)
            else:
                self.problem = None
                return

    def _call(self, call: Callable[[Store], T]) -> T:
        if self.problem is not None:
            self.mend()
        try:
            return call(self._store)
        except DistNetworkError as error:
            if self._reopen is None:
                raise StoreSilent(str(error)) from None
            self.mend(str(error))
        except RuntimeError as error:
            raise StoreSilent(str(error)) from None
        try:
            return call(self._store)
        except DistNetworkError as error:
            self.problem = str(error).splitlines()[0]
            raise StoreCut(self.problem) from None
        except RuntimeError as error:
            raise StoreSilent(str(error)) from None

    def put(self, key: str, content: bytes) -> None:
        """Raises `StoreSilent`, as all methods here."""
        sealed = self._seal.sign(key, content)
        self._call(lambda store: store.set(key, sealed))  # type: ignore[arg-type]

    def get(self, key: str) -> bytes | None:
        """The content of a key that exists; None when it was not sealed by a rank of this run."""
        return self._seal.open(key, self._call(lambda store: store.get(key)))

    def get_all(self, keys: Sequence[str]) -> list[bytes | None]:
        values = self._call(lambda store: store.multi_get(list(keys)))
        return [self._seal.open(key, value) for key, value in zip(keys, values, strict=True)]

    def decide(self, key: str, content: bytes) -> bytes | None:
        """Write a key once, whoever comes first; return what it holds, None if a stranger wrote it."""
        sealed = self._seal.sign(key, content)
        return self._seal.open(key, self._call(lambda store: store.compare_set(key, "", sealed)))  # type: ignore[arg-type]

    def delete(self, keys: Sequence[str]) -> None:
        """Take keys away, as far as they exist: who waits for one after that waits in vain (`spent`)."""
        for key in keys:
            self._call(lambda store, key=key: store.delete_key(key))  # type: ignore[misc]

    def has(self, keys: Sequence[str]) -> bool:
        return bool(self._call(lambda store: store.check(list(keys))))

    def wait(self, keys: Sequence[str], timeout_s: float | None = None) -> None:
        """Block until all keys exist; the GIL is free meanwhile. Raises `StoreSilent` on time-out too."""
        timeout = _FOREVER if timeout_s is None else dt.timedelta(seconds=timeout_s)
        self._call(lambda store: store.wait(list(keys), timeout))


class Meeting:
    """Makes connections. Raises `StoreSilent` where the job's store cannot be reached."""

    def __init__(
        self, *, world_size: int, run_id: str, attempt: int, secret: bytes, sockets: OwnSockets | None = None
    ) -> None:
        """`sockets` hears of each connection that is made anew; those of `connect` are its caller's to note."""
        self._prefix = f"trainctl/{run_id}/{attempt}"
        self._seal = Seal(secret, attempt)
        self._local = HashStore() if world_size == 1 else None
        self._sockets = sockets or OwnSockets()

    def connect(self) -> Connection:
        if self._local is not None:
            return Connection(self._local, self._prefix, self._seal)
        try:
            store = _open(_CONNECT)
        except (KeyError, ValueError, RuntimeError) as error:
            raise StoreSilent(f"MASTER_ADDR and MASTER_PORT lead to no store: {error}") from None
        return Connection(store, self._prefix, self._seal, reopen=self._open_again)

    def _open_again(self) -> Store:
        """Raises `OSError` at once where nobody listens: TCPStore itself would ask for seconds, and print of it."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection((host, port), timeout=_PROBE_S).close()
        with self._sockets.opening(to_port=port):  # a worker that is forked later must let go of this one, too
            return _open(_CONNECT)


def _open(timeout: dt.timedelta) -> Store:
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timeout,
    )
