"""`trainctl keys`: this user's keys."""

import click

from trainctl.cli.options import json_option
from trainctl.client.discover import own_keys
from trainctl.client.errors import BadRequest
from trainctl.client.jsonable import dumps
from trainctl.wire.keys import source_keys
from trainctl.wire.paths import UnsafePath, config_home


@click.group()
def keys() -> None:
    """This user's keys; they are made on first use."""


@keys.command("init")
@json_option
def init(*, as_json: bool) -> None:
    """Make the keys now, if there are none."""
    _show(as_json=as_json)


@keys.command("show")
@json_option
def show(*, as_json: bool) -> None:
    """Print the public keys: yours, for the owner of another run, and that of your runs, for `--server-key`."""
    _show(as_json=as_json)


def _show(*, as_json: bool) -> None:
    try:
        public, source = own_keys().public, source_keys().public
    except UnsafePath as error:
        raise BadRequest(str(error)) from None
    directory = str(config_home() / "keys")
    if as_json:
        click.echo(dumps({"user": public, "source": source, "dir": directory}))
        return
    click.echo(f"your key      {public}   give it to the owner of a run you want to see")
    click.echo(f"your runs'    {source}   give it to those who reach your runs by tcp://, as --server-key")
    click.echo(f"kept in       {directory}")
