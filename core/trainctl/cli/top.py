"""`trainctl top`: nodes and GPUs from their agents, without a run."""

import asyncio
import sys
import time

import click
import msgspec

from trainctl.cli.options import json_option
from trainctl.cli.table import table
from trainctl.client.discover import check_address, own_keys, own_source_key, surely_gone
from trainctl.client.errors import ClientError, NotReachable
from trainctl.client.figures import duration, memory
from trainctl.client.jsonable import dumps
from trainctl.client.status import node_json
from trainctl.client.wire_errors import from_peer
from trainctl.wire.cards import read_cards
from trainctl.wire.messages import Card, NodeReading, Nodes, NodesRequest
from trainctl.wire.peer import Peer, PeerError

_TIMEOUT_S = 2.0
_CLEAR = "\x1b[H\x1b[2J"


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What one agent answered, or why it did not."""

    name: str
    readings: list[NodeReading]
    problem: ClientError | None = None


@click.command()
@click.argument("addresses", nargs=-1, metavar="[ADDRESS…]")
@click.option("--server-key", metavar="KEY", help="The agents' public key, with tcp:// addresses of somebody else's.")
@click.option("--once", is_flag=True, help="One picture, also on a terminal.")
@json_option
def top(addresses: tuple[str, ...], server_key: str | None, *, once: bool, as_json: bool) -> int:
    """Nodes and GPUs without a run. ADDRESS: a node's name or tcp://host:port; else every agent of yours."""
    keeps_on = sys.stdout.isatty() and not once and not as_json
    try:
        while True:
            seen = asyncio.run(_look(addresses, server_key))
            if keeps_on:
                click.echo(_CLEAR, nl=False)
            code = _print(seen, as_json=as_json)
            if not keeps_on:
                return code
            time.sleep(1.0)
    except KeyboardInterrupt:
        return 0


async def _look(addresses: tuple[str, ...], server_key: str | None) -> list[Seen]:
    cards = _cards(addresses, server_key)
    return list(await asyncio.gather(*(_ask(card) for card in cards)))


def _cards(addresses: tuple[str, ...], server_key: str | None) -> list[Card]:
    known = [card for card in read_cards() if card.kind == "agent"]
    if not addresses:
        cards = [card for card in known if not surely_gone(card)]
        if not cards:
            raise NotReachable(
                "no agent of yours is running", "start one with `trainctl agent`, or name one: tcp://host:port"
            )
        return cards
    cards = []
    for address in addresses:
        if address.startswith("tcp://"):
            check_address(address)
            cards.append(_card_of(address, server_key or own_source_key()))
            continue
        found = [card for card in known if address in {card.name, card.host, card.source}]
        if not found:
            names = ", ".join(sorted({card.name for card in known})) or "none"
            raise NotReachable(f"no agent is known on {address!r}", f"agents are known on: {names}")
        cards += found
    return cards


def _card_of(address: str, key: str) -> Card:
    return Card(
        kind="agent", source="", name=address, epoch=0, addresses=[address], server_key=key, host="", pid=0, started=0.0
    )


async def _ask(card: Card) -> Seen:
    try:
        peer = await Peer.connect(
            card.addresses, card.server_key, own_keys(), timeout_s=_TIMEOUT_S, name="trainctl top"
        )
    except (PeerError, ValueError) as error:
        return Seen(name=card.name, readings=[], problem=from_peer(error, f"the agent of {card.name}"))
    try:
        answer = await peer.ask(NodesRequest(req=0), Nodes, timeout_s=_TIMEOUT_S)
    except PeerError as error:
        return Seen(name=card.name, readings=[], problem=from_peer(error, f"the agent of {card.name}"))
    finally:
        peer.close()
    return Seen(name=card.name, readings=answer.nodes)


def _print(seen: list[Seen], *, as_json: bool) -> int:
    now = time.time()
    nodes = _newest(seen)
    problems = [answer.problem for answer in seen if answer.problem is not None]
    if problems and not nodes:
        raise problems[0]
    for problem in problems:
        click.echo(f"trainctl: {problem.message}", err=True)
    if as_json:
        click.echo(dumps({"nodes": [node_json(reading, max(0.0, now - reading.time)) for reading in nodes]}))
    else:
        click.echo(_table(nodes, now))
    return 0


def _newest(seen: list[Seen]) -> list[NodeReading]:
    # Agents of several jobs may share a node: of one node the newest reading is shown.
    newest: dict[str, NodeReading] = {}
    for answer in seen:
        for reading in answer.readings:
            if reading.node not in newest or newest[reading.node].time < reading.time:
                newest[reading.node] = reading
    return [newest[node] for node in sorted(newest)]


def _table(nodes: list[NodeReading], now: float) -> str:
    rows = []
    for reading in nodes:
        late = now - reading.time
        state = reading.state if late < 5 else f"{reading.state}, {duration(late)} ago"
        cpu = "n/a" if reading.cpu is None else f"{reading.cpu:.0f}%"
        gpus = "" if reading.gpus else "none" if reading.gpu_state == "none" else reading.gpu_state
        rows.append(
            (reading.node, state, cpu, memory(reading.memory_used_bytes, reading.memory_total_bytes), gpus, "", "", "")
        )
        for gpu in reading.gpus:
            busy = "n/a" if gpu.utilization is None else f"{gpu.utilization:.0f}%"
            heat = "n/a" if gpu.temperature_c is None else f"{gpu.temperature_c:.0f}°C"
            power = "n/a" if gpu.power_w is None else f"{gpu.power_w:.0f} W"
            if gpu.power_w is not None and gpu.power_limit_w:
                power = f"{gpu.power_w:.0f}/{gpu.power_limit_w:.0f} W"
            held = memory(gpu.memory_used_bytes, gpu.memory_total_bytes)
            throttled = f" throttled: {gpu.throttle}" if gpu.throttle else ""
            rows.append(("", "", "", "", f"{gpu.index} {gpu.name}", busy, held, f"{power} {heat}{throttled}"))
    return table(("NODE", "STATE", "CPU", "MEMORY", "GPU", "BUSY", "HELD", "POWER, HEAT"), rows)
