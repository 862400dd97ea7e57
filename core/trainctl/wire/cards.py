"""Cards: how the hubs and agents of a user are found without a service."""

import contextlib
import socket
from pathlib import Path

import msgspec
import psutil

from trainctl.wire.messages import Card
from trainctl.wire.paths import cards_dir, private_dir
from trainctl.wire.rundir import write_atomic


def boot_id() -> str | None:
    """Tells machines apart that share a host name, such as containers."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def card_file(card: Card) -> Path:
    return cards_dir() / f"{card.kind}-{card.source}.json"


def write_card(card: Card) -> Path:
    """Publish a card, replacing an older one of the same source. Raises OSError."""
    private_dir(cards_dir())
    path = card_file(card)
    write_atomic(path, msgspec.json.encode(card))
    return path


def remove_card(card: Card) -> None:
    """Take our own card away; a newer epoch's stays."""
    path = card_file(card)
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        if msgspec.json.decode(path.read_bytes(), type=Card).epoch <= card.epoch:
            path.unlink()


def read_cards() -> list[Card]:
    """All cards, newest first. Files that are no cards are passed over: another version may have written them."""
    found = []
    for path in sorted(cards_dir().glob("*.json")):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            found.append(msgspec.json.decode(path.read_bytes(), type=Card))
    return sorted(found, key=lambda card: card.started, reverse=True)


def own_addresses(port: int) -> list[str]:
    """Every address at which a socket bound to all interfaces can be reached, loopback first."""
    hosts = ["127.0.0.1"]
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                hosts.append(address.address)
            elif address.family == socket.AF_INET6 and not address.address.startswith(("::1", "fe80")):
                hosts.append(f"[{address.address}]")
    return [f"tcp://{host}:{port}" for host in dict.fromkeys(hosts)]


def is_this_machine(card: Card) -> bool:
    return card.host == socket.gethostname() and card.boot_id in {None, boot_id()}
