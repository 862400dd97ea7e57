"""`trainctl status`: one picture of now."""

import asyncio
import contextlib
import json
import sys

import click

from trainctl.cli.acting import opened
from trainctl.cli.options import chosen, run_argument, run_options
from trainctl.client.discover import far_address, hub_cards
from trainctl.client.session import Session
from trainctl.client.status import status_json
from trainctl.client.status_text import status_text
from trainctl.client.watching import watch
from trainctl.wire.messages import FINAL_STATES

_CLEAR = "\x1b[H\x1b[2J"


@click.command()
@run_argument
@click.option("--watch", "watching", is_flag=True, help="Again each second, until the run ends.")
@run_options
def status(run: str | None, run_argument: str | None, server_key: str | None, *, watching: bool, as_json: bool) -> None:
    """One picture of now."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_status(chosen(run, run_argument), server_key, watching=watching, as_json=as_json))


async def _status(run: str | None, server_key: str | None, *, watching: bool, as_json: bool) -> None:
    async with opened(run, server_key) as session:
        if not watching:
            _print(session, as_json=as_json)
            return
        following = asyncio.create_task(_follow(session))
        try:
            while not (await asyncio.wait({following}, timeout=1.0))[0]:
                if sys.stdout.isatty() and not as_json:
                    click.echo(_CLEAR, nl=False)
                _print(session, as_json=as_json)
            await following
            _print(session, as_json=as_json)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


def _hub_line(session: Session) -> str:
    """How another machine reaches a live run; empty where its card is not to be seen from here."""
    info, state = session.model.info, session.model.state
    if not session.live or info is None or state is None or state.state in FINAL_STATES:
        return ""
    card = hub_cards().get(info.id)
    return f"  hub  {far_address(card)}  --server-key '{card.server_key}'" if card is not None else ""


async def _follow(session: Session) -> None:
    async with contextlib.aclosing(watch(session)) as items:
        async for _ in items:
            pass


def _print(session: Session, *, as_json: bool) -> None:
    model = session.model
    if as_json:
        click.echo(json.dumps(status_json(model), allow_nan=False))
    else:
        click.echo("\n".join(line for line in (status_text(model), _hub_line(session)) if line))
    sys.stdout.flush()
