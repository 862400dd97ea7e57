"""The top of the screen: is it training, since when, how far, how fast. Pure."""

from dataclasses import dataclass

from trainctl.client.figures import plain
from trainctl.client.model import RunModel
from trainctl.client.status_text import on_trial
from trainctl.tui import figures
from trainctl.tui.feed import Feed
from trainctl.tui.grid import Grid, Piece, fit, width_of
from trainctl.tui.plots import gradient_metric, loss_metric, validation_metric
from trainctl.tui.theme import Symbols
from trainctl.tui.tones import Tone
from trainctl.wire.messages import RankChanged, RunState, StateChanged

STALE_AFTER_S = 3.0
_LATE_AFTER_S = 1.5
_MOVING = frozenset({"running", "evaluating", "checkpointing"})


@dataclass(frozen=True, kw_only=True)
class Headline:
    """How the run stands: a glyph and a word, for how long, and where something is wrong a sentence about it."""

    glyph: str
    word: str
    tone: Tone
    age: str = ""
    story: str = ""
    hint: str = ""


def headline(model: RunModel, symbols: Symbols, now: float | None = None) -> Headline:
    """The state in words: what happened, what still works, what to do."""
    state, age = model.state, model.age_s(now)
    if state is None:
        return Headline(
            glyph=symbols.stale, word="CONNECTING", tone=Tone.STALE, story="waiting for the first picture of the run"
        )
    since = figures.duration(model.age_of(_since(model, state), now))
    by = f" by {plain(state.by)}" if state.by else ""
    if model.link in {"stale", "gone"} and not model.ended and age is not None and age >= STALE_AFTER_S:
        story = "no word from the hub; training may well go on"
        if model.link == "gone":
            story = "nobody answers for the hub; training may well go on, and rank 0 starts its hub again"
        return Headline(
            glyph=symbols.stale, word="STALE", tone=Tone.STALE, age=figures.duration(age), story=story + _node(model)
        )
    match state.state:
        case "paused":
            ends = ""
            if state.resumes_at is not None:
                ends = f", resumes in {figures.duration(state.resumes_at - model.source_time(now))}"
            return Headline(
                glyph=symbols.paused,
                word="PAUSED",
                tone=Tone.PAUSED,
                age=since + by,
                story=f"held: {held(model, now)}{ends}" + (f", {on_trial(state)}" if state.revert_in else ""),
                hint="" if model.link == "recorded" else "P resumes",
            )
        case "stalled":
            return Headline(
                glyph=symbols.stalled,
                word="STALLED",
                tone=Tone.STALLED,
                age=since,
                story=plain(state.reason or "no step for far longer than a step takes; every command still works"),
            )
        case "preempted":
            return Headline(
                glyph=symbols.stalled,
                word="PREEMPTED",
                tone=Tone.STALLED,
                age=since,
                story=f"the machine was taken away: {_death(model)}",
                hint=f"trainctl run --resume {plain(model.info.id)} goes on" if model.info else "",
            )
        case "lost" | "failed":
            return Headline(
                glyph=symbols.lost,
                word=state.state.upper(),
                tone=Tone.LOST,
                age=since,
                story=_death(model),
            )
        case "finished" | "stopped":
            return Headline(
                glyph=symbols.finished,
                word=state.state.upper(),
                tone=Tone.FINISHED,
                age=since + (" ago" if not by else f" ago{by}"),
                story=_reason_without(state.reason, state.by),
            )
        case "running":
            return Headline(glyph=symbols.running, word="RUNNING", tone=Tone.RUNNING, age=since, story=on_trial(state))
        case other:
            story = _batches_done(model) if other == "evaluating" else ""
            return Headline(glyph=symbols.busy, word=other.upper(), tone=Tone.RUNNING, age=since, story=story)


def _batches_done(model: RunModel) -> str:
    """How far the evaluation is on the rank that is furthest behind, where its script says so."""
    done = [figures_of.eval_batch for figures_of in model.ranks.values() if figures_of.eval_batch is not None]
    return f"{min(done):,} batch{'es' * (min(done) != 1)} done" if done else ""


def _reason_without(reason: str | None, actor: str | None) -> str:
    """Why a run ended, where that says more than who ended it: the headline has named them already."""
    if reason is None or (actor and reason in {actor, f"by {actor}"}):
        return ""
    return plain(reason.removesuffix(f" by {actor}") if actor else reason)


def _since(model: RunModel, state: RunState) -> float:
    """When the run began to be as it is. An evaluation or a checkpoint in between does not make it run anew."""
    if state.state == "paused" and state.paused_since is not None:
        return state.paused_since
    if state.state not in _MOVING:
        return state.since
    began = state.since
    for event in reversed(model.events):
        if isinstance(event, StateChanged):
            if event.state not in _MOVING:
                return began
            began = min(began, event.time)
    return min(began, model.info.started) if model.info else began


def _node(model: RunModel) -> str:
    return f" ({plain(model.info.host)})" if model.info else ""


def held(model: RunModel, now: float | None = None) -> str:
    """What a paused run keeps to itself: `8 GPUs, 1.9 GPU-h, 72 of 80 GB each`, or its ranks where there is no GPU."""
    state = model.state
    wanted = {figures_of.gpu_uuid for figures_of in model.ranks.values() if figures_of.gpu_uuid}
    gpus = [gpu for node in model.nodes.values() for gpu in node.gpus if gpu.uuid in wanted]
    if not gpus or state is None:
        world = model.info.world_size if model.info else len(model.ranks)
        return figures.plural(world, "rank")
    hours = len(gpus) * model.age_of(_since(model, state), now) / 3600
    words = f"{figures.plural(len(gpus), 'GPU')}, {hours:.1f} GPU-h"
    fullest = max(gpus, key=lambda gpu: gpu.memory_used_bytes or 0)
    if fullest.memory_used_bytes and fullest.memory_total_bytes:
        used, total = fullest.memory_used_bytes / 2**30, fullest.memory_total_bytes / 2**30
        words += f", {used:.0f} of {total:.0f} GB each"
    return words


def _death(model: RunModel) -> str:
    """Why it ended and what is left: the last good checkpoint."""
    state = model.state
    reason = state.reason if state else None
    if not reason:
        reason = next(
            (e.text for e in reversed(model.events) if isinstance(e, RankChanged) and e.severity == "error"), None
        )
    good = [info.step for info in model.checkpoints if info.verified is not False]
    last = f"last good checkpoint {figures.count(max(good))}" if good else "no good checkpoint"
    return f"{plain(reason)} · {last}" if reason else last


def progress_bar(share: float, width: int, symbols: Symbols) -> list[Piece]:
    """A bar of `width` cells between its ends, in eighths of a cell."""
    inner = max(1, width - 2)
    fine = len(symbols.bar)
    filled = min(inner * fine, max(0, int(share * inner * fine)))
    whole, part = divmod(filled, fine)
    text = symbols.bar[-1] * whole + (symbols.bar[part - 1] if part else "")
    return [
        (symbols.bar_left, Tone.BAR_REST),
        (text, Tone.BAR),
        (" " * (inner - len(text)), Tone.BAR_REST),
        (symbols.bar_right, Tone.BAR_REST),
    ]


@dataclass(frozen=True, kw_only=True)
class News:
    """Events that nobody has looked at yet, and how bad the worst of them is."""

    count: int = 0
    tone: Tone = Tone.DIM


def draw_header(
    model: RunModel,
    symbols: Symbols,
    width: int,
    *,
    now: float | None = None,
    news: News = News(),
    tag: str = "",
) -> Grid:
    """The top line, and a second one when something is wrong that does not fit behind the first.

    `tag` is what else must be known at a glance, such as "recorded" or "read only".
    """
    head = headline(model, symbols, now)
    pieces: list[Piece] = [(f" {head.glyph} {head.word}", head.tone)]
    if head.age:
        pieces.append((f" {head.age}", head.tone if head.story else Tone.DIM))
    pieces.append((f"  {fit(plain(model.name), max(8, width // 4))}", Tone.STRONG))
    if tag:
        pieces.append((f"  {tag}", Tone.NOTE))
    steps = _steps(model)
    if not head.story:
        grid = Grid(width, 1)
        _draw_progress(grid, grid.put_pieces(0, 0, pieces), model, symbols, steps, news)
        return grid
    hint = f"{head.hint} " if head.hint else ""
    before = sum(width_of(text) for text, _ in pieces)
    fits = before + len(steps) + width_of(head.story) + len(hint) + 5 <= width
    grid = Grid(width, 1 if fits else 2)
    right = grid.put_right(0, hint, Tone.KEY) - 1
    x = grid.put_pieces(0, 0, [*pieces, (f"  {steps}", Tone.TEXT)], until=right)
    if fits:
        grid.put(x + 2, 0, head.story, Tone.TEXT)
    else:
        grid.put_pieces(3, 1, [(head.story, Tone.TEXT)])
    return grid


def _steps(model: RunModel) -> str:
    if model.state is None:
        return ""
    step, total = figures.count(model.state.step), model.total_steps
    return f"step {step} / {figures.count(total)}" if total else f"step {step}"


def _draw_progress(grid: Grid, x: int, model: RunModel, symbols: Symbols, steps: str, news: News) -> None:
    width, total, state = grid.width, model.total_steps, model.state
    right = width - 1
    noted = f"{figures.plural(news.count, 'event')}" if news.count else ""
    if noted and x + len(steps) + len(noted) + 6 < width:
        right = grid.put_right(0, noted, news.tone, right=right) - 3
    eta = model.eta_s
    if eta is not None and x + len(steps) + 16 < right:
        text = figures.duration(eta)
        right = grid.put_right(0, text, Tone.TEXT, right=right)
        right = grid.put_right(0, "eta ", Tone.DIM, right=right) - 3
    if not total or state is None:
        grid.put(x + 2, 0, steps if width_of(steps) + x + 2 <= right else "", Tone.TEXT)
        return
    share = min(1.0, state.step / total)
    percent = f"{share * 100:5.1f}%"
    bar = min(44, right - x - len(steps) - len(percent) - 5)
    if bar >= 8:
        right = grid.put_right(0, percent, Tone.TEXT, right=right) - 1
        grid.put_pieces(right - bar, 0, progress_bar(share, bar, symbols))
        right -= bar + 2
    elif x + len(steps) + len(percent) + 2 < right:
        right = grid.put_right(0, percent, Tone.TEXT, right=right) - 1
    if x + 2 + width_of(steps) > right:
        steps = f"step {figures.count(state.step)}"  # without the total: half a number would be a wrong one
    if x + 2 + width_of(steps) <= right:
        grid.put(right - width_of(steps), 0, steps, Tone.TEXT)


# --- vitals


@dataclass(frozen=True, kw_only=True)
class Vital:
    """One number with its name: `label value`, `note` beside it and an arrow for its trend."""

    label: str
    value: str
    trend: int | None = None  # None: has no trend to show
    note: str = ""
    tone: Tone = Tone.STRONG
    note_tone: Tone = Tone.DIM

    def pieces(self, symbols: Symbols) -> list[Piece]:
        arrow = {1: f" {symbols.up}", -1: f" {symbols.down}"}.get(self.trend or 0, "")
        return [
            (f"{self.label} " if self.label else "", Tone.DIM),
            (self.value, self.tone),
            (f" {self.note}" if self.note else "", self.note_tone),
            (arrow, Tone.DIM),
        ]


_PHASES = {"data": "data", "data wait": "data", "data_wait": "data", "comm": "comm", "checkpoint": "ckpt"}


def vitals(model: RunModel, feed: Feed, symbols: Symbols, now: float | None = None) -> list[Vital]:
    """The run's numbers, the most important first; what is not known is left out, except the loss."""
    state = model.state
    known = frozenset(model.metrics)
    source_now = model.source_time(now)
    loss, validation, gradient = loss_metric(known), validation_metric(known), gradient_metric(known)
    found = [_metric_vital(model, feed, loss or "loss", "loss", source_now)]
    found += [_metric_vital(model, feed, name, "ppl", source_now) for name in ("ppl", "perplexity") if name in known]
    if validation:
        found.append(_metric_vital(model, feed, validation, "val", source_now))
    if (lr := _lr_vital(model, symbols)) is not None:
        found.append(lr)
    if gradient:
        found.append(_metric_vital(model, feed, gradient, "grad", source_now, digits=3))
    if state is None:
        return found
    if state.clipped is not None:
        found.append(Vital(label="clip", value=figures.percent(state.clipped)))
    moving = state.state in {"running", "evaluating", "checkpointing", "starting"}
    if moving and state.tokens_per_s:
        found.append(Vital(label="", value=f"{figures.quantity(state.tokens_per_s)} tok/s"))
    if moving and state.steps_per_s:
        found.append(Vital(label="", value=f"{figures.short_time(1 / state.steps_per_s)}/step"))
    if (lost := sum(state.dropped.values()) + model.lost_messages) > 0:
        found.append(Vital(label="dropped", value=figures.count(lost), tone=Tone.WARNING))
    if state.mfu is not None:
        found.append(Vital(label="MFU", value=figures.percent(state.mfu)))
    shares = {_PHASES[name]: share for name, share in state.phases.items() if name in _PHASES}
    found += [
        Vital(label=label, value=figures.percent(share), tone=Tone.WARNING if share > 0.25 else Tone.STRONG)
        for label, share in shares.items()
        if share >= (0.001 if label in {"data", "comm"} else 0.01)
    ]
    return found


def _metric_vital(model: RunModel, feed: Feed, name: str, label: str, source_now: float, *, digits: int = 4) -> Vital:
    last = model.metrics.get(name)
    if last is None:
        return Vital(label=label, value=figures.MISSING, tone=Tone.DIM)
    broken = last.value != last.value or last.value in {float("inf"), float("-inf")}
    if broken:
        return Vital(label=label, value=figures.number(last.value), tone=Tone.ERROR, note=f"at {last.step:,}")
    fresh = model.link == "live" or model.link == "recorded"
    return Vital(
        label=label,
        value=figures.number(last.value, digits),
        trend=feed.trend(name, source_now) if fresh else 0,
        tone=Tone.STRONG if fresh else Tone.STRUCK,
    )


def _lr_vital(model: RunModel, symbols: Symbols) -> Vital | None:
    state, last = model.state, model.metrics.get("lr")
    effective = state.lr.effective if state else None
    if effective is None and last is not None:
        effective = last.value
    if effective is None:
        return None
    scheduled = state.lr.scheduled if state else None
    note = ""
    if scheduled and abs(effective / scheduled - 1) > 1e-3:
        note = f"{symbols.times}{effective / scheduled:.3g}"
    fresh = model.link in {"live", "recorded"}
    return Vital(
        label="lr",
        value=figures.learning_rate(effective),
        note=note,
        note_tone=Tone.CURVE_2,
        tone=Tone.STRONG if fresh else Tone.STRUCK,
    )


def draw_vitals(found: list[Vital], symbols: Symbols, width: int, rows: int, late: str = "") -> Grid:
    """The vitals in as many rows as given; what does not fit is left out from the end. `late`: the age of it all."""
    grid = Grid(width, rows)
    x, y = 1, 0
    for vital in found:
        pieces = vital.pieces(symbols)
        room = sum(width_of(text) for text, _ in pieces)
        # Room for the arrow is kept, so that its coming and going moves nothing.
        padded = room + (2 if vital.trend == 0 else 0)
        end = width - 1 if y < rows - 1 or not late else width - width_of(late) - 3
        if x + room > end and x > 1:
            x, y = 1, y + 1
        if y >= rows or (late and y == rows - 1 and x + room > width - width_of(late) - 3):
            break
        grid.put_pieces(x, y, pieces)
        x += padded + 3
    if late:
        grid.put_right(rows - 1, f"{late} ", Tone.STALE)
    return grid


def lateness(model: RunModel, now: float | None = None) -> str:
    """Nothing while the picture is fresh, nor once the headline says that it is stale; between them its age."""
    age = model.age_s(now)
    if model.link == "recorded" or age is None or not _LATE_AFTER_S <= age < STALE_AFTER_S or model.ended:
        return ""
    return f"{figures.duration(age)} old"
