"""`trainctl status --json`: one picture of now, with exactly the fields that docs/cli.md promises."""

from typing import Any

from trainctl.client.jsonable import SCHEMA, jsonable
from trainctl.client.model import RunModel
from trainctl.wire import manifest
from trainctl.wire.commands import REGISTRY
from trainctl.wire.messages import NodeReading, RunInfo, RunState
from trainctl.wire.removal import why_kept


def status_json(model: RunModel, now: float | None = None) -> dict[str, Any]:
    """The picture at `now` on the model's clock; what is not known is None. Plain JSON data."""
    info, state = model.info, model.state
    fields: dict[str, object] = {
        "schema": SCHEMA,
        "run": info.run if info else None,
        "id": info.id if info else None,
        "job_id": info.job_id if info else None,
        "state": state.state if state else None,
        "step": state.step if state else None,
        "total_steps": model.total_steps,
        "incarnation": state.incarnation if state else None,
        "attempt": state.attempt if state else None,
        "world_size": info.world_size if info else None,
        "age_s": model.age_s(now),
        "eta_s": model.eta_s,
        "lr": {
            "scheduled": state.lr.scheduled if state else None,
            "effective": state.lr.effective if state else None,
        },
        "metrics": {
            name: {"step": last.step, "value": last.value, "age_s": model.metric_age_s(name, now)}
            for name, last in sorted(model.metrics.items())
        },
        "throughput": {
            "steps_per_s": state.steps_per_s if state else None,
            "tokens_per_s": state.tokens_per_s if state else None,
            "mfu": state.mfu if state else None,
        },
        "phases": state.phases if state else {},
        "ranks": _ranks(model, now),
        "nodes": [node_json(reading, model.node_age_s(node, now)) for node, reading in sorted(model.nodes.items())],
        "checkpoints": _checkpoints(model),
        "capabilities": capabilities(info) | _of_checkpoints(model),
        "dropped": (sum(state.dropped.values()) if state else 0) + model.lost_messages,
        # More than was promised, for those who look closer.
        "dropped_by_reason": _dropped_by_reason(model),
        "overrides": state.overrides if state else {},
        "revert_in": state.revert_in if state else {},
        "samples_per_s": state.samples_per_s if state else None,
        "clipped": state.clipped if state else None,
        "nonfinite": _nonfinite(state) if state else {},
        "link": model.link,
        "reason": state.reason if state else None,
        "since": state.since if state else None,
        "by": state.by if state else None,
        "dir": info.dir if info else None,
        "host": info.host if info else None,
    }
    plain = jsonable(fields)
    assert isinstance(plain, dict)
    return plain


def _ranks(model: RunModel, now: float | None) -> list[dict[str, object]]:
    """Every rank that has a place in the run, with figures where there are any."""
    places = {place.rank: place for place in model.info.ranks} if model.info else {}
    found: list[dict[str, object]] = []
    for rank in sorted(places.keys() | model.ranks.keys()):
        figures, place = model.ranks.get(rank), places.get(rank)
        found.append(
            {
                "rank": rank,
                "node": figures.node if figures else place.node if place else None,
                "pid": figures.pid if figures else place.pid if place else None,
                "state": figures.state if figures else None,
                "step": figures.step if figures else None,
                "step_time_s": figures.step_time_s if figures else None,
                "age_s": model.rank_age_s(rank, now),
                "data_wait_s": figures.data_wait_s if figures else None,
                "memory_bytes": figures.memory_bytes if figures else None,
                "loss": figures.loss if figures else None,
                "data_first": figures.data_first if figures else None,
                "data_last": figures.data_last if figures else None,
                "checkpoint_memory_bytes": figures.checkpoint_memory_bytes if figures else None,
                "gpu_uuid": (figures.gpu_uuid if figures else None) or (place.gpu_uuid if place else None),
            }
        )
    return found


def _dropped_by_reason(model: RunModel) -> dict[str, int]:
    counts = dict(model.state.dropped) if model.state else {}
    return counts | {"to_client": model.lost_messages} if model.lost_messages else counts


def _nonfinite(state: RunState) -> dict[str, dict[str, int]]:
    return {
        name: {"nan": state.nans.get(name, 0), "inf": state.infs.get(name, 0)}
        for name in sorted(state.nans.keys() | state.infs.keys())
    }


def node_json(reading: NodeReading, age_s: float | None) -> dict[str, object]:
    """A node as `status` and `top` show it."""
    return {
        "node": reading.node,
        "state": reading.state,
        "age_s": age_s,
        "cpu": reading.cpu,
        "memory": {"used_bytes": reading.memory_used_bytes, "total_bytes": reading.memory_total_bytes},
        "gpus": reading.gpus,
        "load": reading.load,
        "gpu_state": reading.gpu_state,
        "processes": reading.processes,
    }


def _checkpoints(model: RunModel) -> dict[str, object]:
    last, best = manifest.pick(model.checkpoints, "last"), model.best_checkpoint
    return {
        "count": len(model.checkpoints),
        "last": last.id if last else None,
        "best": best.id if best else None,
    }


def capabilities(info: RunInfo | None) -> dict[str, bool | str]:
    """True or the reason why not, by command as typed (`lr scale`) and by capability (`lr`)."""
    if info is None:
        return {}
    found: dict[str, bool | str] = {name: _true_or_reason(value) for name, value in info.capabilities.items()}
    for name, spec in REGISTRY.items():
        if spec.capability is None:
            found.setdefault(name, True)  # the hub says whether a restart can be had
        else:
            found[name] = _true_or_reason(info.capabilities.get(spec.capability, False))
    return found


def _of_checkpoints(model: RunModel) -> dict[str, bool | str]:
    """What can be done with checkpoints without any rank: deleting only where there is one to spare."""
    found, name = model.checkpoints, model.name
    none = f"{name} has no checkpoint yet"
    spare = any(why_kept(found, info.id) is None for info in found)
    return {
        "checkpoint ls": True,
        "checkpoint verify": True if found else none,
        "checkpoint export": True if found else none,
        "checkpoint rm": True if spare else "every checkpoint is the last good one or pinned" if found else none,
    }


def _true_or_reason(value: bool | str) -> bool | str:
    return value or "the script does not offer it"
