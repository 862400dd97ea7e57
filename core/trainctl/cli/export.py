"""`trainctl export`: all values of a run's metrics, for other tools."""

import asyncio
from pathlib import Path

import click

from trainctl.cli.acting import opened
from trainctl.cli.options import run_options
from trainctl.client.errors import BadRequest
from trainctl.client.export import walk
from trainctl.client.export_formats import FORMATS, writer
from trainctl.client.export_target import appearing, check_target, write_summary
from trainctl.client.jsonable import dumps
from trainctl.client.session import Session


@click.command()
@click.option("--to", "form", type=click.Choice(FORMATS), required=True, help="The form to write.")
@click.option("--force", is_flag=True, help="Replace an earlier export in DIR.")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("metrics", nargs=-1, metavar="[METRIC…]")
@run_options
def export(
    run: str | None,
    server_key: str | None,
    form: str,
    directory: Path,
    metrics: tuple[str, ...],
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Write every value of every incarnation to DIR, each with its incarnation and whether it is on the live branch.

    METRIC… are the metrics to write, all by default. DIR appears when it is complete.
    """
    target = directory.expanduser().absolute()
    check_target(target, force=force)
    summary = asyncio.run(_export(run, server_key, form, target, metrics, force=force))
    if as_json:
        click.echo(dumps(summary))
    else:
        click.echo(
            f"{summary['run']}: {summary['values']} values of {summary['metrics']} metrics are in {target}, "
            f"{summary['live_values']} of them on the live branch"
        )


async def _export(
    run: str | None, server_key: str | None, form: str, target: Path, metrics: tuple[str, ...], *, force: bool
) -> dict[str, object]:
    async with opened(run, server_key) as session:
        names = _names(session, metrics)
        values, live, incarnations = 0, 0, set()
        with appearing(target, force=force) as directory:
            with writer(form, directory) as into:
                async for part in walk(session, names):
                    into.write(part)
                    values += len(part)
                    live += int(part.live.sum()) * len(part.values)
                    incarnations.add(part.incarnation)
            files = sorted(path for path in directory.rglob("*") if path.is_file())
            info = session.model.info
            summary: dict[str, object] = {
                "run": session.model.name,
                "id": info.id if info else None,
                "to": form,
                "dir": str(target),
                "files": [str(path.relative_to(directory)) for path in files],
                "bytes": sum(path.stat().st_size for path in files),
                "metrics": len(names),
                "values": values,
                "live_values": live,
                "incarnations": sorted(incarnations),
                "config": info.config if info else {},
            }
            write_summary(directory, summary)
        return summary


def _names(session: Session, metrics: tuple[str, ...]) -> list[str]:
    known = list(session.model.metrics)
    for name in metrics:
        if name not in known:
            listed = ", ".join(sorted(known)[:20]) or "none yet"
            raise BadRequest(f"{session.model.name} has no metric {name!r}; nothing was written", f"it has: {listed}")
    return list(dict.fromkeys(metrics)) or known
