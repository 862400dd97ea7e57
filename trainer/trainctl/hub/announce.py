"""Being found: the card, the ports, the link's path."""

import logging
import os
import socket
import time
from pathlib import Path

import msgspec
import zmq

from trainctl.wire.cards import boot_id, card_file, own_addresses, write_card
from trainctl.wire.keys import source_keys
from trainctl.wire.messages import Card
from trainctl.wire.rundir import keep_link
from trainctl.wire.server import Server

log = logging.getLogger(__name__)


def new_card(*, run_id: str, name: str, epoch: int, directory: str) -> Card:
    """Who we are, as yet without addresses."""
    return Card(
        kind="hub",
        source=run_id,
        name=name,
        epoch=epoch,
        addresses=[],
        server_key=source_keys().public,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=time.time(),
        dir=directory,
        job_id=os.environ.get("SLURM_JOB_ID"),
        boot_id=boot_id(),
    )


async def open_doors(server: Server, card: Card, directory: Path) -> Card:
    """Bind the server, where the hub before us was if that is free, and write the card.

    Raises zmq.ZMQError where nothing can be bound, `InsecureServer`.
    """
    ports = _previous_ports(card)
    try:
        await server.start("*", ports)
    except zmq.ZMQError as error:
        log.warning("cannot listen on all interfaces (%s): IPv4 only", error)
        await server.start("0.0.0.0", ports)  # noqa: S104 - CURVE and ZAP stand in front of it
    complete = msgspec.structs.replace(card, addresses=own_addresses(server.port), publish_port=server.publish_port)
    try:
        write_card(complete)
        keep_link(complete.source, Path(directory))
    except OSError as error:
        log.warning("the card cannot be written, so `trainctl ls` does not show this run: %s", error)
    return complete


def _previous_ports(card: Card) -> tuple[int, int]:
    try:
        before = msgspec.json.decode(card_file(card).read_bytes(), type=Card)
        if before.host != card.host or not before.addresses:
            return 0, 0
        return int(before.addresses[0].rsplit(":", 1)[1]), before.publish_port
    except (OSError, ValueError, msgspec.MsgspecError):
        return 0, 0
