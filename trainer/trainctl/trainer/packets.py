"""What is too large for one packet of the link, in two. Pure."""

from typing import TypeAlias

from trainctl.wire.messages import Column, Event, Ranks, Rows

Record: TypeAlias = Rows | Ranks | Event


def halves(body: Record) -> tuple[Record, Record] | None:
    """A record as two that say the same: of half the ranks, of half the rows, or of half a row's columns each. None
    where it is one thing: an event, the figures of one rank, one value."""
    match body:
        case Ranks(incarnation=incarnation, ranks=ranks) if len(ranks) > 1:
            middle = len(ranks) // 2
            first, second = ranks[:middle], ranks[middle:]
            return Ranks(incarnation=incarnation, ranks=first), Ranks(incarnation=incarnation, ranks=second)
        case Rows(steps=steps) if len(steps) > 1:
            middle = len(steps) // 2
            return _some_rows(body, 0, middle), _some_rows(body, middle, len(steps))
        case Rows(columns=columns) if len(columns) > 1:
            middle = len(columns) // 2
            return _some_columns(body, columns[:middle]), _some_columns(body, columns[middle:])
        case _:
            return None


def _some_rows(rows: Rows, first: int, end: int) -> Rows:
    columns = []
    for column in rows.columns:
        size = int(column.dtype[1])
        columns.append(Column(name=column.name, dtype=column.dtype, data=column.data[size * first : size * end]))
    return Rows(
        attempt=rows.attempt,
        incarnation=rows.incarnation,
        steps=rows.steps[first:end],
        times=rows.times[first:end],
        columns=columns,
    )


def _some_columns(rows: Rows, columns: list[Column]) -> Rows:
    return Rows(attempt=rows.attempt, incarnation=rows.incarnation, steps=rows.steps, times=rows.times, columns=columns)
