"""`trainctl status` as words: what an operator asks first comes first."""

from trainctl.client.figures import duration, file_size, memory, number, plain, quantity, scientific
from trainctl.client.lines import GLYPHS, data_of_a_rank, event_text, severity_of
from trainctl.client.model import RunModel
from trainctl.wire import manifest
from trainctl.wire.messages import RunState

_METRICS_SHOWN = 12
_EVENTS_SHOWN = 3


def status_text(model: RunModel, now: float | None = None) -> str:
    """Several lines; parts that are not known are left out."""
    info, state = model.info, model.state
    if info is None or state is None:
        return "nothing was heard of this run yet"
    lines = [_headline(model, now), _vitals(model)]
    lines += [_ranks(model, now)] if model.ranks else []
    lines += [_node(model, node, now) for node in sorted(model.nodes)]
    lines += [f"  set  {set_by_operators(state)}"] if state.overrides else []
    lines += [f"  {on_trial(state)}"] if state.revert_in else []
    lines += [_checkpoints(model), _in_memory(model)]
    lines += [f"  not finite  {_nonfinite(model)}"] if _nonfinite(model) else []
    lines += [f"  lost telemetry  {_dropped(model)}"] if _dropped(model) else []
    for event in list(model.events)[-_EVENTS_SHOWN:]:
        lines.append(f"  {GLYPHS[severity_of(event)]} {event_text(event)}")
    return "\n".join(line for line in lines if line)


def set_by_operators(state: RunState) -> str:
    """What differs from the script: `lr × 0.5   weight_decay = 0.05`."""
    return "   ".join(f"{plain(name)} {plain(words)}" for name, words in sorted(state.overrides.items()))


def on_trial(state: RunState) -> str:
    """How long until a change undoes itself: `a change on trial: undone in 42 steps`; empty where there is none."""
    if not state.revert_in:
        return ""
    left = sorted(state.revert_in.values())
    what = "a change on trial" if len(left) == 1 else f"{len(left)} changes on trial"
    steps = "now" if left[0] == 0 else f"in {left[0]} step{'s' * (left[0] != 1)}"
    return f"{what}: {'' if len(left) == 1 else 'the next '}undone {steps}"


def _headline(model: RunModel, now: float | None) -> str:
    info, state = model.info, model.state
    assert info is not None
    assert state is not None
    total = f"/{model.total_steps}" if model.total_steps else ""
    words = f"{plain(info.run)}  {state.state.upper()}  step {state.step}{total}"
    words += f"  eta {duration(model.eta_s)}" if model.eta_s is not None else ""
    since = state.paused_since or state.since
    words += f"  {duration(model.age_of(since, now))} in this state" if state.state == "paused" else ""
    words += f" by {plain(state.by)}" if state.by else ""
    words += f"  ({plain(state.reason)})" if state.reason and state.reason != f"by {state.by}" else ""
    age_s = model.age_s(now)
    if model.link in {"stale", "gone"} and age_s is not None:
        words += f"  no word from the hub for {duration(age_s)}; training may well go on"
    elif model.link == "recorded" and age_s is not None:
        words += f"  recorded {duration(age_s)} ago"
    words += f"  attempt {state.attempt}" if state.attempt > 1 else ""
    return words + (f"  incarnation {state.incarnation}" if state.incarnation > 1 else "")


def _vitals(model: RunModel) -> str:
    state = model.state
    assert state is not None
    skipped = {
        "lr",
        "lr_scheduled",
        "clipped",
        "step_time_s",
        "tokens_per_s",
        "samples_per_s",
        "mfu",
        "data_first",
        "data_last",
    }
    parts = [
        f"{plain(name)} {number(last.value)}"
        for name, last in sorted(model.metrics.items(), key=lambda pair: ("loss" not in pair[0], pair[0]))
        if name not in skipped and not data_of_a_rank(name)
    ][:_METRICS_SHOWN]
    if state.lr.effective is not None:
        words = f"lr {scientific(state.lr.effective)}"
        if state.lr.scheduled is not None and state.lr.scheduled != state.lr.effective:
            words += f" (scheduled {scientific(state.lr.scheduled)})"
        parts.append(words)
    parts += [f"{quantity(state.tokens_per_s)} tok/s"] if state.tokens_per_s else []
    parts += [f"{quantity(state.samples_per_s)} samples/s"] if state.samples_per_s else []
    parts += [f"clipped {state.clipped:.0%}"] if state.clipped else []
    parts += [f"{1 / state.steps_per_s:.3g} s/step"] if state.steps_per_s else []
    parts += [f"MFU {state.mfu:.0%}"] if state.mfu else []
    parts += [f"{plain(name)} {share:.0%}" for name, share in state.phases.items() if share >= 0.01]
    return "  " + "   ".join(parts) if parts else ""


def _ranks(model: RunModel, now: float | None) -> str:
    parts = []
    for rank, figures in sorted(model.ranks.items()):
        pace = f" {figures.step_time_s:.3g}s" if figures.step_time_s is not None else ""
        age_s = model.rank_age_s(rank, now)
        late = f" {duration(age_s)} ago" if age_s is not None and age_s > 5 else ""
        parts.append(f"{rank} {plain(figures.state)}{pace}{late}")
    return "  ranks  " + "   ".join(parts)


def _node(model: RunModel, node: str, now: float | None) -> str:
    reading = model.nodes[node]
    age_s = model.node_age_s(node, now)
    words = f"  node  {plain(node)}"
    if reading.state == "lost":
        return f"{words}  lost"
    words += f"  cpu {reading.cpu:.0f}%" if reading.cpu is not None else ""
    if reading.memory_used_bytes is not None:
        words += f"  memory {memory(reading.memory_used_bytes, reading.memory_total_bytes)}"
    for gpu in reading.gpus:
        busy = "n/a" if gpu.utilization is None else f"{gpu.utilization:.0f}%"
        words += f"  gpu{gpu.index} {busy} {memory(gpu.memory_used_bytes, gpu.memory_total_bytes)}"
    if reading.gpu_state not in {"ok", "none"}:
        words += f"  GPUs: {plain(reading.gpu_state)}"
    return words + (f"  {duration(age_s)} ago" if age_s is not None and age_s > 5 else "")


def _checkpoints(model: RunModel) -> str:
    last, best = manifest.pick(model.checkpoints, "last"), model.best_checkpoint
    if last is None:
        return "  no checkpoint yet"
    words = f"  {len(model.checkpoints)} checkpoints, last {last.id} at step {last.step}"
    return words + (f", best {best.id} at step {best.step}" if best is not None and best.id != last.id else "")


def _in_memory(model: RunModel) -> str:
    """The states that can be rolled back to without the disk, and what a rank spends on them."""
    held = [figures.checkpoint_memory_bytes or 0 for figures in model.ranks.values()]
    if model.state is None or model.ended or not any(held):
        return ""
    steps = ", ".join(str(info.step) for info in model.state.in_memory) or "none"
    return f"  in memory: steps {steps}; {file_size(max(held))} of host memory on a rank for saves"


def _nonfinite(model: RunModel) -> str:
    state = model.state
    assert state is not None
    parts = [f"{plain(name)} {count} NaN" for name, count in sorted(state.nans.items())]
    return ", ".join([*parts, *(f"{plain(name)} {count} Inf" for name, count in sorted(state.infs.items()))])


def _dropped(model: RunModel) -> str:
    counts = dict(model.state.dropped) if model.state else {}
    if model.lost_messages:
        counts["on the way here"] = model.lost_messages
    return ", ".join(f"{count} {plain(reason)}" for reason, count in counts.items() if count)
