"""What the sinks wrote, as their own tools read it."""

import json
import struct
from pathlib import Path
from typing import Any


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars by tag as TensorBoard shows them: (step, value) in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not directory.is_dir():
        return {}
    shown = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    shown.Reload()
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def wandb_rows(directory: Path) -> list[dict[str, Any]]:
    """History rows of all offline files of a W&B directory, oldest file first."""
    return [row for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")) for row in _wandb_file(file)]


def _wandb_file(file: Path) -> list[dict[str, Any]]:
    from wandb.proto import wandb_internal_pb2

    # LevelDB's log format: blocks of 32 KiB; records of checksum, length, type and data; type 1 whole, 2 3 4 in parts.
    data, at, parts, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows
