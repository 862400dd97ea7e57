"""Machines for tests: network namespaces on one switch, each with a host name, a cable that can be pulled, and no more.

10.77.0.1  first node ──┐
10.77.0.2  second node ─┼─ switch, a namespace of its own: nothing of the host's network is touched
10.77.0.3  head node ───┘
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_count = itertools.count(1)


def unavailable() -> str | None:
    """Why this machine allows no network namespaces, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            return f"there is no `{program}` on this machine"
    name = f"tc{os.getpid()}probe"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "br0", "type", "bridge")
            _ip("-n", name, "link", "add", "p0", "type", "veth", "peer", "name", "p1")
            subprocess.run(
                ["ip", "netns", "exec", name, "unshare", "--uts", "hostname", "probe"], check=True, capture_output=True
            )
        finally:
            _ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode().strip() if isinstance(error.stderr, bytes) else error.stderr
        return f"this machine allows no network namespaces: {said}"
    return None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


class Machines:
    """Namespaces by the names of their machines. Leaving the context ends what runs in them and removes them."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self._directory = directory
        self._prefix = f"tc{os.getpid()}n{next(_count)}"
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, start=1)}

    def __enter__(self) -> Self:
        try:
            self._lay_cables()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def environment(self, name: str) -> dict[str, str]:
        """What differs between machines: a temporary directory of its own. The state directory is shared."""
        return os.environ | {
            "TMPDIR": str(self._directory / name),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }

    def popen(self, name: str, command: Sequence[str], **more: object) -> "subprocess.Popen[str]":
        """Start a program on a machine, in a session of its own."""
        inside = [
            "ip",
            "netns",
            "exec",
            self._of(name),
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {name} && exec "$@"',
            "-",
        ]
        made: subprocess.Popen[str] = subprocess.Popen(
            [*inside, *command],
            env=self.environment(name),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
            **more,  # type: ignore[call-overload]
        )
        return made

    def cut(self, name: str) -> None:
        """Pull the cable out of the switch: packets vanish, and nobody is told."""
        _ip("-n", self._of("switch"), "link", "set", name, "nomaster")

    def mend(self, name: str) -> None:
        _ip("-n", self._of("switch"), "link", "set", name, "master", "br0")

    def close(self) -> None:
        for name in [*self.addresses, "switch"]:
            namespace = self._of(name)
            listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
            for pid in listed.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)

    def _of(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _lay_cables(self) -> None:
        switch = self._of("switch")
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for name, address in self.addresses.items():
            namespace = self._of(name)
            (self._directory / name).mkdir(parents=True, exist_ok=True)
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("-n", switch, "link", "set", name, "master", "br0", "up")
            _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
