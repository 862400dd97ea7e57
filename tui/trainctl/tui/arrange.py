"""How the run's screen is divided, for any size of terminal. Pure."""

from dataclasses import dataclass

SMALL_WIDTH, SMALL_HEIGHT = 60, 15
_TWO_COLUMNS, _THREE_COLUMNS = 96, 165
_CHART_HEIGHT = 9
_MORE_CHARTS_HEIGHT = 11
_MOST_CHARTS = 9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows of every part, and the grid of charts. `tiny`: there is no room for the usual screen."""

    tiny: bool
    header: int
    vitals: int
    gap: int
    chart_columns: int
    chart_rows: int
    ranks: int
    nodes: int
    events: int
    footer: int = 1

    @property
    def charts(self) -> int:
        return self.chart_columns * self.chart_rows


def most_node_rows(height: int) -> int:
    """Lines that nodes and GPUs may take."""
    return max(1, (height - 24) // 4) if height >= 28 else 1


def arrange(
    width: int, height: int, *, plots: int, vital_rows: int, rank_rows: int, node_rows: int, header_rows: int = 1
) -> Plan:
    """Divide `width` x `height`. Wanted rows are given as much as leaves the charts room; charts fill what is left."""
    if width < SMALL_WIDTH or height < SMALL_HEIGHT:
        vitals = 2 if height >= 9 else 1
        rest = height - 2 - vitals - 2
        return Plan(
            tiny=True,
            header=2,
            vitals=vitals,
            gap=0,
            chart_columns=1,
            chart_rows=1 if rest >= 6 else 0,
            ranks=0,
            nodes=0,
            events=2 if rest < 6 and rest >= 2 else 1 if rest >= 1 else 0,
        )
    roomy = height >= 28
    vitals = min(vital_rows, 2)
    ranks = min(rank_rows, 2 if roomy else 1)
    nodes = min(node_rows, most_node_rows(height))
    events = 2 if height < 24 else min(6, 3 + max(0, height - 32) // 8)
    gap = 1 if height >= 20 else 0
    fixed = header_rows + vitals + gap + (gap if roomy else 0) + ranks + nodes + events + 1
    space = max(4, height - fixed)
    columns = 1 if width < _TWO_COLUMNS else 2
    if width >= _THREE_COLUMNS and plots > 4:
        columns = 3
    rows = max(1, space // _CHART_HEIGHT)
    if rows > 2:
        rows = max(2, space // _MORE_CHARTS_HEIGHT)
    rows = max(1, min(rows, -(-plots // columns), _MOST_CHARTS // columns))
    return Plan(
        tiny=False,
        header=header_rows,
        vitals=vitals,
        gap=gap,
        chart_columns=columns,
        chart_rows=rows,
        ranks=ranks,
        nodes=nodes,
        events=events,
    )
