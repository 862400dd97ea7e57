"""The ranks as one or a few lines: how long each one's step takes, and which one the others wait for. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from trainctl.client.figures import plain
from trainctl.client.model import RunModel
from trainctl.tui import figures
from trainctl.tui.grid import Grid, Piece
from trainctl.tui.theme import Symbols
from trainctl.tui.tones import Tone
from trainctl.wire.messages import RankFigures

LABEL_WIDTH = 8
_SLOW = 1.15
_WAITS_FOR_DATA = 0.2
_DEAD = frozenset({"lost", "dead", "failed", "gone"})
_QUIET_AFTER_S = 5.0
_AROUND = 10  # blank, time and gap beside a rank's number and bar
_LONGEST_BAR, _SHORTEST_BAR = 10, 3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The rank that needs a look, why, and how bad it is."""

    rank: int
    text: str
    tone: Tone


def worst_rank(model: RunModel, now: float | None = None) -> Verdict | None:
    """Dead before silent before slow before waiting for data; None when all is even."""
    ranks = sorted(model.ranks.values(), key=lambda rank: rank.rank)
    for rank in ranks:
        if rank.state in _DEAD:
            return Verdict(rank=rank.rank, text=f"{rank.state} on {plain(rank.node)}", tone=Tone.LOST)
    if model.link == "live" and not model.ended:
        for rank in ranks:
            if rank.state == "left":
                text = f"left its loop on {plain(rank.node)}"
                return Verdict(rank=rank.rank, text=text, tone=Tone.WARNING)
            if (age := model.rank_age_s(rank.rank, now) or 0.0) > _QUIET_AFTER_S and len(ranks) > 1:
                text = f"silent for {figures.duration(age)} on {plain(rank.node)}"
                return Verdict(rank=rank.rank, text=text, tone=Tone.STALLED)
    timed = [rank for rank in ranks if rank.step_time_s]
    if len(timed) >= 2:
        slowest = max(timed, key=lambda rank: rank.step_time_s or 0.0)
        if (slowest.step_time_s or 0.0) > _SLOW * median(rank.step_time_s or 0.0 for rank in timed):
            why = _why(slowest)
            return Verdict(
                rank=slowest.rank, text=f"slow{f': {why}' if why else ''}  {plain(slowest.node)}", tone=Tone.WARNING
            )
    waiting = [rank for rank in timed if _data_share(rank) > _WAITS_FOR_DATA]
    if waiting:
        hungriest = max(waiting, key=_data_share)
        return Verdict(
            rank=hungriest.rank,
            text=f"data wait {figures.percent(_data_share(hungriest))}  {plain(hungriest.node)}",
            tone=Tone.WARNING,
        )
    return None


def _data_share(rank: RankFigures) -> float:
    return (rank.data_wait_s or 0.0) / rank.step_time_s if rank.step_time_s else 0.0


def _why(rank: RankFigures) -> str:
    if _data_share(rank) > 0.1:
        return f"data wait {figures.percent(_data_share(rank))}"
    if not rank.phases_s or not rank.step_time_s:
        return ""
    phase, seconds = max(rank.phases_s.items(), key=lambda item: item[1])
    return f"{plain(phase)} {figures.percent(seconds / rank.step_time_s)}"


def rank_rows(model: RunModel, width: int, most: int) -> int:
    """Lines that the ranks would take."""
    if not model.ranks:
        return 1
    needed = -(-len(model.ranks) // _fitting(list(model.ranks.values()), width, most).per_row)
    return min(most, needed)


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """How ranks are laid out: cells for a bar, for all of a rank, and ranks in a row."""

    digits: int
    bar: int
    per_row: int

    @property
    def each(self) -> int:
        return self.digits + self.bar + _AROUND


def _fitting(ranks: Sequence[RankFigures], width: int, rows: int) -> _Fit:
    """The longest bars with which all ranks fit into the rows, or the shortest there are."""
    digits = len(str(max(rank.rank for rank in ranks)))
    per_row = -(-len(ranks) // max(1, rows)) if len(ranks) > 8 else len(ranks)
    bar = min(_LONGEST_BAR, max(_SHORTEST_BAR, (width - LABEL_WIDTH) // per_row - digits - _AROUND))
    return _Fit(digits=digits, bar=bar, per_row=max(1, (width - LABEL_WIDTH) // (digits + bar + _AROUND)))


def draw_ranks(model: RunModel, symbols: Symbols, width: int, rows: int, now: float | None = None) -> Grid:
    """A bar and a time for each rank while they fit, else one block for each and the median."""
    grid = Grid(width, rows)
    grid.put(1, 0, "ranks", Tone.TITLE)
    ranks = sorted(model.ranks.values(), key=lambda rank: rank.rank)
    if not ranks or rows < 1:
        grid.put(LABEL_WIDTH, 0, "no figures yet", Tone.DIM)
        return grid
    verdict = worst_rank(model, now)
    slowest = max((rank.step_time_s or 0.0 for rank in ranks), default=0.0)
    fit = _fitting(ranks, width, rows)
    needed = -(-len(ranks) // fit.per_row)
    tail = len(verdict.text) + 12 if verdict else 0
    in_last = len(ranks) - (needed - 1) * fit.per_row
    fits = needed < rows or (needed == rows and in_last * fit.each + tail <= width - LABEL_WIDTH)
    if fits:
        _draw_bars(grid, symbols, ranks, slowest, fit, verdict)
    else:
        _draw_strip(grid, symbols, ranks, slowest, verdict)
    return grid


def _draw_bars(
    grid: Grid,
    symbols: Symbols,
    ranks: Sequence[RankFigures],
    slowest: float,
    fit: _Fit,
    verdict: Verdict | None,
) -> None:
    x = LABEL_WIDTH
    for index, rank in enumerate(ranks):
        y, x = index // fit.per_row, LABEL_WIDTH + index % fit.per_row * fit.each
        named = verdict is not None and verdict.rank == rank.rank
        tone = verdict.tone if named and verdict else Tone.TEXT
        share = (rank.step_time_s or 0.0) / slowest if slowest else 0.0
        bar = symbols.levels[-2] * max(1, round(share * fit.bar)) if rank.step_time_s else symbols.info
        x = grid.put(x, y, f"{rank.rank:>{fit.digits}} ", Tone.DIM)
        x = grid.put(x, y, bar, tone if named else Tone.METER if rank.state not in _DEAD else Tone.LOST)
        x = grid.put(x + 1, y, figures.short_time(rank.step_time_s), tone)
    if verdict is not None:
        y = (len(ranks) - 1) // fit.per_row
        end = LABEL_WIDTH + ((len(ranks) - 1) % fit.per_row + 1) * fit.each
        if end + len(verdict.text) + 2 > grid.width and y + 1 < grid.height:
            y, end = y + 1, LABEL_WIDTH
        name = "" if verdict.rank == ranks[-1].rank and end > LABEL_WIDTH else f"rank {verdict.rank} "
        story = f"{symbols.pointer} {name}{verdict.text}"
        grid.put_pieces(end if name else min(end, x + 2), y, [(story, verdict.tone)])


def _draw_strip(
    grid: Grid, symbols: Symbols, ranks: Sequence[RankFigures], slowest: float, verdict: Verdict | None
) -> None:
    times = [rank.step_time_s for rank in ranks if rank.step_time_s]
    middle = figures.short_time(median(times)) if times else figures.MISSING
    words: list[Piece] = [
        (f"{len(ranks)} ", Tone.STRONG),
        ("ranks  step ", Tone.DIM),
        (middle, Tone.TEXT),
    ]
    if verdict is not None:
        words.append((f"  {symbols.pointer} {verdict.rank} {verdict.text}", verdict.tone))
    room = grid.width * grid.height - LABEL_WIDTH * grid.height - sum(len(text) for text, _ in words) - 4
    shown = ranks if len(ranks) <= room else ranks[:: -(-len(ranks) // max(1, room))]
    x, y = LABEL_WIDTH, 0
    for rank in shown:
        if x >= grid.width - 1 and y + 1 < grid.height:
            x, y = LABEL_WIDTH, y + 1
        share = (rank.step_time_s or 0.0) / slowest if slowest else 0.0
        glyph = symbols.levels[max(0, min(len(symbols.levels) - 1, round(share * (len(symbols.levels) - 1))))]
        named = verdict is not None and verdict.rank == rank.rank
        x = grid.put(x, y, glyph, verdict.tone if named and verdict else Tone.METER)
    grid.put_pieces(x + 2, y, words)
