"""The log: every event as one line of text and as one JSON object, and metrics as the line that people know."""

import re
import struct
from collections.abc import Iterator, Mapping

from trainctl.client.model import RunModel
from trainctl.wire.events import arguments, command_text, event_json, event_text, kind_of, severity_of
from trainctl.wire.figures import duration, memory, number, plain, quantity, scientific, two_decimals
from trainctl.wire.messages import Rows, Severity

__all__ = [
    "GLYPHS",
    "KINDS",
    "arguments",
    "command_text",
    "data_of_a_rank",
    "event_json",
    "event_text",
    "gpu_part",
    "kind_of",
    "metrics_json",
    "metrics_line",
    "row_values",
    "severity_of",
]

KINDS = ("metrics", "state", "command", "checkpoint", "rollback", "anomaly", "rank", "node", "output", "note")
GLYPHS: dict[Severity, str] = {"info": "·", "good": "✓", "warning": "⚠", "error": "✕"}

# Metrics that are parts of the line in another form, or too much for it.
_PLACED = frozenset({"loss", "lr", "lr_scheduled", "grad_norm", "tokens_per_s", "samples_per_s", "step_time_s"}) | {
    "mfu",
    "data_first",
    "data_last",
}
_FREE_NAMES = 8
# What other ranks than 0 read for a step: it comes seconds after the step's own row, and up to 64 ranks have some.
_DATA_OF_A_RANK = re.compile(r"data_(?:first|last)\.[0-9]+")


def data_of_a_rank(metric: str) -> bool:
    """Whether a metric is the absolute index of what one rank read (`data_first.3`): for a file, not for an eye."""
    return _DATA_OF_A_RANK.fullmatch(metric) is not None


def row_values(rows: Rows) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Step, time and values of each row. Columns that are not as long as they say are left out."""
    count = len(rows.steps)
    columns: dict[str, tuple[float, ...]] = {}
    for column in rows.columns:
        size, code = (4, "f") if column.dtype == "f4" else (8, "d")
        if len(column.data) == size * count:
            columns[column.name] = struct.unpack(f"<{count}{code}", column.data)
    for at, (step, when) in enumerate(zip(rows.steps, rows.times, strict=False)):
        yield step, when, {name: values[at] for name, values in columns.items()}


def metrics_json(step: int, when: float, incarnation: int, values: Mapping[str, float]) -> dict[str, object]:
    """One row's fields for one line of `log --json`."""
    return {"time": when, "kind": "metrics", "step": step, "incarnation": incarnation, "metrics": dict(values)}


def metrics_line(
    step: int, values: Mapping[str, float], *, total_steps: int | None = None, model: RunModel | None = None
) -> str:
    """`step 5000/100000 | loss 2.347 | lr 2.8e-4 | …`. With a model, GPUs and ETA of now are added."""
    parts = [f"step {step}/{total_steps}" if total_steps else f"step {step}"]
    if "loss" in values:
        parts.append(f"loss {number(values['loss'])}")
    others = [name for name in values if name not in _PLACED and not data_of_a_rank(name)]
    shown = [name for name in others if "loss" in name] if "loss" in values else others[:_FREE_NAMES]
    parts += [f"{plain(name)} {number(values[name])}" for name in shown]
    if "lr" in values:
        parts.append(f"lr {scientific(values['lr'])}")
    if "grad_norm" in values:
        parts.append(f"grad {two_decimals(values['grad_norm'])}")
    if "tokens_per_s" in values:
        parts.append(f"{quantity(values['tokens_per_s'])} tok/s")
    elif "samples_per_s" in values:
        parts.append(f"{quantity(values['samples_per_s'])} samples/s")
    if "step_time_s" in values:
        parts.append(f"{two_decimals(values['step_time_s'])} s/step")
    if model is not None and "step_time_s" in values:
        parts += [text for text in (gpu_part(model), _eta_part(model)) if text]
    return " | ".join(parts)


def _eta_part(model: RunModel) -> str | None:
    return f"eta {duration(model.eta_s)}" if model.eta_s else None


def gpu_part(model: RunModel) -> str | None:
    """The run's GPUs in few words: mean utilisation, and the memory of the fullest. None without a reading."""
    wanted = {figures.gpu_uuid for figures in model.ranks.values() if figures.gpu_uuid}
    gpus = [gpu for reading in model.nodes.values() if reading.state == "alive" for gpu in reading.gpus]
    gpus = [gpu for gpu in gpus if gpu.uuid in wanted] if wanted else gpus
    busy = [gpu.utilization for gpu in gpus if gpu.utilization is not None]
    full = [
        (gpu.memory_used_bytes / gpu.memory_total_bytes, gpu.memory_used_bytes, gpu.memory_total_bytes)
        for gpu in gpus
        if gpu.memory_used_bytes is not None and gpu.memory_total_bytes
    ]
    words = [f"{sum(busy) / len(busy):.0f}%"] if busy else []
    words += [memory(max(full)[1], max(full)[2])] if full else []
    return f"gpu {' '.join(words)}" if words else None
