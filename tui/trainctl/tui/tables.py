"""What the screens behind the run's screen list: ranks, nodes, checkpoints, events, tunables. Pure."""

from collections.abc import Sequence

from trainctl.client.figures import memory, plain, scalar
from trainctl.client.lines import event_text, kind_of
from trainctl.client.model import RunModel
from trainctl.tui import figures
from trainctl.tui.event_lines import glyph_of, matches
from trainctl.tui.grid import Piece
from trainctl.tui.nodes_panel import gpu_note, gpu_trouble
from trainctl.tui.plots import loss_metric
from trainctl.tui.ranks_panel import worst_rank
from trainctl.tui.table import Column, Row, Table
from trainctl.tui.theme import Symbols
from trainctl.tui.tones import Tone
from trainctl.wire.messages import CheckpointInfo, Tunable
from trainctl.wire.save_order import order_of


def _right(title: str, width: int = 0, *, worth: int = 1) -> Column:
    return Column(title=title, width=width, align="right", worth=worth)


def ranks_table(model: RunModel, symbols: Symbols, now: float | None = None) -> Table:
    """Every rank, the one to look at marked."""
    verdict = worst_rank(model, now)
    phases = sorted({phase for rank in model.ranks.values() for phase in rank.phases_s})[:5]
    columns = (
        _right("rank"),
        Column(title="node", worth=2),
        _right("pid", worth=0),
        Column(title="state", worth=3),
        _right("step", worth=2),
        _right("step time", worth=3),
        _right("data wait", worth=2),
        *(_right(plain(phase), worth=0) for phase in phases),
        _right("memory"),
        _right("age", worth=2),
        Column(title="", width=-1),
    )
    rows = []
    for rank in sorted(model.ranks.values(), key=lambda rank: rank.rank):
        named = verdict is not None and verdict.rank == rank.rank
        tone = verdict.tone if named and verdict else Tone.TEXT
        age = model.rank_age_s(rank.rank, now) or 0.0
        shares: list[Piece] = [(_share(rank.phases_s.get(phase), rank.step_time_s), Tone.DIM) for phase in phases]
        rows.append(
            Row(
                key=str(rank.rank),
                cells=(
                    (str(rank.rank), Tone.STRONG),
                    (plain(rank.node), Tone.TEXT),
                    (str(rank.pid), Tone.DIM),
                    (plain(rank.state), tone),
                    (figures.count(rank.step), Tone.TEXT),
                    (figures.short_time(rank.step_time_s), tone),
                    (_share(rank.data_wait_s, rank.step_time_s), Tone.DIM),
                    *shares,
                    (memory(rank.memory_bytes), Tone.DIM),
                    ("" if age < 3 else figures.duration(age), Tone.STALE),
                    (f"{symbols.pointer} {verdict.text}" if named and verdict else "", tone),
                ),
            )
        )
    return Table(columns=columns, rows=rows, empty="no rank has reported yet", title="ranks")


def _share(part_s: float | None, whole_s: float | None) -> str:
    return figures.MISSING if part_s is None or not whole_s else figures.percent(part_s / whole_s)


def nodes_table(model: RunModel, symbols: Symbols, now: float | None = None) -> Table:
    """Every node with its GPUs below it."""
    columns = (
        Column(title="node"),
        Column(title="gpu", worth=3),
        _right("busy", worth=3),
        _right("memory", worth=2),
        _right("°C", worth=2),
        _right("power"),
        _right("MHz", worth=0),
        _right("cpu"),
        _right("load", worth=0),
        _right("age", worth=2),
        Column(title="", width=-1),
    )
    rows = []
    for reading in sorted(model.nodes.values(), key=lambda node: node.node):
        age = model.node_age_s(reading.node, now) or 0.0
        lost = reading.state == "lost"
        rows.append(
            Row(
                key=reading.node,
                cells=(
                    (plain(reading.node), Tone.STRUCK if lost else Tone.STRONG),
                    ("", Tone.DIM),
                    ("", Tone.DIM),
                    (memory(reading.memory_used_bytes, reading.memory_total_bytes), Tone.DIM),
                    ("", Tone.DIM),
                    ("", Tone.DIM),
                    ("", Tone.DIM),
                    (f"{reading.cpu:.0f}%" if reading.cpu is not None else figures.MISSING, Tone.TEXT),
                    (f"{reading.load:.1f}" if reading.load is not None else figures.MISSING, Tone.TEXT),
                    ("" if age < 3 else figures.duration(age), Tone.STALE),
                    ("no word from its agent" if lost else gpu_note(reading), Tone.LOST if lost else Tone.DIM),
                ),
            )
        )
        for gpu in reading.gpus:
            trouble = gpu_trouble(gpu)
            why = "; ".join(f"{what}: {plain(reason)}" for what, reason in gpu.missing.items())
            rows.append(
                Row(
                    key=f"{reading.node}/{gpu.index}",
                    cells=(
                        ("", Tone.DIM),
                        (f"{gpu.index} {plain(gpu.name)}", Tone.TEXT),
                        (_unit(gpu.utilization, "%"), Tone.CURVE_4),
                        (memory(gpu.memory_used_bytes, gpu.memory_total_bytes), Tone.TEXT),
                        (_unit(gpu.temperature_c, ""), Tone.WARNING if "°C" in trouble else Tone.TEXT),
                        (_power(gpu.power_w, gpu.power_limit_w), Tone.TEXT),
                        (_unit(gpu.sm_clock_mhz, ""), Tone.DIM),
                        ("", Tone.DIM),
                        ("", Tone.DIM),
                        ("", Tone.DIM),
                        (f"{symbols.warning} {trouble}", Tone.WARNING) if trouble else (why, Tone.DIM),
                    ),
                )
            )
    return Table(columns=columns, rows=rows, empty="no agent has reported yet", title="nodes and GPUs")


def _unit(value: float | None, unit: str) -> str:
    return figures.MISSING if value is None else f"{value:.0f}{unit}"


def _power(power_w: float | None, limit_w: float | None) -> str:
    if power_w is None:
        return figures.MISSING
    return f"{power_w:.0f}/{limit_w:.0f} W" if limit_w else f"{power_w:.0f} W"


def checkpoints_table(
    model: RunModel, symbols: Symbols, checkpoints: Sequence[CheckpointInfo], now: float | None = None
) -> Table:
    """Checkpoints, the newest first: what a rollback could go back to."""
    columns = (
        _right("step"),
        _right("ago", worth=3),
        _right("loss", worth=2),
        _right("size"),
        Column(title="verified", worth=3),
        Column(title="pinned"),
        Column(title="where", worth=0),
        Column(title="id", worth=0),
        Column(title="note", width=-1),
    )
    newest_first = sorted(checkpoints, key=order_of, reverse=True)
    rows = [
        Row(
            key=info.id,
            cells=(
                (figures.count(info.step), Tone.STRONG),
                (figures.duration(model.age_of(info.time, now)), Tone.TEXT),
                (_loss_of(info), Tone.TEXT),
                (figures.file_size(info.bytes) if info.bytes else figures.MISSING, Tone.TEXT),
                _verified(info, symbols),
                (symbols.pinned if info.pinned else "", Tone.NOTE),
                (info.where, Tone.DIM),
                (plain(info.id), Tone.DIM),
                (plain(info.note or ""), Tone.TEXT),
            ),
        )
        for info in newest_first
    ]
    return Table(columns=columns, rows=rows, empty="no checkpoint yet: C saves one", title="checkpoints")


def _loss_of(info: CheckpointInfo) -> str:
    name = loss_metric(frozenset(info.metrics)) or next(iter(info.metrics), None)
    return figures.number(info.metrics[name]) if name is not None else figures.MISSING


def _verified(info: CheckpointInfo, symbols: Symbols) -> Piece:
    match info.verified:
        case True:
            return f"{symbols.good} good", Tone.GOOD
        case False:
            return f"{symbols.lost} damaged", Tone.ERROR
        case None:
            return "not checked", Tone.DIM


def events_table(model: RunModel, symbols: Symbols, words: str = "") -> Table:
    """Events that have all the words, oldest first."""
    columns = (
        Column(title="time", width=8),
        _right("step", 9),
        Column(title="", width=1, worth=2),
        Column(title="kind", width=10, worth=0),
        Column(title="what", width=-1),
    )
    rows = []
    for index, event in enumerate(model.events):
        if not matches(event, words):
            continue
        glyph, tone = glyph_of(event, symbols)
        rows.append(
            Row(
                key=f"{event.time}/{index}",
                cells=(
                    (figures.clock(event.time), Tone.DIM),
                    (figures.count(event.step), Tone.DIM),
                    (glyph, tone),
                    (kind_of(event), Tone.DIM),
                    (event_text(event), tone if tone in {Tone.WARNING, Tone.ERROR} else Tone.TEXT),
                ),
            )
        )
    empty = f"no event matches “{words}”" if words else "no events yet"
    return Table(columns=columns, rows=rows, empty=empty, title="events")


def tunables_table(tunables: Sequence[Tunable]) -> Table:
    """What the script lets an operator change."""
    columns = (
        Column(title="name"),
        _right("now", worth=3),
        Column(title="kind"),
        Column(title="range", worth=2),
        Column(title="unit", width=-1),
    )
    rows = [
        Row(
            key=tunable.name,
            cells=(
                (plain(tunable.name), Tone.STRONG),
                (scalar(tunable.value), Tone.TEXT),
                (tunable.kind, Tone.DIM),
                (bounds(tunable), Tone.DIM),
                (plain(tunable.unit or ""), Tone.DIM),
            ),
        )
        for tunable in tunables
    ]
    return Table(columns=columns, rows=rows, empty="the script registered none: run.tunable(name, value, min=, max=)")


def bounds(tunable: Tunable) -> str:
    """`0.1 … 100`, `≥ 1`, or nothing."""
    low, high = tunable.minimum, tunable.maximum
    if low is not None and high is not None:
        return f"{low:g} … {high:g}"
    return f"≥ {low:g}" if low is not None else f"≤ {high:g}" if high is not None else ""
