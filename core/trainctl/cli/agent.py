"""`trainctl agent`: become this node's agent."""

import os
import sys

import click

from trainctl.cli.options import json_option


@click.command()
@click.option("--interval", type=click.FloatRange(0.2, 3600), metavar="S", help="Seconds between readings.")
@click.option("--prometheus", type=click.IntRange(1, 65535), metavar="PORT", help="Also serve /metrics on 127.0.0.1.")
@click.option("--bind", metavar="ADDR", help="Listen on this address only.")
@click.option("--job", metavar="JOB", help="The job it belongs to; else SLURM_JOB_ID or this user.")
@json_option
def agent(interval: float | None, prometheus: int | None, bind: str | None, job: str | None, *, as_json: bool) -> None:
    """Run this node's agent in the foreground; runs start their own."""
    del as_json  # it prints nothing but its log
    given = {"--interval": interval, "--prometheus": prometheus, "--bind": bind, "--job": job}
    words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "trainctl.agent", *words])  # noqa: S606 - our own program
