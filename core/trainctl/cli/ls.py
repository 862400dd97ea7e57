"""`trainctl ls`: which runs there are, and which of them live."""

import asyncio

import click

from trainctl.cli.options import json_option
from trainctl.cli.table import table
from trainctl.client.discover import RunSummary, find_runs
from trainctl.client.figures import duration
from trainctl.client.jsonable import dumps, jsonable


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Also runs that ended in good order.")
@json_option
def ls(*, everything: bool, as_json: bool) -> None:
    """List runs: live, lost, finished."""
    runs = asyncio.run(find_runs(recorded=everything))
    if as_json:
        click.echo(dumps({"runs": [jsonable(summary) for summary in runs]}))
        return
    if not runs:
        more = "" if everything else "; `trainctl ls -a` also lists those that ended"
        click.echo(f"no runs{more}", err=True)
        return
    click.echo(table(("RUN", "STATE", "STEP", "AGE", "HOST", "ID"), [_row(summary) for summary in runs]))


def _row(summary: RunSummary) -> tuple[str, ...]:
    total = f"/{summary.total_steps}" if summary.total_steps else ""
    state = summary.state or "?"
    return (
        summary.run,
        f"{state} ({summary.problem})" if summary.problem else state,
        "n/a" if summary.step is None else f"{summary.step}{total}",
        "" if summary.reachable or summary.age_s is None else duration(summary.age_s),
        summary.host or "n/a",
        summary.id,
    )
