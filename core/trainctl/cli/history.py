"""`trainctl history`: values or rollups of metrics."""

import asyncio
from collections.abc import Iterator

import click

from trainctl.cli.acting import opened
from trainctl.cli.options import run_options
from trainctl.cli.table import table
from trainctl.client.errors import BadRequest
from trainctl.client.figures import number
from trainctl.client.jsonable import dumps
from trainctl.client.points import Points

VALUE_COLUMNS = ("step", "time", "value", "incarnation")
ROLLUP_COLUMNS = ("step", "time", "min", "max", "mean", "last", "count", "incarnation")
_WHOLE = frozenset({"step", "count", "incarnation"})


@click.command()
@click.argument("metrics", nargs=-1, required=True, metavar="METRIC…")
@click.option("--from-step", type=click.IntRange(0), metavar="S")
@click.option("--to-step", type=click.IntRange(0), metavar="S")
@click.option("--points", type=click.IntRange(1, 20_000), metavar="N", help="About N rollups: min, max, mean, last.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@run_options
def history(
    run: str | None,
    server_key: str | None,
    metrics: tuple[str, ...],
    from_step: int | None,
    to_step: int | None,
    points: int | None,
    *,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Values of metrics by step, or rollups with --points."""
    if as_csv and as_json:
        raise click.UsageError("--csv and --json cannot both be had")
    names = list(dict.fromkeys(metrics))
    found = asyncio.run(_history(run, server_key, names, from_step, to_step, points))
    columns = VALUE_COLUMNS if points is None else ROLLUP_COLUMNS
    if as_json:
        rows = {name: [list(row) for row in _rows(found[name], columns)] if name in found else [] for name in names}
        click.echo(dumps(rows))
    elif as_csv:
        click.echo(",".join(("metric", *columns)))
        for name in names:
            for row in _rows(found[name], columns) if name in found else ():
                click.echo(",".join([_quoted(name), *(repr(value) for value in row)]))
    else:
        _print(found, columns)
    if not as_json and (missing := [name for name in names if name not in found or not len(found[name])]):
        click.echo(f"nothing matched for {', '.join(missing)}", err=True)


async def _history(
    run: str | None,
    server_key: str | None,
    names: list[str],
    from_step: int | None,
    to_step: int | None,
    points: int | None,
) -> dict[str, Points]:
    async with opened(run, server_key) as session:
        found = await session.history(names, from_step=from_step, to_step=to_step, points=points)
        known = session.model.metrics.keys() | found.keys()
        for name in names:
            if name not in known:
                listed = ", ".join(sorted(known)[:20]) or "none yet"
                raise BadRequest(f"{session.model.name} has no metric {name!r}", f"it has: {listed}")
        return found


def _rows(points: Points, columns: tuple[str, ...]) -> Iterator[tuple[int | float, ...]]:
    taken = [points.columns[column].tolist() for column in columns]
    return zip(*taken, strict=True)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if any(c in name for c in ',"\n') else name


def _print(found: dict[str, Points], columns: tuple[str, ...]) -> None:
    shown = tuple(column for column in columns if column != "time")
    for name, points in found.items():
        rows = [
            tuple(str(cell) if column in _WHOLE else number(cell) for column, cell in zip(shown, row, strict=True))
            for row in _rows(points, shown)
        ]
        click.echo(table((name, *shown[1:]), rows, right=frozenset(range(1, len(shown)))))
