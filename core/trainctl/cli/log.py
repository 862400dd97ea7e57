"""`trainctl log`: what happened, a line an event, and with -f what happens."""

import asyncio
import contextlib
import time
from collections.abc import Mapping

import click
import msgspec

from trainctl.cli.acting import opened
from trainctl.cli.options import DURATION, chosen, run_argument, run_options
from trainctl.client.jsonable import dumps
from trainctl.client.lines import (
    GLYPHS,
    KINDS,
    data_of_a_rank,
    event_json,
    event_text,
    kind_of,
    metrics_json,
    metrics_line,
    row_values,
    severity_of,
)
from trainctl.client.model import RunModel
from trainctl.client.session import Session
from trainctl.client.watching import watch
from trainctl.wire.messages import Envelope, Event, NodeReading, Ranks, Rows, Snapshot

_LINES_BEFORE_FOLLOWING = 10
WELL_ENDED = frozenset({"finished", "stopped"})


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which lines are asked for. `every`: of metrics only each N-th step, and what was logged between steps."""

    follow: bool = False
    lines: int | None = None
    since_s: float | None = None
    from_step: int | None = None
    kinds: frozenset[str] = frozenset()
    rank: int | None = None
    every: int = 1

    def event(self, event: Event) -> bool:
        if self.kinds and kind_of(event) not in self.kinds:
            return False
        if self.rank is not None and getattr(event, "rank", None) != self.rank:
            return False
        return self.from_step is None or event.step >= self.from_step

    def metrics(self, step: int, values: dict[str, float], total_steps: int | None) -> bool:
        if self.rank is not None or (self.kinds and "metrics" not in self.kinds):
            return False
        if self.from_step is not None and step < self.from_step:
            return False
        if step % self.every == 0 or step == total_steps:
            return True
        return "step_time_s" not in values and not all(map(data_of_a_rank, values))


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The metrics of one step."""

    step: int
    time: float
    incarnation: int
    values: dict[str, float]


@click.command()
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends: 0 finished or stopped, 1 failed or lost.")
@click.option("-n", "--lines", type=click.IntRange(0), metavar="N", help="Only the last N lines (with -f: 10).")
@click.option("--since", "since_s", type=DURATION, metavar="DURATION", help="Only what is younger, for example 10m.")
@click.option("--from-step", type=click.IntRange(0), metavar="S")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, help="Only this kind; may be repeated.")
@click.option("--rank", type=click.IntRange(0), metavar="R", help="Only what one rank said.")
@click.option("--log-every", "every", type=click.IntRange(1), default=1, metavar="N", help="Metrics each N steps.")
@run_options
def log(
    run: str | None,
    run_argument: str | None,
    server_key: str | None,
    kinds: tuple[str, ...],
    *,
    as_json: bool,
    **wanted: float | None,
) -> int:
    """Print a run's log, a line an event."""
    asked = msgspec.convert(wanted | {"kinds": frozenset(kinds)}, Wanted)
    return print_log(chosen(run, run_argument), server_key, asked, as_json=as_json)


def print_log(run: str | None, server_key: str | None, wanted: Wanted, *, as_json: bool) -> int:
    """Print and return the exit code; Ctrl-C ends it with 0, because the run goes on."""

    async def printing() -> int:
        async with opened(run, server_key) as session:
            printer = LogPrinter(session.model, wanted, as_json=as_json)
            if wanted.follow:
                return await follow_log(session, printer)
            await printer.backlog(session)
            if not printer.printed and wanted.lines != 0:
                click.echo(f"{session.model.name}: nothing matched", err=True)
            return 0

    try:
        return asyncio.run(printing())
    except KeyboardInterrupt:
        return 0


async def follow_log(session: Session, printer: "LogPrinter") -> int:
    """Print what was and what comes, until the run ends. Raises `ClientError` when nobody can say how it ended."""
    started = False
    async with contextlib.aclosing(watch(session)) as items:
        async for item in items:
            if isinstance(item, Snapshot):
                await (printer.catch_up(session) if started else printer.backlog(session))
                started = True
            elif isinstance(item, Envelope):
                printer.take(item)
    state = session.model.state
    return 0 if state is not None and state.state in WELL_ENDED else 1


class LogPrinter:
    """Prints lines once: what the backlog had is passed over when it arrives again."""

    def __init__(self, model: RunModel, wanted: Wanted, *, as_json: bool) -> None:
        self._model = model
        self._wanted = wanted
        self._as_json = as_json
        self._seen_events: set[tuple[str, float, int]] = set()
        self._seen_rows_until = 0.0
        self._newest_event = 0.0
        self._newest_row = (1, 0, 0.0)  # incarnation, step and time
        self.printed = 0

    async def backlog(self, session: Session) -> None:
        """Print what happened so far, as far as it is wanted."""
        wanted = self._wanted
        count = wanted.lines
        if count is None and wanted.follow and wanted.from_step is None and wanted.since_s is None:
            count = _LINES_BEFORE_FOLLOWING
        since = None if wanted.since_s is None else self._model.source_time() - wanted.since_s
        events = await self._events(session, since=since, count=count)
        # Abandoned branches happened too.
        incarnations = range(1, (self._model.state.incarnation if self._model.state else 0) + 1)
        rows = await self._rows(session, dict.fromkeys(incarnations, self._first_step(count)))
        self._saw(events, rows)
        total = self._model.total_steps
        lines: list[tuple[float, Event | Row]] = [(event.time, event) for event in events if wanted.event(event)]
        lines += [
            (row.time, row)
            for row in rows
            if (since is None or row.time >= since) and wanted.metrics(row.step, row.values, total)
        ]
        lines.sort(key=lambda line: line[0])
        for _, line in lines[len(lines) - min(count, len(lines)) :] if count is not None else lines:
            self._print(line, newest=False)

    async def catch_up(self, session: Session) -> None:
        """Print what happened meanwhile and did not come message by message, because the hub had packed it already."""
        wanted, total, state = self._wanted, self._model.total_steps, self._model.state
        until, (incarnation, step, row_until) = self._newest_event, self._newest_row
        found = await self._events(session, since=until)
        events = [event for event in found if event.time > until]
        later = range(incarnation + 1, (state.incarnation if state else incarnation) + 1)
        starts = {incarnation: step} | dict.fromkeys(later, wanted.from_step)
        rows = [row for row in await self._rows(session, starts) if row.time > row_until]
        self._saw(events, rows)
        lines: list[tuple[float, Event | Row]] = [(event.time, event) for event in events if wanted.event(event)]
        lines += [(row.time, row) for row in rows if wanted.metrics(row.step, row.values, total)]
        for _, line in sorted(lines, key=lambda line: line[0]):
            self._print(line, newest=False)

    async def _events(self, session: Session, *, since: float | None, count: int | None = None) -> list[Event]:
        """The events since a time, oldest first; with `count`, no more than are needed for as many lines."""
        wanted, parts, lines = self._wanted, list[list[Event]](), 0
        if wanted.kinds == {"metrics"}:
            return []
        pages = session.all_events(since=since, from_step=wanted.from_step, kinds=sorted(wanted.kinds - {"metrics"}))
        async with contextlib.aclosing(pages):
            async for page in pages:
                parts.append(page.events)
                lines += sum(map(wanted.event, page.events))
                if page.missing:
                    click.echo(f"{page.missing} older events are missing: the journal does not have them", err=True)
                if count is not None and lines >= count:
                    break
        return [event for part in reversed(parts) for event in part]

    def _saw(self, events: list[Event], rows: list[Row]) -> None:
        """Note what is not to be printed again, should it come as a message."""
        self._seen_events = {_mark(event) for event in events}
        self._newest_event = max([self._newest_event, *(event.time for event in events)])
        self._newest_row = max([self._newest_row, *((row.incarnation, row.step, row.time) for row in rows)])
        self._seen_rows_until = max([self._seen_rows_until, *(row.time for row in rows)])

    def _first_step(self, count: int | None) -> int | None:
        wanted, state = self._wanted, self._model.state
        if count is None or state is None:
            return wanted.from_step
        return max(wanted.from_step or 0, state.step - count * wanted.every)

    async def _rows(self, session: Session, starts: Mapping[int, int | None]) -> list[Row]:
        """What was logged in some incarnations, each from a step on."""
        wanted = self._wanted
        if wanted.rank is not None or (wanted.kinds and "metrics" not in wanted.kinds):
            return []
        rows: dict[tuple[int, int], Row] = {}
        for incarnation, from_step in starts.items():
            found = await session.history(sorted(self._model.metrics), from_step=from_step, incarnation=incarnation)
            for name, points in found.items():
                steps, times, values = (points.columns[column].tolist() for column in ("step", "time", "value"))
                for step, when, value in zip(steps, times, values, strict=True):
                    row = rows.setdefault(
                        (incarnation, step), Row(step=step, time=when, incarnation=incarnation, values={})
                    )
                    row.values[name] = value
        return list(rows.values())

    def take(self, envelope: Envelope) -> None:
        """Print what an envelope brings, unless the backlog had it."""
        body, wanted = envelope.body, self._wanted
        if isinstance(body, Ranks | NodeReading):
            return
        if isinstance(body, Rows):
            for step, when, values in row_values(body):
                if when > self._seen_rows_until and wanted.metrics(step, values, self._model.total_steps):
                    row = Row(step=step, time=when, incarnation=body.incarnation, values=values)
                    self._print(row, newest=step == body.steps[-1])
                self._newest_row = max(self._newest_row, (body.incarnation, step, when))
            return
        if _mark(body) not in self._seen_events and wanted.event(body):
            self._print(body, newest=True)
        self._newest_event = max(self._newest_event, body.time)

    def _print(self, line: "Event | Row", *, newest: bool) -> None:
        self.printed += 1
        if isinstance(line, Row):
            if self._as_json:
                click.echo(dumps(metrics_json(line.step, line.time, line.incarnation, line.values)))
                return
            if all(map(data_of_a_rank, line.values)):
                self.printed -= 1
                return
            model = self._model if newest else None  # GPUs and ETA are of now, so older lines go without
            click.echo(metrics_line(line.step, line.values, total_steps=self._model.total_steps, model=model))
        elif self._as_json:
            click.echo(dumps(event_json(line)))
        else:
            clock = time.strftime("%H:%M:%S", time.localtime(line.time))
            click.echo(f"{clock}  {GLYPHS[severity_of(line)]} {event_text(line)}")


def _mark(event: Event) -> tuple[str, float, int]:
    return kind_of(event), event.time, event.step
