"""Nodes and their GPUs as one or a few lines, what is hot or throttled named. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainctl.client.figures import memory, plain
from trainctl.client.model import RunModel
from trainctl.tui import figures
from trainctl.tui.grid import Grid, Piece, width_of
from trainctl.tui.ranks_panel import LABEL_WIDTH
from trainctl.tui.theme import Symbols
from trainctl.tui.tones import Tone
from trainctl.wire.messages import GpuReading, NodeReading

_HOT_C = 83.0
_LATE_AFTER_S = 4.0


def gpu_trouble(gpu: GpuReading) -> str:
    """What is wrong with a GPU in few words, or nothing."""
    parts = [f"{gpu.temperature_c:.0f}°C"] if gpu.temperature_c is not None and gpu.temperature_c >= _HOT_C else []
    parts += [f"throttled: {plain(gpu.throttle)}"] if gpu.throttle else []
    return " ".join(parts)


def node_words(reading: NodeReading) -> str:
    """CPU, memory and load of a node."""
    parts = [f"cpu {reading.cpu:.0f}%"] if reading.cpu is not None else []
    parts += (
        [f"mem {memory(reading.memory_used_bytes, reading.memory_total_bytes)}"] if reading.memory_used_bytes else []
    )
    parts += [f"load {reading.load:.1f}"] if reading.load is not None else []
    return "  ".join(parts)


def gpu_note(reading: NodeReading) -> str:
    """Why a node shows no GPU."""
    if reading.gpus:
        return ""
    return "no GPU" if reading.gpu_state == "none" else f"GPU: {plain(reading.gpu_state)}"


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Pieces that stay together on one line."""

    pieces: tuple[Piece, ...]

    @property
    def width(self) -> int:
        return sum(width_of(text) for text, _ in self.pieces)


def _groups(model: RunModel, symbols: Symbols, now: float | None, *, compact: bool) -> list[list[_Chunk]]:
    """The chunks of every node."""
    return [
        _node_chunks(model, reading, symbols, now, compact=compact)
        for reading in sorted(model.nodes.values(), key=lambda node: node.node)
    ]


def _node_chunks(
    model: RunModel, reading: NodeReading, symbols: Symbols, now: float | None, *, compact: bool
) -> list[_Chunk]:
    name = (plain(reading.node), Tone.TEXT)
    age = model.node_age_s(reading.node, now) or 0.0
    if reading.state == "lost":
        words = f" {symbols.lost} no word from its agent; ranks may well go on"
        return [_Chunk(pieces=(name, (words, Tone.LOST)))]
    late = max(_LATE_AFTER_S, 3 * reading.interval_s)
    if model.link == "live" and age > late and not model.ended:
        return [_Chunk(pieces=(name, (f" {figures.duration(age)} old", Tone.STALE)))]
    if not reading.gpus:
        words = "  ".join(part for part in (node_words(reading), gpu_note(reading)) if part)
        return [_Chunk(pieces=(name, (f"  {words}", Tone.DIM)))]
    if compact:
        return [_Chunk(pieces=(name, (" ", Tone.TEXT), *_gpu_strip(reading.gpus, symbols)))]
    host = f"  cpu {reading.cpu:.0f}%" if reading.cpu is not None else ""
    head = _Chunk(pieces=(name, (host, Tone.DIM)))
    return [head, *(_Chunk(pieces=_gpu_pieces(gpu, symbols)) for gpu in reading.gpus)]


def _level(share: float, symbols: Symbols) -> str:
    top = len(symbols.levels) - 2  # the full block would melt into the line above
    return symbols.levels[max(0, min(top, round(share * top)))]


def _gpu_pieces(gpu: GpuReading, symbols: Symbols) -> tuple[Piece, ...]:
    trouble = gpu_trouble(gpu)
    if gpu.utilization is None:
        why = next(iter(gpu.missing.values()), "")
        return ((f"{gpu.index} ", Tone.DIM), (f"n/a {plain(why)}".strip(), Tone.DIM))
    tone = Tone.WARNING if trouble else Tone.METER_2
    pieces: list[Piece] = [
        (f"{gpu.index} ", Tone.DIM),
        (_level(gpu.utilization / 100, symbols) * 2, tone),
        (f" {gpu.utilization:3.0f}%", Tone.TEXT),
    ]
    if gpu.memory_used_bytes is not None:
        pieces.append((f" {memory(gpu.memory_used_bytes, gpu.memory_total_bytes)}", Tone.DIM))
    if trouble:
        pieces.append((f" {symbols.warning} {trouble}", Tone.WARNING))
    return tuple(pieces)


def _gpu_strip(gpus: Sequence[GpuReading], symbols: Symbols) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for gpu in gpus:
        glyph = symbols.info if gpu.utilization is None else _level(gpu.utilization / 100, symbols)
        pieces.append((glyph, Tone.WARNING if gpu_trouble(gpu) else Tone.METER_2))
    busy = [gpu.utilization for gpu in gpus if gpu.utilization is not None]
    pieces.append((f" {sum(busy) / len(busy):.0f}%" if busy else " n/a", Tone.TEXT))
    pieces += [
        (f" {symbols.warning} {gpu.index}: {trouble}", Tone.WARNING) for gpu in gpus if (trouble := gpu_trouble(gpu))
    ]
    return tuple(pieces)


def _lay_out(groups: Sequence[Sequence[_Chunk]], width: int) -> list[list[tuple[int, _Chunk]]]:
    """Chunks in lines, each with its column. A node that does not fit behind the last one begins a line."""
    lines: list[list[tuple[int, _Chunk]]] = [[]]
    x = LABEL_WIDTH
    for group in groups:
        room = sum(chunk.width + 3 for chunk in group) - 3
        if lines[-1] and x + room > width - 1:
            lines.append([])
            x = LABEL_WIDTH
        for chunk in group:
            if lines[-1] and x + chunk.width > width - 1:
                lines.append([])
                x = LABEL_WIDTH
            lines[-1].append((x, chunk))
            x += chunk.width + 3
    return lines


def node_rows(model: RunModel, symbols: Symbols, width: int, most: int, now: float | None = None) -> int:
    """Lines that nodes and GPUs would take."""
    lines = _lay_out(_groups(model, symbols, now, compact=False), width)
    if len(lines) > most:
        lines = _lay_out(_groups(model, symbols, now, compact=True), width)
    return min(most, len(lines))


def draw_nodes(model: RunModel, symbols: Symbols, width: int, rows: int, now: float | None = None) -> Grid:
    """All GPUs with their numbers while they fit, else a block for each; what does not fit then is counted."""
    grid = Grid(width, rows)
    has_gpus = any(reading.gpus for reading in model.nodes.values())
    grid.put(1, 0, "gpus" if has_gpus else "nodes", Tone.TITLE)
    if not model.nodes:
        grid.put(LABEL_WIDTH, 0, "no agent has reported yet", Tone.DIM)
        return grid
    lines = _lay_out(_groups(model, symbols, now, compact=False), width)
    if len(lines) > rows:
        lines = _lay_out(_groups(model, symbols, now, compact=True), width)
    hidden = sum(len(line) for line in lines[rows:])
    end = width - len(" and 9,999 more: 3 ") if hidden else width
    for y, line in enumerate(lines[:rows]):
        for x, chunk in line:
            if y == rows - 1 and x > LABEL_WIDTH and x + chunk.width > end:
                hidden += 1  # it would end under the count
                continue
            grid.put_pieces(x, y, chunk.pieces, until=end if y == rows - 1 else None)
    if hidden:
        grid.put_right(rows - 1, f" and {hidden:,} more: 3 ", Tone.DIM)
    return grid
