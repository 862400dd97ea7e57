"""`trainctl history`: values or rollups of metrics, or which metrics there are."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import click

from trainctl.cli.acting import opened
from trainctl.cli.options import chosen, run_options
from trainctl.cli.table import table
from trainctl.client.errors import BadRequest, RunNotFound
from trainctl.client.figures import number
from trainctl.client.jsonable import dumps
from trainctl.client.points import Points
from trainctl.wire.rundir import RunDir

VALUE_COLUMNS = ("step", "time", "value", "incarnation")
ROLLUP_COLUMNS = ("step", "time", "min", "max", "mean", "last", "count", "incarnation")
LISTED = ("metric", "count", "step", "time", "value", "incarnation")
_WHOLE = frozenset({"step", "count", "incarnation"})
_PATHS = ("/", "./", "../", "~")

Listed: TypeAlias = tuple[str, int, int, float, float, int]


@click.command()
@click.argument("words", nargs=-1, metavar="[DIR] [METRIC…]")
@click.option("--from-step", type=click.IntRange(0), metavar="S")
@click.option("--to-step", type=click.IntRange(0), metavar="S")
@click.option("--points", type=click.IntRange(1, 20_000), metavar="N", help="About N rollups: min, max, mean, last.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@run_options
def history(
    run: str | None,
    server_key: str | None,
    words: tuple[str, ...],
    from_step: int | None,
    to_step: int | None,
    points: int | None,
    *,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Values of metrics by step, or rollups with --points. Without METRIC: which there are.

    DIR is the directory of a run, live or over; -r names a run in any other way.
    """
    if as_csv and as_json:
        raise click.UsageError("--csv and --json cannot both be had")
    run, names = _run_and_names(run, words)
    if not names and points is not None:
        raise click.UsageError("--points needs a METRIC")
    try:
        if not names:
            _print_listed(asyncio.run(_listed(run, server_key, from_step, to_step)), as_csv=as_csv, as_json=as_json)
            return
        found = asyncio.run(_history(run, server_key, names, from_step, to_step, points))
    except RunNotFound as error:
        if run is None and names and names[0].startswith(_PATHS):
            message = f"{names[0]} is no directory, and as a metric's name it needs a run: {error}"
            raise RunNotFound(message, error.hint) from None
        raise
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


def _run_and_names(run: str | None, words: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """The run, where the first word is a directory, and the metrics. A name such as `train/loss` stays a metric,
    unless a run's directory is there."""
    if words:
        path = Path(words[0]).expanduser()
        explicit = words[0].startswith(_PATHS) or words[0] in {".", ".."}
        if path.is_dir() and (explicit or RunDir(path).info_file.is_file()):
            return chosen(run, str(path.absolute())), list(dict.fromkeys(words[1:]))
    return run, list(dict.fromkeys(words))


async def _listed(
    run: str | None, server_key: str | None, from_step: int | None, to_step: int | None
) -> tuple[str, list[Listed]]:
    """The run's name, and of each metric how many values it has and the last one, between two steps."""
    async with opened(run, server_key) as session:
        picture = await session.picture()
        if picture.metrics_left_out:
            click.echo(f"{picture.metrics_left_out} more metrics are too many to list: name them", err=True)
        found = await session.history(sorted(picture.metrics), from_step=from_step, to_step=to_step, points=1)
        listed = []
        for name, rollups in sorted(found.items()):
            rows = list(_rows(rollups, ("incarnation", "step", "time", "last", "count")))
            incarnation, step, time, last, _ = max(rows, key=lambda row: row[:2])
            count = sum(int(row[-1]) for row in rows)
            listed.append((name, count, int(step), time, float(last), int(incarnation)))
        return session.model.name, listed


def _print_listed(found: tuple[str, list[Listed]], *, as_csv: bool, as_json: bool) -> None:
    run, listed = found
    if as_json:
        click.echo(dumps({"run": run, "metrics": [dict(zip(LISTED, row, strict=True)) for row in listed]}))
    elif as_csv:
        click.echo(",".join(LISTED))
        for name, *figures in listed:
            click.echo(",".join([_quoted(name), *(repr(figure) for figure in figures)]))
    elif listed:
        rows = [
            (name, str(count), str(step), number(value), str(incarnation))
            for name, count, step, _, value, incarnation in listed
        ]
        head = ("metric", "count", "step", "last", "incarnation")
        click.echo(table(head, rows, right=frozenset(range(1, len(head)))))
    if not as_json and not listed:
        click.echo(f"{run} has no metrics there", err=True)


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
